// A weight of random codes, and what docs/format.md makes of them. Included by test_kernels.cpp inside its namespace.

struct Example {
    Guarded packed, scale, zero, table;
    Weight w;
    std::vector<float> exact;  // n x k, in float32 as docs/format.md has it
    std::string name;
};

double code_value(const Example& e, int code) {
    switch (e.w.codes) {
        case INT8: return static_cast<int8_t>(code);
        case E4M3: return (code & 0x7F) == 0x7F ? std::nan("") : (code & 0x78) == 0x78
                       ? (code & 0x80 ? -1 : 1) * std::ldexp(8 + (code & 7), 5)
                       : from_bits(code, 4, 3);
        case E5M2: return from_bits(code, 5, 2);
        default: return e.table.get<float>()[code];
    }
}

// Where docs/format.md puts code j of a row.
int read_code(const Weight& w, int64_t row, int64_t j) {
    const int bits = bits_of(w.codes);
    const uint8_t* bytes = w.packed + row * row_bytes(w.codes, w.k);
    if (bits == 8) return bytes[j];
    const int64_t block = 64 * 8 / bits, base = j / block * block;
    const int64_t codes = std::min(block, w.k - base), m = (codes * bits + 7) / 8;
    return bytes[base * bits / 8 + (j - base) % m] >> ((j - base) / m * bits) & ((1 << bits) - 1);
}

void compute_exact(Example& e) {
    const Weight& w = e.w;
    e.exact.resize(w.n * w.k);
    for (int64_t i = 0; i < w.n; i++)
        for (int64_t j = 0; j < w.k; j++) {
            const int64_t g = i * w.groups + j / w.group;
            const float value = static_cast<float>(code_value(e, read_code(w, i, j)));
            const float shifted = value - (w.zero ? static_cast<float>(read(w.zero, g, w.scale_type)) : 0.0f);
            e.exact[i * w.k + j] = shifted * static_cast<float>(read(w.scale, g, w.scale_type));
        }
}

// `all_codes`: NaN and infinities of the float8 types too.
Example make(int codes, int64_t n, int64_t k, int64_t group, bool zero, int scale_type, bool all_codes) {
    Example e;
    Weight& w = e.w;
    w.codes = codes, w.n = n, w.k = k, w.scale_type = scale_type;
    w.group = group <= 0 || group > k ? std::max<int64_t>(k, 1) : group;
    w.groups = std::max<int64_t>((k + w.group - 1) / w.group, 1);
    e.packed = Guarded(n * row_bytes(codes, k));
    for (size_t i = 0; i < e.packed.size(); i++) {
        int code = generator() & 0xFF;
        if (!all_codes && codes == E4M3 && (code & 0x7F) == 0x7F) code ^= 1;
        if (!all_codes && codes == E5M2 && (code & 0x7C) == 0x7C) code ^= 0x40;
        e.packed.get<uint8_t>()[i] = static_cast<uint8_t>(code);
    }
    const double largest = codes == INT8 ? 128 : codes == E4M3 ? 448 : codes == E5M2 ? 57344 : 8;
    e.scale = Guarded(n * w.groups * size_of(scale_type));
    for (int64_t i = 0; i < n * w.groups; i++)
        write(e.scale.get(), i, scale_type, uniform(0.25, 1) / largest * (generator() & 1 ? 1 : -1));
    if (zero) {
        e.zero = Guarded(n * w.groups * size_of(scale_type));
        for (int64_t i = 0; i < n * w.groups; i++) write(e.zero.get(), i, scale_type, uniform(-0.5, 0.5) * largest);
    }
    if (bits_of(codes) < 8) {
        e.table = Guarded(16 * sizeof(float));
        for (int i = 0; i < 16; i++)
            e.table.get<float>()[i] = codes == TABLE4 ? static_cast<float>(round_to(uniform(-8, 8), BF16)) : i - 2.0f;
    }
    w.packed = e.packed.get<uint8_t>(), w.scale = e.scale.get();
    w.zero = zero ? e.zero.get() : nullptr;
    w.table = bits_of(codes) < 8 ? e.table.get<float>() : nullptr;
    compute_exact(e);
    char text[200];
    std::snprintf(text, sizeof text, "%s n=%lld k=%lld group=%lld scale=%s%s", CODE_NAMES[codes], static_cast<long long>(n),
                  static_cast<long long>(k), static_cast<long long>(group), FLOAT_NAMES[scale_type], zero ? " zero" : "");
    e.name = text;
    return e;
}
