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

// A table of up to 16 numbers. Values fall into 65536 cells, as in torch. `table` says for each of 16 stretches of 4096
// cells: the first cell of the second and of the third number that is nearest to one of them (infinite where there is
// none), the three numbers, and their codes, 16 floats each; then the cells per unit. A search through all borders in
// four steps would take twice the time.
struct TableGrid {
    static constexpr bool HAS_ZERO = false;
    F low, high, cells;
    Table borders[2], numbers[3], codes[3];
    explicit TableGrid(const Quantize& q)
        : low(splat(static_cast<float>(q.numbers[0]))),
          high(splat(static_cast<float>(q.numbers[1]))),
          cells(splat(q.table[128])) {
        for (int i = 0; i < 2; i++) borders[i] = load_table(q.table + 16 * i);
        for (int i = 0; i < 3; i++) numbers[i] = load_table(q.table + 32 + 16 * i), codes[i] = load_table(q.table + 80 + 16 * i);
    }
    F choose(F u, const Table (&of)[3]) const {
        const F cell = round_even(mul(sub(min(max(u, low), high), low), cells));
        // to_int rounds to the nearest: less by half a stretch, and more by half a cell, it rounds down
        const I stretch = to_int(fma(cell, splat(1.0f / 4096), splat(-0.5f + 0.5f / 4096)));
        const F first = select_less(cell, lookup(borders[0], stretch), lookup(of[0], stretch), lookup(of[1], stretch));
        return select_less(cell, lookup(borders[1], stretch), first, lookup(of[2], stretch));
    }
    F nearest(F u) const { return choose(u, numbers); }
    F code(F u) const { return choose(u, codes); }
};

// x ** power for x >= 1e-12 and -1 <= power <= 0, to 1e-6.
inline F power_of(F x, float power) {
    // log2 of x = 2 ** e * (1 + t): a polynomial through 8 Chebyshev nodes, off by 4e-7
    constexpr float log2s[] = {-0.0756513774f, 0.188752741f, -0.3219603f, 0.472086906f, -0.720316052f, 1.44264758f, 3.68561416e-07f};
    const F t = mul(to_float(shifted(masked(x, 0x007FFFFF), 0)), splat(1.0f / 8388608));
    F log = splat(0.0144403521f);
    for (float factor : log2s) log = fma(log, t, splat(factor));
    log = add(log, sub(to_float(shifted(x, 23)), splat(127.0f)));
    // 2 ** y: the whole part becomes the exponent of a float; for the rest, |f| <= 0.5, 6 nodes are off by 2e-7
    const F y = max(mul(log, splat(power)), splat(-126.0f)), whole = round_even(y), f = sub(y, whole);
    constexpr float powers[] = {0.00967603177f, 0.0555035695f, 0.240221068f, 0.693147182f, 1.00000012f};
    F series = splat(0.00133908633f);
    for (float factor : powers) series = fma(series, f, splat(factor));
    return mul(series, as_float(to_int(mul(add(whole, splat(127.0f)), splat(8388608.0f)))));
}
