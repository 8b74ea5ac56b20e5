// Pairs of bfloat16 for gemm.h. Included inside the namespace of a level that has AVX-512 BF16 and VBMI.

// 32 columns of W rows of x, pairs side by side: a transpose of 16 x 16 dwords.
inline void pack_pairs(const uint16_t* const* rows, int64_t column, uint16_t* out) {
    F v[W];
    for (int i = 0; i < W; i++) v[i] = rows[i] ? load(reinterpret_cast<const float*>(rows[i] + column)) : splat(0.0f);
    transpose(v);
    for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(out + (column / 2 + i) * 2 * W), v[i]);
}

// BLOCKS: the weight goes through bf16_blocks.h, and x has the order of the blocks. Else any weight, natural order.
template <bool BLOCKS>
struct DotBF16 : FloatSums {
    using Number = uint16_t;
    static constexpr int STEP = 2;
    static F dot(F acc, const uint16_t* weight, const uint16_t* x) {
        int32_t pair;
        std::memcpy(&pair, weight, 4);
        return dot_bf16(acc, _mm512_set1_epi32(pair), _mm512_loadu_si512(x));
    }
    static bool late(const Weight& w) { return BLOCKS && bits_of(w.codes) == 8; }
    static int64_t padded(const Weight& w) { return round_up(w.k, 64); }

    static void pack(const Linear& a, int64_t m0, int64_t count, uint16_t* out) {
        const int64_t padded = DotBF16::padded(a.w);
        uint16_t* ordered = static_cast<uint16_t*>(scratch(3, W * padded * 2));
        const uint16_t* rows[W];
        for (int i = 0; i < W; i++) {
            rows[i] = i < count ? ordered + i * padded : nullptr;
            if (i >= count) continue;
            const uint16_t* x = static_cast<const uint16_t*>(a.x) + (m0 + i) * a.w.k;
            if (BLOCKS) {
                order_row(a.w, x, padded, ordered + i * padded);
            } else {
                std::memcpy(ordered + i * padded, x, a.w.k * 2);
                std::memset(ordered + i * padded + a.w.k, 0, (padded - a.w.k) * 2);
            }
        }
        for (int64_t k = 0; k < padded; k += 32) pack_pairs(rows, k, out);
    }

    struct Tables {
        ByteTable bytes;
        explicit Tables(const Weight& w) {
            with_codes(w.codes, [&](auto tag) {
                constexpr int C = decltype(tag)::codes;
                if constexpr (BLOCKS && bits_of(C) == 8) bytes = byte_table<C>();
            });
        }
    };

    template <int C, int R>
    static void panel_blocks(const Weight& w, const Tables& tables, int64_t row, int64_t from, int64_t to, uint16_t* out) {
        constexpr int64_t BLOCK = BLOCK_BYTES * (8 / bits_of(C));
        blocks<C, R>(w, tables.bytes, row, from / BLOCK, to / BLOCK, [&](int64_t column, const __m512i* weights) {
            for (int r = 0; r < R; r++) _mm512_store_si512(out + r * CHUNK + column - from, weights[r]);
        });
    }

    static void panel(const Weight& w, const Tables& tables, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* out) {
        with_codes(w.codes, [&](auto tag) {
            constexpr int C = decltype(tag)::codes;
            int64_t done = from, r = 0;
            if (BLOCKS) {
                done = block_columns(w) < to ? block_columns(w) : to;
                if (done < from) done = from;
                for (; r + 4 <= rows; r += 4) panel_blocks<C, 4>(w, tables, row + r, from, done, out + r * CHUNK);
                for (; r < rows; r++) panel_blocks<C, 1>(w, tables, row + r, from, done, out + r * CHUNK);
            }
            const int64_t end = w.k < to ? w.k : to;
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
