// int8 weights times int8 activations without VNNI: both are widened to 16 bits, where vpmaddwd adds pairs of products
// exactly. (vpmaddubsw on the bytes themselves would saturate.) Each row of x has a scale. Included inside the namespace of
// a level for x86.
//
// 4096 x 4096, in times the speed of the exact kernel: AVX2 1.5 at one row, 2.5 at 8, 0.96 at 128 (int8_wide_gemm.h);
// AVX-512 2.1, 3.2 and 1.4.

// Rounds a row of x as int8.h does; zeros up to `ld`.
template <int TYPE>
inline float round_token(const void* x, int64_t from, int64_t k, int64_t ld, const float* given, int16_t* out) {
    F most = splat(0.0f), poison = splat(0.0f);
    for (int64_t i = 0; i < k && !given; i += W) most = max(most, masked(loadn_as<TYPE>(x, from + i, k - i < W ? k - i : W), 0x7FFFFFFF));
    const float scale = usable_scale(given ? *given : largest(most) / 127.0f);
    for (int64_t i = 0; i < ld; i += W) {
        const int64_t left = k - i;
        const F v = loadn_as<TYPE>(x, left > 0 ? from + i : from, left < 0 ? 0 : left < W ? left : W);
        // min and max give their second operand if one is NaN
        const F number = max(splat(-127.0f), min(splat(127.0f), div(v, splat(scale))));
        poison = fma(number, splat(0.0f), poison);
        int32_t lanes[W];
        store_words(reinterpret_cast<uint8_t*>(lanes), to_int(number));
        for (int j = 0; j < W; j++) out[i + j] = static_cast<int16_t>(lanes[j]);
    }
    const float check = sum(poison);
    return check != 0.0f ? check : scale;
}

template <int M, int R>
inline void wide_sums(const Weight& w, int64_t row, const int16_t* x, int64_t ld, float* sums) {
    I acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = same_words(0);
    const uint8_t* packed = w.packed + row * w.k;
    Ahead ahead(w.packed, w.k, row + R, 0, (w.k + 63) / 64);
    for (int64_t i = 0; i < w.k; i += 2 * W) {
        I codes[R];
        for (int r = 0; r < R; r++) {
            uint8_t end[2 * W] = {};
            const uint8_t* at = packed + r * w.k + i;
            if (w.k - i < 2 * W) std::memcpy(end, at, w.k - i), at = end;
            codes[r] = widen_bytes(at);
            if (i % 64 == 0) ahead.step();
        }
        for (int m = 0; m < M; m++) {
            const I v = load_words(reinterpret_cast<const uint8_t*>(x + m * ld + i));
            for (int r = 0; r < R; r++) acc[r][m] = add_words(acc[r][m], multiply_pairs(codes[r], v));
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            int32_t lanes[W], total = 0;
            store_words(reinterpret_cast<uint8_t*>(lanes), acc[r][m]);
            for (int i = 0; i < W; i++) total += lanes[i];
            sums[r * M + m] = static_cast<float>(total);
        }
}

template <int M>
inline void gemv_wide(const Linear& a, const int16_t* x, int64_t ld, const float* x_scales, int64_t m0, Range part) {
    constexpr int R = M == 1 ? 4 : 2;
    for (int64_t row = part.begin; row < part.end; row += W) {
        const int n = static_cast<int>(part.end - row < W ? part.end - row : W);
        float sums[W * M], scales[W] = {};
        int r = 0;
        for (; r + R <= n; r += R) wide_sums<M, R>(a.w, row + r, x + m0 * ld, ld, sums + r * M);
        for (; r < n; r++) wide_sums<M, 1>(a.w, row + r, x + m0 * ld, ld, sums + r * M);
        load_scales(a.w.scale, a.w.scale_type, row, row + n, scales);
        for (int m = 0; m < M; m++) {
            float column[W] = {};
            for (r = 0; r < n; r++) column[r] = sums[r * M + m];
            with_type(a.x_type, [&](auto type) {
                put_vector<decltype(type)::type>(a, m0 + m, row, n, mul(mul(load(column), load(scales)), splat(x_scales[m0 + m])), false);
            });
        }
    }
}
