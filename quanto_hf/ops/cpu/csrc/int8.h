// int8 weights times int8 activations, on request: each row of x is rounded to 255 levels of its own (dynamic, symmetric)
// and the product is exact in int32. Included inside the namespace of a level that has AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned with signed bytes, so x is stored as q + 128 and 128 * (sum of the row of the weight) is
// taken off again. Sums stay below 2^31 up to MAX_INT8_COLUMNS columns.

constexpr int64_t MAX_INT8_COLUMNS = 65536;

// Rounds a row of x: q + 128 to out (zeros, that is 128, up to `padded`), the scale is returned. A row with NaN or
// infinity has the scale NaN.
template <int TYPE>
inline float quantize_row(const void* x, int64_t from, int64_t k, int64_t padded, uint8_t* out) {
    F most = splat(0.0f), poison = splat(0.0f);
    for (int64_t i = 0; i < k; i += W) {
        const F v = loadn_as<TYPE>(x, from + i, k - i);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        poison = fma(v, splat(0.0f), poison);  // NaN if v is not finite
    }
    const float largest = _mm512_reduce_max_ps(most), check = sum(poison);
    const float scale = check != 0.0f ? check : largest == 0.0f ? 1.0f : largest / 127.0f;
    for (int64_t i = 0; i < k; i += W) {
        const F v = _mm512_div_ps(loadn_as<TYPE>(x, from + i, k - i), splat(scale));
        const I q = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
    }
    std::memset(out + k, 128, padded - k);
    return scale;
}

// GCC keeps a vector of int in place only under its own name; as __m512i it copies all sums at each step, and spills.
#if defined(__GNUC__)
typedef int Ints __attribute__((vector_size(64), may_alias));
#else
using Ints = __m512i;
#endif

inline Ints dot_bytes(Ints acc, __m512i x, __m512i weight) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, x, weight);
}
inline Ints no_sum() { return (Ints)_mm512_setzero_si512(); }
inline int32_t total(Ints v) { return _mm512_reduce_add_epi32((__m512i)v); }

// Writes the sums of R rows of the weight with M rows of x, as numbers, to `sums`.
template <int M, int R>
inline void byte_sums(const Weight& w, int64_t row, const uint8_t* x, int64_t ld, const float* x_scales, float* sums) {
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(128));
    Ints acc[R][M], all[R];
    for (int r = 0; r < R; r++) {
        all[r] = no_sum();
        for (int m = 0; m < M; m++) acc[r][m] = no_sum();
    }
    const uint8_t* packed = w.packed + row * w.k;
    Ahead ahead(w.packed, w.k, row + R, 0, (w.k + 63) / 64);
    for (int64_t i = 0; i < w.k; i += 64) {
        const __mmask64 mask = w.k - i >= 64 ? ~0ull : (1ull << (w.k - i)) - 1;
        __m512i weights[R];
        for (int r = 0; r < R; r++) {
            weights[r] = _mm512_maskz_loadu_epi8(mask, packed + r * w.k + i);
            all[r] = dot_bytes(all[r], bias, weights[r]);
            ahead.step();
        }
        for (int m = 0; m < M; m++) {
            const __m512i v = _mm512_loadu_si512(x + m * ld + i);
            for (int r = 0; r < R; r++) acc[r][m] = dot_bytes(acc[r][m], v, weights[r]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++)
            sums[r * M + m] = static_cast<float>(total(acc[r][m]) - total(all[r])) * x_scales[m];
}

template <int M>
inline void gemv_int8_rows(const Linear& a, const uint8_t* x, int64_t ld, const float* x_scales, int64_t m0, Range part) {
    constexpr int R = M <= 4 ? 4 : 2, ROWS = 16;
    float sums[ROWS * M];
    for (int64_t row = part.begin; row < part.end; row += ROWS) {
        const int n = static_cast<int>(part.end - row < ROWS ? part.end - row : ROWS);
        int r = 0;
        for (; r + R <= n; r += R) byte_sums<M, R>(a.w, row + r, x, ld, x_scales, sums + r * M);
        for (; r < n; r++) byte_sums<M, 1>(a.w, row + r, x, ld, x_scales, sums + r * M);
        for (int m = 0; m < M; m++) {
            float column[W] = {};
            for (r = 0; r < n; r++) column[r] = sums[r * M + m];
            with_type(a.x_type, [&](auto type) {
                put_vector<decltype(type)::type>(a, m0 + m, row, n, load(column), true);
            });
        }
    }
}

// The product for gemm.h, with sums in int32 (which take the place of the float ones in memory).
struct DotInt8 {
    using Sum = Ints;
    static Ints none() { return no_sum(); }
    static Ints read(const float* p) { return (Ints)_mm512_loadu_si512(p); }
    static void write(float* p, Ints v) { _mm512_storeu_si512(p, (__m512i)v); }
    using Number = uint8_t;
    static constexpr int STEP = 4;
    static Ints dot(Ints acc, const uint8_t* weight, const uint8_t* x) {
        int32_t four;
        std::memcpy(&four, weight, 4);
        return dot_bytes(acc, _mm512_loadu_si512(x), _mm512_set1_epi32(four));
    }
};

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
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t t = 0; t < tiles; t++) {
                        float* at = sums + r * sums_ld + t * W;
                        const I v = _mm512_sub_epi32((__m512i)DotInt8::read(at), _mm512_set1_epi32(128 * totals[r]));
                        store(at, mul(to_float(v), loadn(x_scales + m0 + t * W, count - t * W)));
                    }
                with_type(a.x_type, [&](auto type) {
                    put_panel<decltype(type)::type>(a, m0, count, row, rows, sums, sums_ld, true);
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
                x_scales[m] = quantize_row<decltype(type)::type>(a.x, m * a.w.k, a.w.k, ld, x + m * ld);
            });
    });
    if (a.m > GEMV_ROWS) return gemm_int8(a, x, ld, x_scales);
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        const auto run = [&](auto count, int64_t m) {
            gemv_int8_rows<decltype(count)::slot>(a, x + m * ld, ld, x_scales + m, m, part);
        };
        switch (a.m) {
            case 1: return run(Slot<1>{}, 0);
            case 2: return run(Slot<2>{}, 0);
            case 3: return run(Slot<3>{}, 0);
            case 4: return run(Slot<4>{}, 0);
            case 5: return run(Slot<5>{}, 0);
            case 6: return run(Slot<6>{}, 0);
            case 7: return run(Slot<7>{}, 0);
            default: return run(Slot<8>{}, 0);
        }
    });
}
