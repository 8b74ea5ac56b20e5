// int8 weights times int8 activations, on request: each row of x is rounded to 255 levels of its own (dynamic, symmetric),
// or all rows to those of a given scale, and the product is exact in int32. Included inside the namespace of a level that has AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned with signed bytes, so x is stored as q + 128 and 128 * (sum of the row of the weight) is
// taken off again. Sums stay below 2^31 up to MAX_INT8_COLUMNS columns.

constexpr int64_t MAX_INT8_COLUMNS = 65536;

// Rounds a row of x: q + 128 to out (zeros, that is 128, up to `padded`), the scale is returned: the `given` one, or that
// of the row. It is NaN for a row with NaN, or with infinity where no scale is given; else infinity is cut to 127.
template <int TYPE>
inline float quantize_row(const void* x, int64_t from, int64_t k, int64_t padded, const float* given, uint8_t* out) {
    F most = splat(0.0f), poison = splat(0.0f);
    for (int64_t i = 0; i < k && !given; i += W) most = _mm512_max_ps(most, _mm512_abs_ps(loadn_as<TYPE>(x, from + i, k - i)));
    const float scale = usable_scale(given ? *given : _mm512_reduce_max_ps(most) / 127.0f);
    for (int64_t i = 0; i < k; i += W) {
        // min and max give their second operand if one is NaN
        const F v = max(splat(-127.0f), min(splat(127.0f), _mm512_div_ps(loadn_as<TYPE>(x, from + i, k - i), splat(scale))));
        poison = fma(v, splat(0.0f), poison);  // NaN for x that is NaN, and for infinity over infinity
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128))));
    }
    std::memset(out + k, 128, padded - k);
    const float check = sum(poison);
    return check != 0.0f ? check : scale;
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

// Writes the sums of R rows of the weight with M rows of x to `sums`. Scales come later, those of the weight first: times
// a large scale of x alone, a sum could leave float32.
template <int M, int R>
inline void byte_sums(const Weight& w, int64_t row, const uint8_t* x, int64_t ld, float* sums) {
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
            sums[r * M + m] = static_cast<float>(total(acc[r][m]) - total(all[r]));
}

template <int M>
inline void gemv_int8_rows(const Linear& a, const uint8_t* x, int64_t ld, const float* x_scales, Range part) {
    constexpr int R = M <= 4 ? 4 : 2, ROWS = 16;
    float sums[ROWS * M];
    for (int64_t row = part.begin; row < part.end; row += ROWS) {
        const int n = static_cast<int>(part.end - row < ROWS ? part.end - row : ROWS);
        int r = 0;
        for (; r + R <= n; r += R) byte_sums<M, R>(a.w, row + r, x, ld, sums + r * M);
        for (; r < n; r++) byte_sums<M, 1>(a.w, row + r, x, ld, sums + r * M);
        float scales[W] = {};
        load_scales(a.w.scale, a.w.scale_type, row, row + n, scales);
        for (int m = 0; m < M; m++) {
            float column[W] = {};
            for (r = 0; r < n; r++) column[r] = sums[r * M + m];
            with_type(a.x_type, [&](auto type) {
                put_vector<decltype(type)::type>(a, m, row, n, mul(mul(load(column), load(scales)), splat(x_scales[m])), false);
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
