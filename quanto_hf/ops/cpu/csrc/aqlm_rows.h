// Few rows of x and a weight of additive codes: a piece of a few rows of the weight is decoded into the first-level cache
// and multiplied with every row of x, lanes are columns. Included inside a level's namespace, behind gemv.h and
// aqlm_decode.h.

constexpr int MOST_SUMS = W == 8 ? 8 : 16;  // that stay in registers, beside what is multiplied

// Rows of the weight at a time: x is loaded once for all of them.
constexpr int rows_at_a_time(int m) {
    int rows = 8;
    while (rows > 1 && rows * m > MOST_SUMS) rows /= 2;
    return rows;
}

// Piece gives: Number, STEP (numbers in a register), dot(), read_row(a, m, out), decode(w, row, from, to, out).
template <class Piece, int M, int R>
inline void rows_product(const Linear& a, const typename Piece::Number* x, int64_t x_ld, int64_t row) {
    constexpr int64_t LD = AQLM_CHUNK + Piece::STEP;  // numbers behind the last one are written too, see aqlm_columns
    alignas(64) typename Piece::Number weights[R * LD];
    F acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = splat(0.0f);
    for (int64_t column = 0; column < a.w.k; column += AQLM_CHUNK) {
        const int64_t count = a.w.k - column < AQLM_CHUNK ? a.w.k - column : AQLM_CHUNK, padded = round_up(count, Piece::STEP);
        for (int r = 0; r < R; r++) {
            Piece::decode(a.w, row + r, column, column + count, weights + r * LD);
            std::memset(weights + r * LD + count, 0, (padded - count) * sizeof(*weights));
        }
        for (int64_t i = 0; i < padded; i += Piece::STEP)
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) acc[r][m] = Piece::dot(acc[r][m], weights + r * LD + i, x + m * x_ld + column + i);
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) put(a, m, row + r, sum(acc[r][m]));
}

// Up to GEMV_ROWS rows of x.
template <class Piece>
inline void aqlm_rows(const Linear& a) {
    using Number = typename Piece::Number;
    const int64_t x_ld = round_up(a.w.k, Piece::STEP);
    Number* x = static_cast<Number*>(scratch(0, a.m * x_ld * sizeof(Number)));
    for (int64_t m = 0; m < a.m; m++) {
        Piece::read_row(a, m, x + m * x_ld);
        std::memset(x + m * x_ld + a.w.k, 0, (x_ld - a.w.k) * sizeof(Number));
    }
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        with_rows(a.m, [&](auto count) {
            constexpr int M = decltype(count)::slot, R = rows_at_a_time(M);
            int64_t row = part.begin;
            for (; row + R <= part.end; row += R) rows_product<Piece, M, R>(a, x, x_ld, row);
            for (; row < part.end; row++) rows_product<Piece, M, 1>(a, x, x_ld, row);
        });
    });
}

// Any weight in float32, any type of x.
struct FloatPiece {
    using Number = float;
    static constexpr int STEP = W;
    static F dot(F acc, const float* weights, const float* x) { return fma(load(weights), load(x), acc); }
    static void read_row(const Linear& a, int64_t m, float* out) { load_scales(a.x, a.x_type, m * a.w.k, (m + 1) * a.w.k, out); }
    static void decode(const Weight& w, int64_t row, int64_t from, int64_t to, float* out) {
        with_aqlm(*w.aqlm, [&](auto book, auto code) { aqlm_columns<decltype(book)::type, decltype(code)>(w, row, from, to, out); });
    }
};
