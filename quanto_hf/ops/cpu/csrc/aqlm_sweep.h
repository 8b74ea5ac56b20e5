// One pass over the column groups with error compensation, and the product of matrices that it starts from. Included
// inside a level's namespace.

// Row groups that a thread takes through all columns at once: what it reads of the Hessian then serves all of them.
constexpr int64_t SWEPT = 32;

// out[i] += sum of factor[j] * rows[j], over `n` values; 4 outputs at a time share what is read of the rows.
template <int OUTPUTS>
inline void add_rows(float* const* out, const float* factor, int64_t stride, const float* rows, int64_t row_stride, int64_t count, int64_t n) {
    for (int64_t c = 0; c < n; c += W) {
        const int64_t lanes = n - c < W ? n - c : W;
        F sum[OUTPUTS];
        for (int i = 0; i < OUTPUTS; i++) sum[i] = loadn(out[i] + c, lanes);
        for (int64_t j = 0; j < count; j++) {
            const F row = loadn(rows + j * row_stride + c, lanes);
            for (int i = 0; i < OUTPUTS; i++) sum[i] = fma(splat(factor[i * stride + j]), row, sum[i]);
        }
        for (int i = 0; i < OUTPUTS; i++) storen(out[i] + c, sum[i], lanes);
    }
}

struct Sweeper {
    const AqlmSweep& a;
    const int64_t width = a.books.width, in = a.in_group, k = a.columns * a.in_group;
    float* metric;   // the codebooks in the metric of a column group
    float* targets;  // SWEPT
    float* moved;    // SWEPT * out_group rows of in_group: how the quantized weight has changed
    int32_t* before;
    Turned turned;
    Searcher searcher;

    static int64_t floats(const AqlmSweep& a) {
        return a.books.count * a.books.size * a.books.width + SWEPT * (2 * a.books.width + a.books.count);
    }
    Sweeper(const AqlmSweep& sweep, float* memory, float* turned_memory, void* search_memory)
        : a(sweep), metric(memory), targets(metric + a.books.count * a.books.size * width), moved(targets + SWEPT * width),
          before(reinterpret_cast<int32_t*>(moved + SWEPT * width)), turned(a.books, turned_memory),
          searcher(turned, metric, a.beam, search_memory) {}

    // out = v L for each row of in_group values; L lower
    static void times_lower(const float* v, const float* lower, int64_t in, float* out) {
        for (int64_t j = 0; j < in; j++) {
            float sum = 0;
            for (int64_t i = j; i < in; i++) sum += v[i] * lower[i * in + j];
            out[j] = sum;
        }
    }
    // out += v M
    static void add_times(const float* v, const float* matrix, int64_t in, float* out) {
        for (int64_t i = 0; i < in; i++)
            for (int64_t j = 0; j < in; j++) out[j] += v[i] * matrix[i * in + j];
    }

    void run(int64_t first, int64_t last) {
        for (int64_t column = 0; column < a.columns; column++) {
            const float* lower = a.lower + column * in * in;
            const float* to = a.to + column * in * in;
            const int64_t vectors = a.books.count * a.books.size;
            for (int64_t v = 0; v < vectors * a.out_group; v++) times_lower(a.books.values + v * in, lower, in, metric + v * in);
            turned.fill(metric);
            for (int64_t g = first; g < last; g++) {
                const int32_t* codes = a.codes + (g * a.columns + column) * a.books.count;
                float* target = targets + (g - first) * width;
                for (int64_t i = 0; i < width; i++) target[i] = 0;
                for (int64_t c = 0; c < a.books.count; c++) {
                    const float* v = metric + (c * a.books.size + codes[c]) * width;
                    if (!a.weight) for (int64_t i = 0; i < width; i++) target[i] += v[i];
                    before[(g - first) * a.books.count + c] = codes[c];
                }
                for (int64_t o = 0; o < a.out_group; o++)
                    add_times(a.state + (g * a.out_group + o) * k + column * in, to, in, target + o * in);
            }
            for (int64_t g = first; g < last; g += SEARCHED) search(g, last - g < SEARCHED ? last - g : SEARCHED, first, column);
            compensate(first, last, column);
        }
    }

    void search(int64_t begin, int64_t groups, int64_t first, int64_t column) {
        const float* at[SEARCHED];
        int32_t* codes[SEARCHED];
        for (int64_t g = 0; g < groups; g++) {
            at[g] = targets + (begin - first + g) * width;
            codes[g] = a.codes + ((begin + g) * a.columns + column) * a.books.count;
        }
        with_width(width, [&](auto w) { searcher.run<decltype(w)::value>(at, codes, groups); });
    }

