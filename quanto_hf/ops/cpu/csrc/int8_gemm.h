// Many rows of x in int8, and which kernel of int8.h serves a call. Included after int8.h, and after gemm_amx.h where there
// are tiles: what is not a template sees only the products that stand before it.

// As gemm() in gemm.h, but the panel is the weight itself and sums become numbers before they are put.
inline void gemm_int8(const Linear& a, const uint8_t* x, int64_t ld, const float* x_scales) {
    const int64_t x_ld = ld * W, all_tiles = (a.m + W - 1) / W;
    uint8_t* packed = static_cast<uint8_t*>(scratch(2, all_tiles * x_ld));
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(all_tiles, 1, thread, of);
        for (int64_t t = part.begin; t < part.end; t++)
            for (int64_t k = 0; k < ld; k += 64) {  // 16 rows of 16 dwords
                F v[W];
                for (int i = 0; i < W; i++)
                    v[i] = t * W + i < a.m ? load(reinterpret_cast<const float*>(x + (t * W + i) * ld + k)) : splat(0.0f);
                transpose(v);
                for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(packed + t * x_ld + (k / 4 + i) * 4 * W), v[i]);
            }
    });
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        for (int64_t m0 = 0; m0 < a.m; m0 += MAX_X) {
            const int64_t count = a.m - m0 < MAX_X ? a.m - m0 : MAX_X, tiles = (count + W - 1) / W, sums_ld = (tiles + 1) * W;
            uint8_t* panel = static_cast<uint8_t*>(scratch(3, PANEL * CHUNK));
            float* sums = static_cast<float*>(scratch(4, PANEL * sums_ld * sizeof(float)));
            for (int64_t row = part.begin; row < part.end; row += PANEL) {
                const int64_t rows = part.end - row < PANEL ? part.end - row : PANEL;
                int32_t totals[PANEL] = {};
                for (int64_t k = 0; k < ld; k += CHUNK) {
                    const int64_t columns = ld - k < CHUNK ? ld - k : CHUNK, inside = a.w.k - k < columns ? a.w.k - k : columns;
                    for (int64_t r = 0; r < rows; r++) {
                        uint8_t* out = panel + r * CHUNK;
                        std::memcpy(out, a.w.packed + (row + r) * a.w.k + k, inside);
                        std::memset(out + inside, 0, columns - inside);
                        Ints row_total = no_sum();
                        for (int64_t i = 0; i < columns; i += 64)
                            row_total = dot_bytes(row_total, _mm512_set1_epi8(1), _mm512_loadu_si512(out + i));
                        totals[r] += total(row_total);
                    }
                    multiply(DotInt8{}, panel, rows, packed + m0 / W * x_ld + k * W, x_ld, tiles, columns, sums, sums_ld, k == 0);
                }
                float scales[PANEL];
                load_scales(a.w.scale, a.w.scale_type, row, row + rows, scales);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t t = 0; t < tiles; t++) {
                        float* at = sums + r * sums_ld + t * W;
                        const I v = _mm512_sub_epi32((__m512i)DotInt8::read(at), _mm512_set1_epi32(128 * totals[r]));
                        store(at, mul(mul(to_float(v), splat(scales[r])), loadn(x_scales + m0 + t * W, count - t * W)));
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
    const int64_t ld = round_up(a.w.k, 64) + (a.m <= GEMV_ROWS ? 64 : 0);  // a few rows must not share their cache sets
    uint8_t* x = static_cast<uint8_t*>(scratch(0, a.m * ld));
    float* x_scales = static_cast<float*>(scratch(1, a.m * sizeof(float)));
    parallel(a.m > GEMV_ROWS ? a.threads : 1, [&](int thread, int of) {
        const Range part = share(a.m, 1, thread, of);
        for (int64_t m = part.begin; m < part.end; m++)
            with_type(a.x_type, [&](auto type) {
                x_scales[m] = quantize_row<decltype(type)::type>(a.x, m * a.w.k, a.w.k, ld, a.x_scale, x + m * ld);
            });
    });
    if (a.m > GEMV_ROWS) return gemm_int8(a, x, ld, x_scales);
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        with_rows(a.m, [&](auto count) { gemv_int8_rows<decltype(count)::slot>(a, x, ld, x_scales, part); });
    });
}
