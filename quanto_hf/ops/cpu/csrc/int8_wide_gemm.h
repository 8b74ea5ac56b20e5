// Many rows of x in int8 without VNNI, and which kernel of int8_wide.h serves a call. Included after it.

// The product for gemm.h: pairs of 16-bit numbers, sums in int32.
struct DotWide {
    using Sum = I;
    static I none() { return same_words(0); }
    static I read(const float* p) { return load_words(reinterpret_cast<const uint8_t*>(p)); }
    static void write(float* p, I v) { store_words(reinterpret_cast<uint8_t*>(p), v); }
    using Number = int16_t;
    static constexpr int STEP = 2;
    static I dot(I acc, const int16_t* weight, const int16_t* x) {
        int32_t pair;
        std::memcpy(&pair, weight, 4);
        return add_words(acc, multiply_pairs(same_words(pair), load_words(reinterpret_cast<const uint8_t*>(x))));
    }
};

inline void gemm_wide(const Linear& a, const int16_t* x, int64_t ld, const float* x_scales) {
    const int64_t x_ld = ld * W, all_tiles = (a.m + W - 1) / W;
    int16_t* tiled = static_cast<int16_t*>(scratch(2, all_tiles * x_ld * sizeof(int16_t)));
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(all_tiles, 1, thread, of);
        for (int64_t t = part.begin; t < part.end; t++)
            for (int64_t k = 0; k < ld; k += 2 * W) {
                F v[W];
                for (int i = 0; i < W; i++)
                    v[i] = t * W + i < a.m ? load(reinterpret_cast<const float*>(x + (t * W + i) * ld + k)) : splat(0.0f);
                transpose(v);
                for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(tiled + t * x_ld + (k / 2 + i) * 2 * W), v[i]);
            }
    });
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        for (int64_t m0 = 0; m0 < a.m; m0 += MAX_X) {
            const int64_t count = a.m - m0 < MAX_X ? a.m - m0 : MAX_X, tiles = (count + W - 1) / W, sums_ld = (tiles + 1) * W;
            int16_t* panel = static_cast<int16_t*>(scratch(3, PANEL * CHUNK * sizeof(int16_t)));
            float* sums = static_cast<float*>(scratch(4, PANEL * sums_ld * sizeof(float)));
            for (int64_t row = part.begin; row < part.end; row += PANEL) {
                const int64_t rows = part.end - row < PANEL ? part.end - row : PANEL;
                for (int64_t k = 0; k < ld; k += CHUNK) {
                    const int64_t columns = ld - k < CHUNK ? ld - k : CHUNK, inside = a.w.k - k < columns ? a.w.k - k : columns;
                    for (int64_t r = 0; r < rows; r++) {
                        const int8_t* from = reinterpret_cast<const int8_t*>(a.w.packed) + (row + r) * a.w.k + k;
                        for (int64_t i = 0; i < inside; i++) panel[r * CHUNK + i] = from[i];
                        for (int64_t i = inside; i < columns; i++) panel[r * CHUNK + i] = 0;
                    }
                    multiply(DotWide{}, panel, rows, tiled + m0 / W * x_ld + k * W, x_ld, tiles, columns, sums, sums_ld, k == 0);
                }
                float scales[PANEL];
                load_scales(a.w.scale, a.w.scale_type, row, row + rows, scales);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t t = 0; t < tiles; t++) {
                        float* at = sums + r * sums_ld + t * W;
                        const int64_t n = count - t * W < W ? count - t * W : W;
                        store(at, mul(mul(to_float(DotWide::read(at)), splat(scales[r])), loadn(x_scales + m0 + t * W, n)));
                    }
                with_type(a.x_type, [&](auto type) {
                    put_panel<decltype(type)::type>(a, m0, count, row, rows, sums, sums_ld, false);
                });
            }
        }
    });
}

inline void linear_int8(const Linear& a) {
    if (a.m == 0) return;
    const int64_t ld = round_up(a.w.k, 2 * W) + (a.m <= GEMV_ROWS ? 2 * W : 0);  // a few rows must not share their cache sets
    int16_t* x = static_cast<int16_t*>(scratch(0, a.m * ld * sizeof(int16_t)));
    float* x_scales = static_cast<float*>(scratch(1, a.m * sizeof(float)));
    parallel(a.m > GEMV_ROWS ? a.threads : 1, [&](int thread, int of) {
        const Range part = share(a.m, 1, thread, of);
        for (int64_t m = part.begin; m < part.end; m++)
            with_type(a.x_type, [&](auto type) {
                x_scales[m] = round_token<decltype(type)::type>(a.x, m * a.w.k, a.w.k, ld, a.x_scale, x + m * ld);
            });
    });
    if (a.m > GEMV_ROWS) return gemm_wide(a, x, ld, x_scales);
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4) gemv_wide<4>(a, x, ld, x_scales, m, part);
        for (; m + 2 <= a.m; m += 2) gemv_wide<2>(a, x, ld, x_scales, m, part);
        if (m < a.m) gemv_wide<1>(a, x, ld, x_scales, m, part);
    });
}
