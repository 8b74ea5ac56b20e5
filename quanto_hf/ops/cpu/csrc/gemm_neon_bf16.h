// Panels of bfloat16 for gemm.h, multiplied in pairs of rows (neon_pairs.h). Included inside the namespace of a level
// that has FEAT_BF16.

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

// What gemm.h calls: lanes are two rows of the weight and two of x here, not rows of x alone.
template <bool BLOCKS>
inline void multiply(DotBF16<BLOCKS>, const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                     int64_t columns, float* sums, int64_t sums_ld, bool first) {
    pairs_product<PairsBF16>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}