    // The state of the columns to the right follows what has moved: away from the weight, or from the codes before.
    void compensate(int64_t first, int64_t last, int64_t column) {
        float* out[4];
        const int64_t right = (column + 1) * in;
        int64_t waiting = 0;
        const float* rows = a.follow + column * in * k + right;
        for (int64_t g = first; g < last; g++) {
            const int32_t* now = a.codes + (g * a.columns + column) * a.books.count;
            const int32_t* old = before + (g - first) * a.books.count;
            if (!a.weight && std::memcmp(now, old, a.books.count * sizeof(int32_t)) == 0) continue;
            for (int64_t o = 0; o < a.out_group; o++) {
                float* difference = moved + waiting * in;
                const int64_t row = (g * a.out_group + o) * k;
                for (int64_t i = 0; i < in; i++) difference[i] = a.weight ? a.weight[row + column * in + i] : 0.0f;
                for (int64_t c = 0; c < a.books.count; c++) {
                    const float* book = a.books.values + c * a.books.size * width + o * in;
                    for (int64_t i = 0; i < in; i++)
                        difference[i] += (a.weight ? 0.0f : book[old[c] * width + i]) - book[now[c] * width + i];
                }
                out[waiting++] = a.state + row + right;
                if (waiting < 4) continue;
                add_rows<4>(out, moved, in, rows, k, in, k - right);
                waiting = 0;
            }
        }
        for (int64_t i = 0; i < waiting; i++) add_rows<1>(out + i, moved + i * in, in, rows, k, in, k - right);
    }
};

inline void aqlm_sweep(const AqlmSweep& a) {
    parallel(a.threads, [&](int thread, int of) {
        float* memory = static_cast<float*>(scratch(2, Sweeper::floats(a) * sizeof(float)));
        float* turned = static_cast<float*>(scratch(0, Turned::floats(a.books) * sizeof(float)));
        Sweeper sweeper(a, memory, turned, scratch(1, Searcher::bytes(a.books, a.beam)));
        const Range part = share(a.rows, SWEPT, thread, of);
        for (int64_t first = part.begin; first < part.end; first += SWEPT)
            sweeper.run(first, part.end - first < SWEPT ? part.end : first + SWEPT);
    });
}

// A panel of b, PRODUCT_DEEP rows of 2 W columns, is copied side by side and serves all rows of a.
constexpr int64_t PRODUCT_DEEP = 256;

template <int ROWS>
inline void product_tile(const Product& p, int64_t row, int64_t column, int64_t from, int64_t deep, const float* panel) {
    const int64_t left = p.n - column < W ? p.n - column : W;
    const int64_t right = p.n - column - W < W ? (p.n - column > W ? p.n - column - W : 0) : W;
    F low[ROWS], high[ROWS];
    for (int i = 0; i < ROWS; i++) {
        const float* out = p.out + (row + i) * p.n + column;
        low[i] = from ? loadn(out, left) : splat(0.0f);
        high[i] = from && right ? loadn(out + W, right) : splat(0.0f);
    }
    for (int64_t k = 0; k < deep; k++) {
        const F b = load(panel + k * 2 * W), c = load(panel + k * 2 * W + W);
        for (int i = 0; i < ROWS; i++) {
            const F x = splat(p.a[(row + i) * p.k + from + k]);
            low[i] = fma(x, b, low[i]), high[i] = fma(x, c, high[i]);
        }
    }
    for (int i = 0; i < ROWS; i++) {
        float* out = p.out + (row + i) * p.n + column;
        storen(out, low[i], left);
        if (right) storen(out + W, high[i], right);
    }
}

inline void product(const Product& p) {
    constexpr int64_t TILE = W == 16 ? 12 : 6;  // accumulators, two registers each, of 32 or 16
    parallel(p.threads, [&](int thread, int of) {
        float* panel = static_cast<float*>(scratch(0, PRODUCT_DEEP * 2 * W * sizeof(float)));
        const Range part = share(p.n, 2 * W, thread, of);
        for (int64_t column = part.begin; column < part.end; column += 2 * W) {
            const int64_t lanes = p.n - column < 2 * W ? p.n - column : 2 * W;
            for (int64_t from = 0; from < p.k; from += PRODUCT_DEEP) {
                const int64_t deep = p.k - from < PRODUCT_DEEP ? p.k - from : PRODUCT_DEEP;
                for (int64_t k = 0; k < deep; k++) {
                    for (int64_t i = 0; i < 2 * W; i++)
                        panel[k * 2 * W + i] = i < lanes ? p.b[(from + k) * p.stride + column + i] : 0.0f;
                }
                int64_t row = 0;
                for (; row + TILE <= p.m; row += TILE) product_tile<TILE>(p, row, column, from, deep, panel);
                for (; row + 4 <= p.m; row += 4) product_tile<4>(p, row, column, from, deep, panel);
                for (; row < p.m; row++) product_tile<1>(p, row, column, from, deep, panel);
            }
        }
    });
}
