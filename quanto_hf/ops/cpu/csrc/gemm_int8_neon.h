// Many rows of x for int8_neon.h: panels of the weight times tiles of x, as in gemm.h. Included inside the namespace
// of a level that has FEAT_DotProd.

// With sdot: a lane is a row of x, and its 4 bytes meet 4 bytes of the weight that all lanes share.
struct LanePanels {
    static void pack(const int8_t* const* rows, int64_t k, int8_t* out) {  // 16 columns of 4 rows
        F v[4];
        for (int i = 0; i < 4; i++) v[i] = vreinterpretq_f32_s8(vld1q_s8(rows[i] + k));
        transpose(v);
        for (int i = 0; i < 4; i++) vst1q_s8(out + (k + 4 * i) * W, vreinterpretq_s8_f32(v[i]));
    }

    template <int LANE>
    static I dot(I acc, int8x16_t x, int8x16_t weight) {
        __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(x), "w"(weight), "i"(LANE));
        return acc;
    }
    template <int LANE, int R, int U>
    static void dots(I (&acc)[R][U], const int8x16_t* weights, const int8_t* x, int64_t x_ld) {
        for (int u = 0; u < U; u++) {
            const int8x16_t v = vld1q_s8(x + u * x_ld + LANE * 4 * W);
            for (int r = 0; r < R; r++) acc[r][u] = dot<LANE>(acc[r][u], v, weights[r]);
        }
    }
    template <int R, int U>
    static void tile(const int8_t* panel, const int8_t* x, int64_t x_ld, int64_t columns, float* sums, int64_t ld, bool first) {
        I acc[R][U];
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++)
                acc[r][u] = first ? vdupq_n_s32(0) : vreinterpretq_s32_f32(load(sums + r * ld + u * W));
        for (int64_t k = 0; k < columns; k += 16) {
            int8x16_t weights[R];
            for (int r = 0; r < R; r++) weights[r] = vld1q_s8(panel + r * CHUNK + k);
            dots<0>(acc, weights, x + k * W, x_ld);
            dots<1>(acc, weights, x + k * W, x_ld);
            dots<2>(acc, weights, x + k * W, x_ld);
            dots<3>(acc, weights, x + k * W, x_ld);
        }
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) store(sums + r * ld + u * W, as_float(acc[r][u]));
    }
    template <int R>
    static void tile_rows(const int8_t* panel, int64_t rows, const int8_t* x, int64_t x_ld, int64_t tiles, int64_t columns,
                          float* sums, int64_t ld, bool first) {
        if (rows >= R) {
            if (tiles >= 2) tile<R, 2>(panel, x, x_ld, columns, sums, ld, first);
            else tile<R, 1>(panel, x, x_ld, columns, sums, ld, first);
        } else if constexpr (R > 1) {
            tile_rows<R - 1>(panel, rows, x, x_ld, tiles, columns, sums, ld, first);
        }
    }
    static void multiply(const int8_t* panel, int64_t rows, const int8_t* x, int64_t x_ld, int64_t tiles, int64_t columns,
                         float* sums, int64_t ld, bool first) {
        for (int64_t t = 0; t < tiles; t += 2)
            for (int64_t r = 0; r < rows; r += TILE_ROWS)
                tile_rows<TILE_ROWS>(panel + r * CHUNK, rows - r, x + t * x_ld, x_ld, tiles - t, columns, sums + r * ld + t * W,
                                     ld, first);
    }
};

// As gemm() in gemm.h, but the panel is the weight itself, and sums are int32 until they are put.
template <class Panels>
inline void gemm_int8(const Linear& a, const int8_t* x, int64_t ld, const float* x_scales) {
    const int64_t x_ld = ld * W, all_tiles = (a.m + W - 1) / W;
    int8_t* packed = static_cast<int8_t*>(scratch(2, all_tiles * x_ld));
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(all_tiles, 1, thread, of);
        for (int64_t t = part.begin; t < part.end; t++) {
            const int8_t* rows[W];  // behind the last row of x, that row again: nobody looks at the sums
            for (int i = 0; i < W; i++) rows[i] = x + (t * W + i < a.m ? t * W + i : a.m - 1) * ld;
            for (int64_t k = 0; k < ld; k += 16) Panels::pack(rows, k, packed + t * x_ld);
        }
    });
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        int8_t* panel = static_cast<int8_t*>(scratch(3, PANEL * CHUNK));
        for (int64_t m0 = 0; m0 < a.m; m0 += MAX_X) {
            const int64_t count = a.m - m0 < MAX_X ? a.m - m0 : MAX_X, tiles = (count + W - 1) / W;
            const int64_t sums_ld = (tiles + 1) * W;
            float* sums = static_cast<float*>(scratch(4, PANEL * sums_ld * sizeof(float)));
            for (int64_t row = part.begin; row < part.end; row += PANEL) {
                const int64_t rows = part.end - row < PANEL ? part.end - row : PANEL;
                for (int64_t k = 0; k < ld; k += CHUNK) {
                    const int64_t columns = ld - k < CHUNK ? ld - k : CHUNK;
                    const int64_t inside = a.w.k - k < columns ? a.w.k - k : columns;
                    for (int64_t r = 0; r < rows; r++) {
                        std::memcpy(panel + r * CHUNK, a.w.packed + (row + r) * a.w.k + k, inside);
                        std::memset(panel + r * CHUNK + inside, 0, columns - inside);
                    }
                    Panels::multiply(panel, rows, packed + m0 * ld + k * W, x_ld, tiles, columns, sums, sums_ld, k == 0);
                }
                float scales[PANEL];
                load_scales(a.w.scale, a.w.scale_type, row, row + rows, scales);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t t = 0; t < tiles; t++) {
                        float* at = sums + r * sums_ld + t * W;
                        const F v = mul(to_float(vreinterpretq_s32_f32(load(at))), splat(scales[r]));
                        store(at, mul(v, loadn(x_scales + m0 + t * W, count - t * W)));
                    }
                with_type(a.x_type, [&](auto type) {
                    put_panel<decltype(type)::type>(a, m0, count, row, rows, sums, sums_ld, false);
                });
            }
        }
    });
}
