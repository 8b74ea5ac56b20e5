// The numbers that codes can stand for, as quanto_hf/fit/grid.py defines them: `nearest` is the number next to u, `code`
// its code as a float (the low byte of that integer is stored). Included inside a level's namespace.

inline F magnitude(F v) { return masked(v, 0x7FFFFFFF); }

// Integers from `low` to `high`; the code of `shift` is 0.
struct IntGrid {
    static constexpr bool HAS_ZERO = true;  // may be moved by a zero
    F low, high, shift;
    explicit IntGrid(const Quantize& q)
        : low(splat(static_cast<float>(q.numbers[0]))),
          high(splat(static_cast<float>(q.numbers[1]))),
          shift(q.codes == INT8 ? splat(0.0f) : low) {}
    F nearest(F u) const { return min(max(round_even(u), low), high); }
    F code(F u) const { return sub(nearest(u), shift); }
};

// 8-bit floats with MANTISSA bits after the point, and subnormals below 2 ** LEAST.
template <int MANTISSA, int LEAST>
struct FloatGrid {
    static constexpr bool HAS_ZERO = false;
    F low, high, least, step;
    explicit FloatGrid(const Quantize& q)
        : low(splat(static_cast<float>(q.numbers[0]))),
          high(splat(static_cast<float>(q.numbers[1]))),
          least(splat(std::ldexp(1.0f, LEAST))),
          step(splat(std::ldexp(1.5f, 23 - MANTISSA))) {}
    // A float that is so large that its last bit is the step of the grid: adding it rounds, half to even.
    F nearest(F u) const {
        u = min(max(u, low), high);
        const F large = mul(max(masked(u, 0x7F800000), least), step);
        return sub(add(u, large), large);
    }
    F code(F u) const {
        // Exponent and mantissa are the upper bits of a float with another bias. A subnormal gets its bits in the
        // right place by adding the smallest normal number, whose exponent then counts once too often.
        constexpr int BIAS = 126 + LEAST;
        const F size = magnitude(nearest(u)), one = splat(static_cast<float>(1 << MANTISSA));
        const F bits = to_float(shifted(add(size, select_less(size, least, least, splat(0.0f))), 23 - MANTISSA));
        const F extra = select_less(size, least, one, splat(0.0f));
        const F sign = to_float(shifted(u, 31));
        return fma(sign, splat(128.0f), sub(sub(bits, extra), mul(one, splat(static_cast<float>(BIAS)))));
    }
};

// A table of 16 numbers. Values fall into 65536 cells, as in torch: `table` holds the first cell of the 2nd, 3rd, ...
// of the sorted numbers (16, infinite beyond the last), the numbers (16), their codes (16), and the cells per unit.
struct TableGrid {
    static constexpr bool HAS_ZERO = false;
    F low, high, cells;
    Table borders, numbers, codes;
    explicit TableGrid(const Quantize& q)
        : low(splat(static_cast<float>(q.numbers[0]))),
          high(splat(static_cast<float>(q.numbers[1]))),
          cells(splat(q.table[48])),
          borders(load_table(q.table)),
          numbers(load_table(q.table + 16)),
          codes(load_table(q.table + 32)) {}
    I rank(F u) const {
        const F cell = round_even(mul(sub(min(max(u, low), high), low), cells)), zero = splat(0.0f);
        F r = zero;
        QUANTO_UNROLL
        for (int half = 8; half; half /= 2) {  // how many borders lie at or below the cell
            const F border = lookup(borders, to_int(add(r, splat(static_cast<float>(half - 1)))));
            r = add(r, select_less(cell, border, zero, splat(static_cast<float>(half))));
        }
        return to_int(r);
    }
    F nearest(F u) const { return lookup(numbers, rank(u)); }
    F code(F u) const { return lookup(codes, rank(u)); }
};

// x ** power for x >= 1e-12 and -1 <= power <= 0, to 2e-6.
inline F power_of(F x, float power) {
    // log2: the exponent, and the series of 2 artanh(s) = ln((1 + s) / (1 - s)) for the mantissa
    const F m = div(x, masked(x, 0x7F800000)), one = splat(1.0f);
    const F s = div(sub(m, one), add(m, one)), ss = mul(s, s);
    F log = splat(2.8853901f / 9);
    for (int odd = 7; odd > 0; odd -= 2) log = fma(log, ss, splat(2.8853901f / static_cast<float>(odd)));
    const F exponent = sub(to_float(shifted(x, 23)), splat(127.0f));
    const F y = max(mul(fma(log, s, exponent), splat(power)), splat(-126.0f));
    // 2 ** y: the whole part becomes the exponent of a float, the rest is the series of exp(f ln 2), |f| <= 0.5
    const F whole = round_even(y), f = mul(sub(y, whole), splat(0.69314718f));
    F series = splat(1.0f / 720);
    constexpr float factors[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float factor : factors) series = fma(series, f, splat(factor));
    return mul(series, as_float(to_int(mul(add(whole, splat(127.0f)), splat(8388608.0f)))));
}
