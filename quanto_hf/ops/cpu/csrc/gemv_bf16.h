// Few rows of bfloat16 x: blocks of codes become pairs of bfloat16 in registers and go through vdpbf16ps. Included
// inside the namespace of a level that has AVX-512 BF16 and VBMI.

constexpr int64_t X_BYTES = 16384;  // of x in a step: half of the smallest first-level cache
constexpr int ROWS = 16;            // of the weight at a time: their sums become one vector of the output

inline F dot_bf16(F acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// sums[r * M + m] += blocks [b0, b1) of R rows times M rows of x.
template <int CODES, int M, int R>
inline void block_sums(const Weight& w, const ByteTable& t, int64_t row, int64_t b0, int64_t b1, const uint16_t* x, int64_t ld,
                       F* sums) {
    F acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = b0 == 0 ? splat(0.0f) : sums[r * M + m];
    blocks<CODES, R>(w, t, row, b0, b1, [&](int64_t column, const __m512i* weights) {
        for (int m = 0; m < M; m++) {
            const __m512i v = _mm512_loadu_si512(x + m * ld + column);
            for (int r = 0; r < R; r++) acc[r][m] = dot_bf16(acc[r][m], weights[r], v);
        }
    });
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r * M + m] = acc[r][m];
}

// x is in the order of the blocks; `rest` holds the columns behind them as float32, or is null.
template <int CODES, int M>
inline void gemv_bf16_rows(const Linear& a, const ByteTable& t, const uint16_t* x, int64_t ld, const float* rest, int64_t m0,
                           Range part) {
    constexpr int64_t BLOCK = BLOCK_BYTES * (8 / bits_of(CODES)), STEP = X_BYTES / (2 * BLOCK * M);
    constexpr int R = M <= 2 ? 4 : 2;
    constexpr bool LATE = bits_of(CODES) == 8;
    const int64_t columns = block_columns(a.w), whole = columns / BLOCK;
    alignas(64) F sums[ROWS * M];
    for (int64_t row = part.begin; row < part.end; row += ROWS) {
        const int n = static_cast<int>(part.end - row < ROWS ? part.end - row : ROWS);
        for (int64_t b = 0; b < whole || b == 0; b += STEP) {
            const int64_t end = b + STEP < whole ? b + STEP : whole;
            int r = 0;
            for (; r + R <= n; r += R) block_sums<CODES, M, R>(a.w, t, row + r, b, end, x, ld, sums + r * M);
            for (; r < n; r++) block_sums<CODES, M, 1>(a.w, t, row + r, b, end, x, ld, sums + r * M);
        }
        if (rest) {
            for (int r = 0; r < n; r++) {
                F acc[2 * M];
                for (F& v : acc) v = splat(0.0f);
                dot_columns<CODES, M>(a.w, row + r, columns, a.w.k, rest - columns, a.w.k - columns, acc);
                for (int m = 0; m < M; m++) sums[r * M + m] = add(sums[r * M + m], add(acc[m], acc[M + m]));
            }
        }
        for (int m = 0; m < M; m++) {
            F v[W];
            for (int r = 0; r < W; r++) v[r] = r < n ? sums[r * M + m] : splat(0.0f);
            transpose(v);
            for (int s = W / 2; s > 0; s /= 2)
                for (int i = 0; i < s; i++) v[i] = add(v[i], v[i + s]);
            put_vector<BF16>(a, m0 + m, row, n, v[0], LATE);
        }
    }
}

inline void gemv_bf16(const Linear& a) {
    const Weight& w = a.w;
    const int64_t columns = block_columns(w), padded = round_up(columns > w.k ? columns : w.k, 64);
    const int64_t behind = columns < w.k ? w.k - columns : 0;
    // Rows of x are an odd number of half pages apart: a power of two would put them all into the same few sets of the
    // first-level cache (1.8 times slower at 8 rows and 4096 columns).
    const int64_t ld = round_up(padded, 2048) + 1024;
    uint16_t* x = static_cast<uint16_t*>(scratch(0, a.m * ld * 2));
    float* rest = static_cast<float*>(scratch(1, a.m * behind * sizeof(float)));
    for (int64_t m = 0; m < a.m; m++) {
        const uint16_t* row = static_cast<const uint16_t*>(a.x) + m * w.k;
        order_row(w, row, padded, x + m * ld);
        for (int64_t i = 0; i < behind; i += W) {
            const int64_t n = behind - i < W ? behind - i : W;
            storen(rest + m * behind + i, loadn_bf16(row + columns + i, n), n);
        }
    }
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(w.n, 32, thread, of);
        with_codes(w.codes, [&](auto tag) {
            constexpr int C = decltype(tag)::codes;
            ByteTable t;
            if constexpr (bits_of(C) == 8) t = byte_table<C>();
            const auto run = [&](auto count, int64_t m) {
                constexpr int M = decltype(count)::slot;
                gemv_bf16_rows<C, M>(a, t, x + m * ld, ld, behind ? rest + m * behind : nullptr, m, part);
            };
            int64_t m = 0;
            for (; m + 8 <= a.m; m += 8) run(Slot<8>{}, m);
            switch (a.m - m) {
                case 1: run(Slot<1>{}, m); break;
                case 2: run(Slot<2>{}, m); break;
                case 3: run(Slot<3>{}, m); break;
                case 4: run(Slot<4>{}, m); break;
                case 5: run(Slot<5>{}, m); break;
                case 6: run(Slot<6>{}, m); break;
                case 7: run(Slot<7>{}, m); break;
            }
        });
    });
}
