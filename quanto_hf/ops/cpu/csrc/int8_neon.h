// int8 weights times int8 activations, as int8.h has them on x86: each row of x is rounded to 255 levels
// of its own, and the product is exact in int32. Included inside the namespace of a level that has FEAT_DotProd.
//
// sdot multiplies signed with signed bytes, so x is stored as it is. Sums stay below 2^31 up to 65536 columns. They are
// multiplied with the scale of the weight first: times a large scale of x alone, a sum could leave float32.

inline I dot_bytes(I acc, int8x16_t a, int8x16_t b) {  // lane i += the 4 bytes i of a . those of b
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
}

// 16 numbers divided by `step`, to the nearest integer of -127 to 127. Columns from n on count as zeros.
template <int TYPE>
inline int8x16_t round_bytes(const void* x, int64_t at, int64_t n, F step, F& poison) {
    int16x4_t q[4];
    for (int i = 0; i < 4; i++) {
        const int64_t left = n - i * W;
        const F v = max(splat(-127.0f), min(splat(127.0f), div(loadn_as<TYPE>(x, at + i * W, left > 0 ? left : 0), step)));
        poison = fma(v, splat(0.0f), poison);  // NaN for x that is NaN, and for infinity over infinity
        q[i] = vqmovn_s32(to_int(v));
    }
    return vcombine_s8(vqmovn_s16(vcombine_s16(q[0], q[1])), vqmovn_s16(vcombine_s16(q[2], q[3])));
}

// Rounds a row of x to out, in whole vectors of 16; the scale is returned, as in int8.h.
template <int TYPE>
inline float round_row(const void* x, int64_t from, int64_t k, const float* given, int8_t* out) {
    F most = splat(0.0f), poison = splat(0.0f);
    for (int64_t i = 0; i < k && !given; i += W) most = max(most, masked(loadn_as<TYPE>(x, from + i, k - i), 0x7FFFFFFF));
    const float scale = usable_scale(given ? *given : vmaxvq_f32(most) / 127.0f);
    for (int64_t i = 0; i < k; i += 16) vst1q_s8(out + i, round_bytes<TYPE>(x, from + i, k - i, splat(scale), poison));
    const float check = sum(poison);
    return check != 0.0f ? check : scale;
}

// The products of R rows of the weight with M rows of x.
template <int M, int R>
inline void few_rows(const Linear& a, const int8_t* x, int64_t ld, const float* x_scales, int64_t row) {
    constexpr int SUMS = M == 1 ? 2 : 1;  // side by side, to hide the latency of sdot
    const Weight& w = a.w;
    const int8_t* packed = reinterpret_cast<const int8_t*>(w.packed) + row * w.k;
    I acc[R][M][SUMS];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++)
            for (int s = 0; s < SUMS; s++) acc[r][m][s] = vdupq_n_s32(0);
    const auto step = [&](const int8x16_t* weights, int64_t i, int s) {
        for (int m = 0; m < M; m++) {
            const int8x16_t v = vld1q_s8(x + m * ld + i);
            for (int r = 0; r < R; r++) acc[r][m][s] = dot_bytes(acc[r][m][s], v, weights[r]);
        }
    };
    int8x16_t weights[R];
    int64_t i = 0;
    for (; i + 16 * SUMS <= w.k; i += 16 * SUMS)
        for (int s = 0; s < SUMS; s++) {
            for (int r = 0; r < R; r++) weights[r] = vld1q_s8(packed + r * w.k + i + 16 * s);
            step(weights, i + 16 * s, s);
        }
    for (; i < w.k; i += 16) {
        for (int r = 0; r < R; r++) {
            int8_t rest[16] = {};
            std::memcpy(rest, packed + r * w.k + i, w.k - i < 16 ? w.k - i : 16);
            weights[r] = vld1q_s8(rest);
        }
        step(weights, i, 0);
    }
    for (int r = 0; r < R; r++) {
        const float scale = half_value(w.scale, row + r, w.scale_type);
        for (int m = 0; m < M; m++) {
            const int32_t total = vaddvq_s32(acc[r][m][0]) + (SUMS == 2 ? vaddvq_s32(acc[r][m][SUMS - 1]) : 0);
            put(a, m, row + r, static_cast<float>(total) * scale * x_scales[m]);
        }
    }
}
