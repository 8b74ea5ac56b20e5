// The panels of aqlm_panels.h for bfloat16 products. Included inside the namespace of a level that has them.

struct AqlmBF16 : DotBF16<false> {
    static void panel(const Weight& w, const Tables&, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* out) {
        const int64_t end = w.k < to ? w.k : to;
        with_aqlm(*w.aqlm, [&](auto book, auto code) {
            for (int64_t r = 0; r < rows; r++) {
                ask_for_codes(w, row + r + AQLM_AHEAD, from, end);
                if (end < to) std::memset(out + r * CHUNK + (end - from), 0, (to - end) * 2);
                for_each_chunk<decltype(book)::type, decltype(code)>(
                    w, row + r, from, end, [&](const float* values, int64_t column, int64_t count) {
                        uint16_t* to_row = out + r * CHUNK + column - from;
                        int64_t i = 0;
                        for (; i + W <= count; i += W) store_factors(to_row + i, load(values + i));
                        if (i < count) storen_bf16(to_row + i, load(values + i), count - i);
                    });
            }
        });
    }
};

// As all others of this level.
inline void multiply(AqlmBF16, const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                     int64_t columns, float* sums, int64_t sums_ld, bool first) {
    multiply(DotBF16<false>{}, panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}
