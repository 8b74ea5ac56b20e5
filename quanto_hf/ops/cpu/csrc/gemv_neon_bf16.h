// Few rows of bfloat16 x: blocks of codes become bfloat16 in registers and go through bfdot. Included inside the
// namespace of a level that has FEAT_BF16.

// M rows of x times the rows of a part of the weight. `tail` holds the last k % 16 columns of each row of x, filled up
// with zeros, for codes of 8 bits; `rest` the columns behind the whole blocks as float32, for the others, or null.
template <int CODES, int M, int R>
inline void gemv_bf16_rows(const Linear& a, const uint16_t* tail, const float* rest, int64_t m0, int64_t row) {
    constexpr int SUMS = M <= 2 ? 2 : 1;  // side by side, to hide the latency of bfdot
    const Weight& w = a.w;
    const int64_t columns = block_columns(w);
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + m0 * w.k;
    F acc[R][M][SUMS];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++)
            for (int s = 0; s < SUMS; s++) acc[r][m][s] = splat(0.0f);
    blocks<CODES, R>(w, row, 0, columns, [&](int64_t column, const Columns<R>& weights) {
        const bool inside = bits_of(CODES) != 8 || column + 16 <= w.k;
        for (int m = 0; m < M; m++) {
            const uint16_t* there = inside ? x + m * w.k + column : tail + (m0 + m) * 16;
            for (int h = 0; h < 2; h++) {
                const uint16x8_t v = vld1q_u16(there + 8 * h);
                for (int r = 0; r < R; r++) acc[r][m][h % SUMS] = dot_bf16(acc[r][m][h % SUMS], weights.of[r][h], v);
            }
        }
    });
    for (int r = 0; r < R; r++) {
        F more[2 * M];
        if (rest) {
            for (F& v : more) v = splat(0.0f);
            const int64_t ld = w.k - columns;
            dot_columns<CODES, M>(w, row + r, columns, w.k, rest + m0 * ld - columns, ld, more);
        }
        for (int m = 0; m < M; m++) {
            F v = SUMS == 2 ? add(acc[r][m][0], acc[r][m][SUMS - 1]) : acc[r][m][0];
            if (rest) v = add(v, add(more[m], more[M + m]));
            float value = sum(v);
            if (bits_of(CODES) == 8) value *= half_value(w.scale, row + r, w.scale_type);
            put(a, m0 + m, row + r, value);
        }
    }
}

inline void gemv_bf16(const Linear& a) {
    const Weight& w = a.w;
    const int64_t columns = block_columns(w), behind = w.k - columns, tail_columns = w.k % 16;
    uint16_t* tail = static_cast<uint16_t*>(scratch(0, a.m * 16 * 2));
    float* rest = static_cast<float*>(scratch(1, a.m * behind * sizeof(float)));
    std::memset(tail, 0, a.m * 16 * 2);
    for (int64_t m = 0; m < a.m; m++) {
        const uint16_t* row = static_cast<const uint16_t*>(a.x) + m * w.k;
        std::memcpy(tail + m * 16, row + w.k - tail_columns, tail_columns * 2);
        for (int64_t i = 0; i < behind; i += W) {
            const int64_t n = behind - i < W ? behind - i : W;
            storen(rest + m * behind + i, loadn_bf16(row + columns + i, n), n);
        }
    }
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(w.n, 32, thread, of);
        with_codes(w.codes, [&](auto tag) {
            constexpr int C = decltype(tag)::codes;
            const auto run = [&](auto count, int64_t m) {
                constexpr int M = decltype(count)::slot, R = M <= 2 ? 4 : 2;
                int64_t row = part.begin;
                for (; row + R <= part.end; row += R) gemv_bf16_rows<C, M, R>(a, tail, behind ? rest : nullptr, m, row);
                for (; row < part.end; row++) gemv_bf16_rows<C, M, 1>(a, tail, behind ? rest : nullptr, m, row);
            };
            int64_t m = 0;
            for (; m + 8 <= a.m; m += 8) run(Slot<8>{}, m);
            if (m + 4 <= a.m) run(Slot<4>{}, m), m += 4;
            if (m + 2 <= a.m) run(Slot<2>{}, m), m += 2;
            if (m < a.m) run(Slot<1>{}, m);
        });
    });
}
