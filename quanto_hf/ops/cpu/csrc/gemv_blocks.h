// Few rows of x against whole blocks of codes, in float32: the numbers of the codes are multiplied with x, and the scale
// multiplies the sums of a segment, which lies inside one group. Included inside the namespace of a level for x86.
//
// sum((number - zero) * scale * x) = scale * (sum(number * x) - zero * sum(x)). The sums of x are made in the same order,
// lane by lane: where all codes stand for the zero, and it is a power of two, the difference is 0 to the bit.

constexpr int64_t X_BYTES = 16384;    // of x at a time: half of the smallest first-level cache
constexpr int64_t AHEAD_BYTES = 4096;  // codes are asked for so many bytes before they are used
constexpr int ROWS = 16;               // of the weight, before the next columns of x

// How long a segment is, and whether each of its lanes has a scale of its own.
template <int UNITS_, bool LANES_>
struct Segment {
    static constexpr int UNITS = UNITS_;
    static constexpr bool LANES = LANES_;
    static constexpr int64_t COLUMNS = UNITS * UNIT, SCALES = LANES ? W : 1, STEP = COLUMNS / SCALES;  // columns per scale
};

// x of a call, by chunks of columns: [chunk][row][columns of the chunk], and the sums of its segments, W lanes each.
struct OrderedX {
    float *x, *sums;
    const float *natural, *rest;  // as it is, and the columns behind the last block
    int64_t blocks, chunk;        // in a row, and in a chunk
};

template <int VECTORS>
inline F chain(const F* w, const float* x) {
    F sum = mul(w[0], load(x));
    for (int v = 1; v < VECTORS; v++) sum = fma(w[v], load(x + v * W), sum);
    return sum;
}

// acc[m] += blocks of one row of the weight times a chunk of M rows of x.
template <class Form, class Seg, int M>
inline void add_blocks(Form& units, const uint8_t* codes, int64_t blocks, const float* scales, const float* zeros, const float* x,
                       const float* x_sums, Ahead ahead, F* sums) {
    const int64_t ld = blocks * 64 * Form::PLANES, sums_ld = ld / Seg::COLUMNS * W;
    F acc[M];
    for (int m = 0; m < M; m++) acc[m] = sums[m];
    for (int64_t b = 0; b < blocks; b++, codes += 64) {
        ahead.step();
        const auto plane = [&](auto tag) {
            for (int at = 0; at < 64; at += Seg::COLUMNS) {
                F w[4 * Seg::UNITS];
                for (int u = 0; u < Seg::UNITS; u++) units.template numbers<decltype(tag)::slot>(codes + at + u * UNIT, w + 4 * u);
                const F scale = Seg::LANES ? load(scales) : splat(*scales);
                for (int m = 0; m < M; m++) {
                    F sum = chain<4 * Seg::UNITS>(w, x + m * ld);
                    if (Form::COUNTS) sum = fma(Seg::LANES ? load(zeros) : splat(*zeros), load(x_sums + m * sums_ld), sum);
                    acc[m] = fma(sum, scale, acc[m]);
                }
                x += Seg::COLUMNS, scales += Seg::SCALES;
                if (Form::COUNTS) zeros += Seg::SCALES, x_sums += W;
            }
        };
        plane(Slot<0>{});
        if constexpr (Form::PLANES > 1) plane(Slot<1>{});
        if constexpr (Form::PLANES > 2) plane(Slot<2>{}), plane(Slot<3>{});
    }
    for (int m = 0; m < M; m++) sums[m] = acc[m];
}

// The scales (or zeros) of the columns [from, to) of a row, one for every `step` columns.
inline void spread_scales(const Weight& w, const void* p, int64_t row, int64_t from, int64_t to, int64_t step, float* out) {
    const int64_t count = (to - from) / step, g0 = w.groups == 1 ? 0 : from / w.group;
    if (w.groups == 1) return (void)std::fill_n(out, count, half_value(p, row, w.scale_type));
    const int64_t g1 = (to - 1) / w.group + 1;
    if (w.group == step) return load_scales(p, w.scale_type, row * w.groups + g0, row * w.groups + g1, out);
    float* each = static_cast<float*>(scratch(5, (g1 - g0) * sizeof(float)));
    load_scales(p, w.scale_type, row * w.groups + g0, row * w.groups + g1, each);
    int64_t column = from;
    for (int64_t g = g0; g < g1; g++)
        for (const int64_t end = (g + 1) * w.group < to ? (g + 1) * w.group : to; column < end; column += step) *out++ = each[g - g0];
}

