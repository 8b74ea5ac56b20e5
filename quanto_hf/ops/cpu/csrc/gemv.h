// Few rows of x and any weight: a row of the weight is dequantized in registers, a vector at a time, and multiplied with
// every row of x in float32. Included inside a level's namespace.

// Writes `value + bias` to out[m][row].
inline void put(const Linear& a, int64_t m, int64_t row, float value) {
    if (a.bias) value += half_value(a.bias, row, a.x_type);
    const F v = splat(value);
    if (a.x_type == F32) storen_as<F32>(a.out, m * a.w.n + row, v, 1);
    else if (a.x_type == BF16) storen_as<BF16>(a.out, m * a.w.n + row, v, 1);
    else storen_as<F16>(a.out, m * a.w.n + row, v, 1);
}

// acc[slot * M + m] += the products of the columns [from, to) of a row of the weight with x[m]; x is float32.
template <int CODES, int M>
inline void dot_columns(const Weight& w, int64_t row, int64_t from, int64_t to, const float* x, int64_t ld, F* acc) {
    for_each_weight<CODES>(w, row, from, to, [&](F v, int64_t column, int n, auto slot) {
        F* sums = acc + decltype(slot)::slot * M;
        if (n == W) {
            for (int m = 0; m < M; m++) sums[m] = fma(v, load(x + m * ld + column), sums[m]);
        } else {
            // beyond n lie other weights, and 0 * NaN is not 0: both factors are cut off
            float lanes[W];
            store(lanes, v);
            const F cut = loadn(lanes, n);
            for (int m = 0; m < M; m++) sums[m] = fma(cut, loadn(x + m * ld + column, n), sums[m]);
        }
    });
}

template <int CODES, int M>
inline void gemv_rows(const Linear& a, const float* x, int64_t m0, Range part) {
    for (int64_t row = part.begin; row < part.end; row++) {
        F acc[2 * M];
        for (F& v : acc) v = splat(0.0f);
        dot_columns<CODES, M>(a.w, row, 0, a.w.k, x, a.w.k, acc);
        for (int m = 0; m < M; m++) put(a, m0 + m, row, sum(add(acc[m], acc[M + m])));
    }
}

// x as float32: itself, or a copy.
inline const float* x_as_float(const Linear& a, int slot) {
    if (a.x_type == F32) return static_cast<const float*>(a.x);
    const int64_t count = a.m * a.w.k;
    float* out = static_cast<float*>(scratch(slot, count * sizeof(float)));
    for (int64_t i = 0; i < count; i += W) {
        const int64_t n = count - i < W ? count - i : W;
        storen(out + i, a.x_type == BF16 ? loadn_as<BF16>(a.x, i, n) : loadn_as<F16>(a.x, i, n), n);
    }
    return out;
}

constexpr int GEMV_M = W == 4 ? 8 : W == 8 ? 4 : 8;  // rows of x at a time: 2 * GEMV_M sums stay in registers

inline void gemv(const Linear& a) {
    const float* x = x_as_float(a, 0);
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        with_codes(a.w.codes, [&](auto tag) {
            constexpr int C = decltype(tag)::codes;
            int64_t m = 0;
            for (; m + GEMV_M <= a.m; m += GEMV_M) gemv_rows<C, GEMV_M>(a, x + m * a.w.k, m, part);
            if (m + 4 <= a.m && GEMV_M > 4) gemv_rows<C, 4>(a, x + m * a.w.k, m, part), m += 4;
            if (m + 2 <= a.m) gemv_rows<C, 2>(a, x + m * a.w.k, m, part), m += 2;
            if (m < a.m) gemv_rows<C, 1>(a, x + m * a.w.k, m, part);
        });
    });
}
