// Products of bfloat16 for gemm.h: bfmmla multiplies two rows of the weight with two rows of x, four columns at once.
// Included inside the namespace of a level that has FEAT_BF16.

// BLOCKS: the weight goes through neon_bf16_blocks.h. Else any weight.
template <bool BLOCKS>
struct DotBF16 : FloatSums {
    using Number = uint16_t;
    static constexpr int STEP = 4;
    static bool late(const Weight& w) { return BLOCKS && bits_of(w.codes) == 8; }
    static int64_t padded(const Weight& w) { return round_up(w.k, 16); }

    // Four columns of four rows of x fill two registers.
    static void pack(const Linear& a, int64_t m0, int64_t count, uint16_t* out) {
        const int64_t padded = DotBF16::padded(a.w), whole = a.w.k / 8 * 8;
        for (int i = 0; i < W; i++) {
            if (i >= count) {
                for (int64_t k = 0; k < padded; k += 4) vst1_u16(out + k * W + i * 4, vdup_n_u16(0));
                continue;
            }
            const uint16_t* x = static_cast<const uint16_t*>(a.x) + (m0 + i) * a.w.k;
            for (int64_t k = 0; k < whole; k += 8) {
                const uint16x8_t v = vld1q_u16(x + k);
                vst1_u16(out + k * W + i * 4, vget_low_u16(v));
                vst1_u16(out + (k + 4) * W + i * 4, vget_high_u16(v));
            }
            for (int64_t k = whole; k < padded; k += 4) {
                const int64_t n = k >= a.w.k ? 0 : a.w.k - k < 4 ? a.w.k - k : 4;
                vst1_u16(out + k * W + i * 4, low_halves(x + k, n));
            }
        }
    }

    struct Tables {
        explicit Tables(const Weight&) {}
    };

    template <int C, int R>
    static void panel_blocks(const Weight& w, int64_t row, int64_t from, int64_t to, uint16_t* out) {
        blocks<C, R>(w, row, from, to, [&](int64_t column, const Columns<R>& weights) {
            for (int r = 0; r < R; r++)
                for (int h = 0; h < 2; h++) vst1q_u16(out + r * CHUNK + column - from + 8 * h, weights.of[r][h]);
        });
    }

    static void panel(const Weight& w, const Tables&, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* out) {
        with_codes(w.codes, [&](auto tag) {
            constexpr int C = decltype(tag)::codes;
            const int64_t end = w.k < to ? w.k : to;
            int64_t done = from, r = 0;
            if (BLOCKS) {
                done = block_columns(w) < end ? block_columns(w) : end;
                if (done < from) done = from;
                for (; r + 2 <= rows; r += 2) panel_blocks<C, 2>(w, row + r, from, done, out + r * CHUNK);
                for (; r < rows; r++) panel_blocks<C, 1>(w, row + r, from, done, out + r * CHUNK);
                if (bits_of(C) == 8) return;  // the last columns have been filled up with zeros
            }
            if (done < to)
                for (r = 0; r < rows; r++) {
                    std::memset(out + r * CHUNK + (end - from), 0, (to - end) * 2);
                    for_each_weight<C>(w, row + r, done, end, [&](F v, int64_t column, int n, auto) {
                        storen_bf16(out + r * CHUNK + column - from, v, n);
                    });
                }
        });
    }
};

// sums[r][m] of up to 2 * P rows of the weight and U tiles of x; P * 2 * U sums of four stay in registers.
template <int P, int U>
inline void pair_product(const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t columns, float* sums,
                         int64_t sums_ld, bool first) {
    const uint16_t* row[P][2];
    float* out[P][2];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2; i++) {
            // an odd last row is its own partner: it is computed twice, and the same sum is written twice
            const int64_t r = 2 * p + i < rows ? 2 * p + i : rows - 1;
            row[p][i] = panel + r * CHUNK, out[p][i] = sums + r * sums_ld;
        }
    F acc[P][2 * U];
    for (int p = 0; p < P; p++)
        for (int u = 0; u < 2 * U; u++)
            acc[p][u] = first ? splat(0.0f) : vcombine_f32(vld1_f32(out[p][0] + 2 * u), vld1_f32(out[p][1] + 2 * u));
    for (int64_t k = 0; k < columns; k += 8) {
        uint16x8_t weights[P][2];
        for (int p = 0; p < P; p++) {
            const uint64x2_t a = vreinterpretq_u64_u16(vld1q_u16(row[p][0] + k));
            const uint64x2_t b = vreinterpretq_u64_u16(vld1q_u16(row[p][1] + k));
            weights[p][0] = vreinterpretq_u16_u64(vzip1q_u64(a, b)), weights[p][1] = vreinterpretq_u16_u64(vzip2q_u64(a, b));
        }
        for (int h = 0; h < 2; h++)
            for (int u = 0; u < 2 * U; u++) {
                const uint16x8_t v = vld1q_u16(x + u / 2 * x_ld + (k + 4 * h) * W + u % 2 * 8);
                for (int p = 0; p < P; p++) acc[p][u] = product_bf16(acc[p][u], weights[p][h], v);
            }
    }
    for (int p = 0; p < P; p++)
        for (int u = 0; u < 2 * U; u++) {
            vst1_f32(out[p][0] + 2 * u, vget_low_f32(acc[p][u]));
            vst1_f32(out[p][1] + 2 * u, vget_high_f32(acc[p][u]));
        }
}

template <int P>
inline void pair_rows(const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles, int64_t columns,
                      float* sums, int64_t sums_ld, bool first) {
    if ((rows + 1) / 2 >= P) {
        if (tiles == 2) pair_product<P, 2>(panel, rows, x, x_ld, columns, sums, sums_ld, first);
        else pair_product<P, 1>(panel, rows, x, x_ld, columns, sums, sums_ld, first);
    } else if constexpr (P > 1) {
        pair_rows<P - 1>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
    }
}

inline void pairs_product(const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                          int64_t columns, float* sums, int64_t sums_ld, bool first) {
    constexpr int PAIRS = 4;
    for (int64_t t = 0; t < tiles; t += 2)
        for (int64_t r = 0; r < rows; r += 2 * PAIRS)
            pair_rows<PAIRS>(panel + r * CHUNK, rows - r, x + t * x_ld, x_ld, tiles - t > 1 ? 2 : 1, columns,
                             sums + r * sums_ld + t * W, sums_ld, first);
}

// What gemm.h calls: lanes are two rows of the weight and two of x here, not rows of x alone.
template <>
inline void panel_product<DotBF16<true>>(const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                                         int64_t columns, float* sums, int64_t sums_ld, bool first) {
    pairs_product(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}
template <>
inline void panel_product<DotBF16<false>>(const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                                          int64_t columns, float* sums, int64_t sums_ld, bool first) {
    pairs_product(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}
