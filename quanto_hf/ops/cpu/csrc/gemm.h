// Many rows of x: a panel of the weight is dequantized into the cache and multiplied there. Included inside a level's
// namespace.
//
// The weight is the left operand and x the right one: lanes are rows of x, so that a row of codes stays a row and
// nothing of the weight is transposed; only x is (once per call), and the result (once per block of it). The product
// runs over chunks of CHUNK columns, whose panel and slice of x stay in the second-level cache.
//
//   x tiles   [tile of W rows of x][columns / STEP][W][STEP]   STEP numbers of a row side by side fill the 4 bytes of a lane
//   panel     [PANEL rows of the weight][CHUNK]
//   sums      [PANEL rows of the weight][rows of x]            float32

constexpr int64_t CHUNK = 512, PANEL = 96, MAX_X = 512;
constexpr int TILE_ROWS = W == 16 ? 12 : W == 8 ? 6 : 8;  // of the weight: TILE_ROWS x 2 sums stay in registers

// The sums of a product, for those that have float ones.
struct FloatSums {
    using Sum = F;
    static F none() { return splat(0.0f); }
    static F read(const float* p) { return load(p); }
    static void write(float* p, F v) { store(p, v); }
};

// sums[r][u * W ...] += panel[r] . x tile u, for R rows and U tiles.
template <class Dot, int R, int U>
inline void tile_product(const typename Dot::Number* panel, const typename Dot::Number* x, int64_t x_ld, int64_t columns,
                         float* sums, int64_t sums_ld, bool first) {
    typename Dot::Sum acc[R][U];
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) acc[r][u] = first ? Dot::none() : Dot::read(sums + r * sums_ld + u * W);
    for (int64_t k = 0; k < columns; k += Dot::STEP)
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) acc[r][u] = Dot::dot(acc[r][u], panel + r * CHUNK + k, x + u * x_ld + k * W);
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) Dot::write(sums + r * sums_ld + u * W, acc[r][u]);
}

template <class Dot, int R>
inline void tile_rows(const typename Dot::Number* panel, int64_t rows, const typename Dot::Number* x, int64_t x_ld, int tiles,
                      int64_t columns, float* sums, int64_t sums_ld, bool first) {
    if (rows >= R) {
        if (tiles == 2) tile_product<Dot, R, 2>(panel, x, x_ld, columns, sums, sums_ld, first);
        else tile_product<Dot, R, 1>(panel, x, x_ld, columns, sums, sums_ld, first);
    } else if constexpr (R > 1) {
        tile_rows<Dot, R - 1>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
    }
}

// All sums of a panel with all tiles of x.
template <class Dot>
inline void panel_product(const typename Dot::Number* panel, int64_t rows, const typename Dot::Number* x, int64_t x_ld,
                          int64_t tiles, int64_t columns, float* sums, int64_t sums_ld, bool first) {
    for (int64_t t = 0; t < tiles; t += 2) {
        int64_t r = 0;
        // A single tile has half the sums, too few to hide the latency of bfloat16 products: with twice the rows 16 rows of
        // x take 3.2 ms for 4096 x 4096 weights, not 6.1. Float32 panels would lose: 24 rows of theirs, 2048 bytes apart,
        // share two eighths of the first-level cache, and 16 rows of x take 12.9 ms, not 8.0.
        if (sizeof(typename Dot::Number) == 2 && tiles - t == 1)
            for (; r + 2 * TILE_ROWS <= rows; r += 2 * TILE_ROWS)
                tile_product<Dot, 2 * TILE_ROWS, 1>(panel + r * CHUNK, x + t * x_ld, x_ld, columns, sums + r * sums_ld + t * W,
                                                    sums_ld, first);
        for (; r < rows; r += TILE_ROWS)
            tile_rows<Dot, TILE_ROWS>(panel + r * CHUNK, rows - r, x + t * x_ld, x_ld, tiles - t > 1 ? 2 : 1, columns,
                                      sums + r * sums_ld + t * W, sums_ld, first);
    }
}

// All sums of a panel. A level overloads this for the products that it has other instructions for (gemm_amx.h).
template <class Dot>
inline void multiply(Dot, const typename Dot::Number* panel, int64_t rows, const typename Dot::Number* x, int64_t x_ld,
                     int64_t tiles, int64_t columns, float* sums, int64_t sums_ld, bool first) {
    panel_product<Dot>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}

// W outputs of one row of x: times the scale of their row of the weight if that is still due, plus bias.
template <int TYPE>
inline void put_vector(const Linear& a, int64_t m, int64_t row, int64_t n, F v, bool scaled) {
    if (scaled) {
        float scales[W];
        load_scales(a.w.scale, a.w.scale_type, row, row + n, scales);
        v = mul(v, loadn(scales, n));
    }
    if (a.bias) v = add(v, loadn_as<TYPE>(a.bias, row, n));
    storen_as<TYPE>(a.out, m * a.w.n + row, v, n);
}

