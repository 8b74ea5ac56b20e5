// Products of panels with tiles of x for gemm.h and gemm_int8_neon.h: bfmmla and smmla multiply two rows of the
// weight with two rows of x, 8 bytes of each. Included inside the namespace of a level that has FEAT_BF16 and
// FEAT_I8MM.
//
//   x tiles   [tile of 4 rows of x][columns / (numbers in 8 bytes)][4 rows][8 bytes]

// lane 2i + j += (8 bytes i of a) . (8 bytes j of b). Assembly: see neon_bf16_blocks.h.
struct PairsBF16 {
    using Number = uint16_t;
    static F dot(F acc, uint8x16_t a, uint8x16_t b) {
        __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
        return acc;
    }
};
struct PairsInt8 {  // the lanes of F hold int32
    using Number = int8_t;
    static F dot(F acc, uint8x16_t a, uint8x16_t b) {
        __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
        return acc;
    }
};

// sums[r][m] of up to 2 * P rows of the weight and U tiles of x; P * 2 * U sums of four stay in registers.
template <class Pairs, int P, int U>
inline void pair_product(const typename Pairs::Number* panel, int64_t rows, const typename Pairs::Number* x, int64_t x_ld,
                         int64_t columns, float* sums, int64_t sums_ld, bool first) {
    using Number = typename Pairs::Number;
    constexpr int HALF = 8 / sizeof(Number);
    const auto bytes = [](const Number* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); };
    const Number* row[P][2];
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
    for (int64_t k = 0; k < columns; k += 2 * HALF) {
        uint8x16_t weights[P][2];
        for (int p = 0; p < P; p++) {
            const uint64x2_t a = vreinterpretq_u64_u8(bytes(row[p][0] + k)), b = vreinterpretq_u64_u8(bytes(row[p][1] + k));
            weights[p][0] = vreinterpretq_u8_u64(vzip1q_u64(a, b)), weights[p][1] = vreinterpretq_u8_u64(vzip2q_u64(a, b));
        }
        for (int h = 0; h < 2; h++)
            for (int u = 0; u < 2 * U; u++) {
                const uint8x16_t v = bytes(x + u / 2 * x_ld + (k + h * HALF) * W + u % 2 * 2 * HALF);
                for (int p = 0; p < P; p++) acc[p][u] = Pairs::dot(acc[p][u], weights[p][h], v);
            }
    }
    for (int p = 0; p < P; p++)
        for (int u = 0; u < 2 * U; u++) {
            vst1_f32(out[p][0] + 2 * u, vget_low_f32(acc[p][u]));
            vst1_f32(out[p][1] + 2 * u, vget_high_f32(acc[p][u]));
        }
}

template <class Pairs, int P>
inline void pair_rows(const typename Pairs::Number* panel, int64_t rows, const typename Pairs::Number* x, int64_t x_ld,
                      int64_t tiles, int64_t columns, float* sums, int64_t sums_ld, bool first) {
    if ((rows + 1) / 2 >= P) {
        if (tiles == 2) pair_product<Pairs, P, 2>(panel, rows, x, x_ld, columns, sums, sums_ld, first);
        else pair_product<Pairs, P, 1>(panel, rows, x, x_ld, columns, sums, sums_ld, first);
    } else if constexpr (P > 1) {
        pair_rows<Pairs, P - 1>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
    }
}

template <class Pairs>
inline void pairs_product(const typename Pairs::Number* panel, int64_t rows, const typename Pairs::Number* x, int64_t x_ld,
                          int64_t tiles, int64_t columns, float* sums, int64_t sums_ld, bool first) {
    constexpr int PAIRS = 4;
    for (int64_t t = 0; t < tiles; t += 2)
        for (int64_t r = 0; r < rows; r += 2 * PAIRS)
            pair_rows<Pairs, PAIRS>(panel + r * CHUNK, rows - r, x + t * x_ld, x_ld, tiles - t > 1 ? 2 : 1, columns,
                                    sums + r * sums_ld + t * W, sums_ld, first);
}

// Many rows of int8 x with smmla, for gemm_int8_neon.h.
struct PairPanels {
    static void pack(const int8_t* const* rows, int64_t k, int8_t* out) {  // 16 columns of 4 rows
        uint64x2_t v[4];
        for (int i = 0; i < 4; i++) v[i] = vreinterpretq_u64_s8(vld1q_s8(rows[i] + k));
        for (int i = 0; i < 2; i++) {
            vst1q_s8(out + k * W + i * 16, vreinterpretq_s8_u64(vzip1q_u64(v[2 * i], v[2 * i + 1])));
            vst1q_s8(out + (k + 8) * W + i * 16, vreinterpretq_s8_u64(vzip2q_u64(v[2 * i], v[2 * i + 1])));
        }
    }
    static void multiply(const int8_t* panel, int64_t rows, const int8_t* x, int64_t x_ld, int64_t tiles, int64_t columns,
                         float* sums, int64_t sums_ld, bool first) {
        pairs_product<PairsInt8>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
    }
};
