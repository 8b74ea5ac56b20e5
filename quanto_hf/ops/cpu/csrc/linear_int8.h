// Which kernel serves a product with x in int8. Included after the others at a level for x86.

// Codes of 4 or 2 bits that stand for numbers 1 apart; groups of a multiple of 16 columns, or whole rows. Without zeros
// the lowest number is -8 or -2.
inline void linear_int8_groups(const Linear& a) {
    const Weight& w = a.w;
    if (a.m == 0 || w.n == 0) return;
    const int bits = bits_of(w.codes), middle = 1 << (bits - 1);
    const int64_t unit = w.groups == 1 || w.group % X_GROUP == 0 ? X_GROUP : X_GROUP / 2;
    RoundedX x;
    x.units = (w.k + unit - 1) / unit;
    x.ld = round_up(w.k, BLOCK_BYTES * (8 / bits)) / 4 + BLOCK_BYTES / 4;  // rows must not share their cache sets
    x.q = static_cast<int32_t*>(scratch(0, a.m * x.ld * sizeof(int32_t)));
    const int64_t numbers = a.m * (2 * x.units + w.groups + 1);
    x.scales = static_cast<float*>(scratch(1, numbers * sizeof(float)));
    x.starts = reinterpret_cast<int32_t*>(x.scales + a.m * x.units);
    x.powers = x.scales + 2 * a.m * x.units;
    const float offset = w.table[0] + static_cast<float>(middle);
    x.shifts = w.zero ? x.powers + a.m : nullptr;
    parallel(a.m > 1 ? a.threads : 1, [&](int thread, int of) {
        const Range part = share(a.m, 1, thread, of);
        for (int64_t m = part.begin; m < part.end; m++)
            with_type(a.x_type, [&](auto type) { round_row<decltype(type)::type>(a, m, unit, middle, x); });
    });
    if (few_rows(a, x, unit, middle, offset)) return;
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(w.n, 32, thread, of);
        const bool zeros = w.zero != nullptr;
        if (bits == 4) unit == X_GROUP ? multiply_rows<4, X_GROUP>(a, x, zeros, offset, part) : multiply_rows<4, X_GROUP / 2>(a, x, zeros, offset, part);
        else unit == X_GROUP ? multiply_rows<2, X_GROUP>(a, x, zeros, offset, part) : multiply_rows<2, X_GROUP / 2>(a, x, zeros, offset, part);
    });
}
