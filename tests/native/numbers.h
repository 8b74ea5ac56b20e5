// Floats of 16 and 8 bits, written plainly. Included by test_kernels.cpp inside its namespace.

float float_of(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
uint32_t bits_of_float(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

// A float of `exponent` and `mantissa` bits with the usual bias; the highest exponent is inf and nan.
double from_bits(uint32_t bits, int exponent, int mantissa) {
    const uint32_t fraction = bits & ((1u << mantissa) - 1), e = (bits >> mantissa) & ((1u << exponent) - 1);
    const double sign = (bits >> (mantissa + exponent)) & 1 ? -1.0 : 1.0;
    const int bias = (1 << (exponent - 1)) - 1;
    if (e == (1u << exponent) - 1) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    if (e == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
    return sign * std::ldexp(fraction + (1u << mantissa), static_cast<int>(e) - bias - mantissa);
}
double half_of(uint16_t bits) { return from_bits(bits, 5, 10); }
double bf16_of(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// The float that is nearest, ties to even, among those with `mantissa` bits and exponents from `lowest` on. A sum with a
// number whose last bit has that weight is rounded there.
double rounded(double v, int mantissa, int lowest, double largest) {
    if (!std::isfinite(v)) return v;
    uint64_t bits;
    std::memcpy(&bits, &v, 8);
    const int exponent = std::max(static_cast<int>(bits >> 52 & 0x7FF) - 1023, lowest) - mantissa;
    bits = static_cast<uint64_t>(exponent + 52 + 1023) << 52;
    double magic;
    std::memcpy(&magic, &bits, 8);
    magic *= 1.5;
    const double r = (v + magic) - magic;
    return std::fabs(r) > largest ? std::copysign(std::numeric_limits<double>::infinity(), v) : std::copysign(r, v);
}
double round_to(double v, int type) {
    if (type == BF16) return rounded(v, 7, -126, 3.3895313892515355e38);
    if (type == F16) return rounded(v, 10, -14, 65504.0);
    return static_cast<float>(v);
}

double read(const void* p, int64_t i, int type) {
    if (type == F32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    return type == BF16 ? bf16_of(h) : half_of(h);
}
void write(void* p, int64_t i, int type, double v) {
    if (type == F32) {
        static_cast<float*>(p)[i] = static_cast<float>(v);
        return;
    }
    v = round_to(v, type);
    uint16_t h;
    if (type == BF16) {
        h = std::isnan(v) ? 0x7FC0 : static_cast<uint16_t>(bits_of_float(static_cast<float>(v)) >> 16);
    } else if (!std::isfinite(v)) {
        h = std::isnan(v) ? 0x7E00 : v < 0 ? 0xFC00 : 0x7C00;
    } else {
        const double a = std::fabs(v);
        int e = 0;
        if (a != 0) std::frexp(a, &e), e--;
        uint32_t bits = 0;
        if (a != 0 && e < -14) bits = static_cast<uint32_t>(std::ldexp(a, 24));
        else if (a != 0) bits = static_cast<uint32_t>(e + 15) << 10 | (static_cast<uint32_t>(std::ldexp(a, 10 - e)) & 0x3FF);
        h = static_cast<uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0));
    }
    static_cast<uint16_t*>(p)[i] = h;
}
