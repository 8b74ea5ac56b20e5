// Few rows of x and a weight of additive codes: a chunk of a row is gathered from the codebooks into the first-level cache
// and multiplied with every row of x in float32. Included inside a level's namespace, behind gemv.h and aqlm_decode.h.

// The sum of the products, W sums side by side, in two vectors that hide the latency of the multiply-add.
inline F dot_floats(const float* a, const float* b, int64_t count) {
    F even = splat(0.0f), odd = splat(0.0f);
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        even = fma(load(a + i), load(b + i), even);
        odd = fma(load(a + i + W), load(b + i + W), odd);
    }
    for (; i < count; i += W) {
        const int64_t n = count - i < W ? count - i : W;
        even = fma(loadn(a + i, n), loadn(b + i, n), even);
    }
    return add(even, odd);
}

inline void aqlm_gemv(const Linear& a) {
    const float* x = x_as_float(a, 0);
    with_aqlm(*a.w.aqlm, [&](auto book, auto code) {
        parallel(a.threads, [&](int thread, int of) {
            const Range part = share(a.w.n, 32, thread, of);
            float* sums = static_cast<float*>(scratch(1, a.m * W * sizeof(float)));
            for (int64_t row = part.begin; row < part.end; row++) {
                for (int64_t m = 0; m < a.m; m++) store(sums + m * W, splat(0.0f));
                for_each_chunk<decltype(book)::type, decltype(code)>(
                    a.w, row, 0, a.w.k, [&](const float* values, int64_t column, int64_t count) {
                        for (int64_t m = 0; m < a.m; m++)
                            store(sums + m * W, add(load(sums + m * W), dot_floats(values, x + m * a.w.k + column, count)));
                    });
                for (int64_t m = 0; m < a.m; m++) put(a, m, row, sum(load(sums + m * W)));
            }
        });
    });
}