// sums[rows][rows of x] to out.
template <int TYPE>
inline void put_panel(const Linear& a, int64_t m0, int64_t count, int64_t row, int64_t rows, const float* sums, int64_t ld,
                      bool scaled) {
    for (int64_t r = 0; r < rows; r += W) {
        const int64_t n = rows - r < W ? rows - r : W;
        for (int64_t m = 0; m < count; m += W) {
            F v[W];
            for (int i = 0; i < W; i++) v[i] = i < n ? load(sums + (r + i) * ld + m) : splat(0.0f);
            transpose(v);
            for (int i = 0; i < W && m + i < count; i++) put_vector<TYPE>(a, m0 + m + i, row + r, n, v[i], scaled);
        }
    }
}

// Dot gives: Sum with none(), read() and write(), Number, STEP, dot(), late(w) (the scale multiplies the sum), padded(w), pack(a, m0, count, tile, out),
// Tables(w) (made once per
// thread), panel(w, tables, row, rows, from, to, out).
template <class Dot>
inline void gemm(const Linear& a) {
    using Number = typename Dot::Number;
    const int64_t padded = Dot::padded(a.w), x_ld = padded * W;
    for (int64_t m0 = 0; m0 < a.m; m0 += MAX_X) {
        const int64_t count = a.m - m0 < MAX_X ? a.m - m0 : MAX_X, tiles = (count + W - 1) / W;
        Number* x = static_cast<Number*>(scratch(0, tiles * x_ld * sizeof(Number)));
        parallel(a.threads, [&](int thread, int of) {
            const Range part = share(tiles, 1, thread, of);
            for (int64_t t = part.begin; t < part.end; t++)
                Dot::pack(a, m0 + t * W, count - t * W < W ? count - t * W : W, x + t * x_ld);
        });
        parallel(a.threads, [&](int thread, int of) {
            const Range part = share(a.w.n, 32, thread, of);
            const typename Dot::Tables tables(a.w);
            Number* panel = static_cast<Number*>(scratch(1, PANEL * CHUNK * sizeof(Number)));
            const int64_t sums_ld = (tiles + 1) * W;  // one more: rows that are not a power of two apart
            float* sums = static_cast<float*>(scratch(2, PANEL * sums_ld * sizeof(float)));
            for (int64_t row = part.begin; row < part.end; row += PANEL) {
                const int64_t rows = part.end - row < PANEL ? part.end - row : PANEL;
                for (int64_t k = 0; k < padded || k == 0; k += CHUNK) {
                    const int64_t columns = padded - k < CHUNK ? padded - k : CHUNK;
                    Dot::panel(a.w, tables, row, rows, k, k + columns, panel);
                    multiply(Dot{}, panel, rows, x + k * W, x_ld, tiles, columns, sums, sums_ld, k == 0);
                }
                with_type(a.x_type, [&](auto type) {
                    put_panel<decltype(type)::type>(a, m0, count, row, rows, sums, sums_ld, Dot::late(a.w));
                });
            }
        });
    }
}

// float32 numbers: any weight, any type of x.
struct DotF32 : FloatSums {
    using Number = float;
    static constexpr int STEP = 1;
    static F dot(F acc, const float* weight, const float* x) { return fma(splat(*weight), load(x), acc); }
    static bool late(const Weight&) { return false; }
    static int64_t padded(const Weight& w) { return w.k; }

    static void pack(const Linear& a, int64_t m0, int64_t count, float* out) {
        with_type(a.x_type, [&](auto type) {
            for (int64_t k = 0; k < a.w.k; k += W) {
                const int64_t n = a.w.k - k < W ? a.w.k - k : W;
                F v[W];
                for (int i = 0; i < W; i++)
                    v[i] = i < count ? loadn_as<decltype(type)::type>(a.x, (m0 + i) * a.w.k + k, n) : splat(0.0f);
                transpose(v);
                for (int i = 0; i < n; i++) store(out + (k + i) * W, v[i]);
            }
        });
    }

    struct Tables {
        explicit Tables(const Weight&) {}
    };

    static void panel(const Weight& w, const Tables&, int64_t row, int64_t rows, int64_t from, int64_t to, float* out) {
        with_codes(w.codes, [&](auto tag) {
            for (int64_t r = 0; r < rows; r++)
                for_each_weight<decltype(tag)::codes>(w, row + r, from, to, [&](F v, int64_t column, int n, auto) {
                    storen(out + r * CHUNK + column - from, v, n);
                });
        });
    }
};