template <class Form, class Seg, int M>
inline void gemv_block_rows(const Linear& a, const OrderedX& x, int64_t m0, int real, Range part) {
    constexpr int64_t BLOCK = 64 * Form::PLANES;
    const Weight& w = a.w;
    const int64_t bytes = row_bytes(Form::CODES, w.k), columns = x.blocks * BLOCK, entries = x.chunk * BLOCK / Seg::STEP;
    float* scales = static_cast<float*>(scratch(4, 2 * entries * sizeof(float)));
    float* zeros = scales + entries;
    const float first = Form::COUNTS ? w.table[0] : 0.0f;
    if (Form::COUNTS && !w.zero) std::fill_n(zeros, entries, first);
    Form units(w);
    alignas(64) F sums[ROWS][M];
    alignas(64) float results[M][ROWS];
    for (int64_t row = part.begin; row < part.end; row += ROWS) {
        const int n = static_cast<int>(part.end - row < ROWS ? part.end - row : ROWS);
        for (int r = 0; r < n; r++)
            for (int m = 0; m < M; m++) sums[r][m] = splat(0.0f);
        for (int64_t b = 0; b < x.blocks; b += x.chunk) {
            const int64_t end = b + x.chunk < x.blocks ? b + x.chunk : x.blocks, ahead = 1 + AHEAD_BYTES / ((end - b) * 64 + 1);
            for (int r = 0; r < n; r++) {
                spread_scales(w, w.scale, row + r, b * BLOCK, end * BLOCK, Seg::STEP, scales);
                if (Form::COUNTS && w.zero) {
                    spread_scales(w, w.zero, row + r, b * BLOCK, end * BLOCK, Seg::STEP, zeros);
                    for (int64_t i = 0; i < (end - b) * BLOCK / Seg::STEP; i++) zeros[i] = first - zeros[i];
                }
                add_blocks<Form, Seg, M>(units, w.packed + (row + r) * bytes + b * 64, end - b, scales, zeros, x.x + b * BLOCK * M,
                                         x.sums + b * BLOCK * M / Seg::COLUMNS * W, Ahead(w.packed, bytes, row + r + ahead, b, end), sums[r]);
                if (units.saw_nan()) {
                    for (int m = 0; m < M; m++) sums[r][m] = splat(std::numeric_limits<float>::quiet_NaN());
                    units = Form(w);
                }
            }
        }
        for (int r = 0; r < n; r++) {
            F rest[2 * M];
            for (F& v : rest) v = splat(0.0f);
            if (columns < w.k) dot_columns<Form::CODES, M>(w, row + r, columns, w.k, x.rest - columns, w.k - columns, rest);
            for (int m = 0; m < real; m++) {
                results[m][r] = sum(fma(sums[r][m], splat(Form::RESULT), add(rest[m], rest[M + m])));
                if (std::isfinite(results[m][r])) continue;
                // x is tame, so that only a weight can do this: multiplied late, it makes another NaN or infinity
                F again[2] = {splat(0.0f), splat(0.0f)};
                dot_columns<Form::CODES, 1>(w, row + r, 0, w.k, x.natural + m * w.k, w.k, again);
                results[m][r] = sum(add(again[0], again[1]));
            }
        }
        with_type(a.x_type, [&](auto type) {
            for (int m = 0; m < real; m++)
                for (int r = 0; r < n; r += W)
                    put_vector<decltype(type)::type>(a, m0 + m, row + r, n - r < W ? n - r : W, load(results[m] + r), false);
        });
    }
}

// `real` rows of x in the order of the kernel, and rows of zeros up to M.
template <class Form, class Seg, int M>
inline void order_x(const OrderedX& x, int64_t k, int real) {
    constexpr int64_t BLOCK = 64 * Form::PLANES;
    std::memset(x.x, 0, x.blocks * BLOCK * M * sizeof(float));
    for (int64_t b = 0; b < x.blocks; b++) {
        const int64_t c = b / x.chunk * x.chunk, ld = (x.blocks - c < x.chunk ? x.blocks - c : x.chunk) * BLOCK;
        for (int m = 0; m < M; m++)
            for (int p = 0; p < Form::PLANES; p++) {
                const int64_t at = c * BLOCK * M + m * ld + (b - c) * BLOCK + p * 64;
                const float* in = x.natural + m * k + b * BLOCK + p * 64;
                float factor[4];
                F ones[4 * Seg::UNITS];
                for (int v = 0; v < 4; v++) factor[v] = X_FACTOR / static_cast<float>(1 << Form::shift_of(p, v));
                for (int v = 0; v < 4 * Seg::UNITS; v++) ones[v] = splat(static_cast<float>(1 << Form::shift_of(p, v % 4)));
                for (int u = 0; u < 64 && m < real; u += UNIT)
                    for (int v = 0; v < 4; v++)
                        for (int lane = 0; lane < W; lane++) x.x[at + u + v * W + lane] = in[u + Form::column_of(v, lane)] * factor[v];
                for (int u = 0; u < 64 && Form::COUNTS; u += Seg::COLUMNS)
                    store(x.sums + (at + u) / Seg::COLUMNS * W, chain<4 * Seg::UNITS>(ones, x.x + at + u));
            }
    }
}
