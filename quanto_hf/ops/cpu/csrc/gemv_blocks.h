// Few rows of x against whole blocks of codes, in float32: the numbers of the codes are multiplied with x, and the scale
// multiplies the sums of a segment, which lies inside one group. Included inside the namespace of a level for x86.
//
// sum((number - zero) * scale * x) = scale * (sum(number * x) - zero * sum(x)). The sums of x are made in the same order,
// lane by lane: where all codes stand for the zero, and it is a power of two, the difference is 0 to the bit.

// Codes are asked for so many bytes before they are used: for int8 with AVX2 on Zen 4, 4096 took 10 % more time.
constexpr int64_t AHEAD_BYTES = 12288;
constexpr int ROWS = 16;  // of the weight, before the next columns of x

// sums[m] += blocks of one row of the weight times a chunk of M rows of x.
template <class Form, class Seg, int M>
inline void add_blocks(Form& units, const uint8_t* codes, int64_t blocks, const float* scales, const float* zeros, const float* x,
                       const float* x_sums, Ahead ahead, float* sums) {
    constexpr int VECTORS = 4 * Seg::UNITS;
    const int64_t ld = blocks * 64 * Form::PLANES, sums_ld = ld / Seg::COLUMNS * W;
    constexpr bool KEPT = M <= 4;  // more sums do not fit into 16 registers, and stay in memory
    F acc[M];
    for (int m = 0; m < M && KEPT; m++) acc[m] = load(sums + m * W);
    for (int64_t b = 0; b < blocks; b++, codes += 64) {
        ahead.step();
        for_each_plane<Form::PLANES>([&](auto tag) {
            for (int at = 0; at < 64; at += Seg::COLUMNS) {
                F w[VECTORS];
                for (int u = 0; u < Seg::UNITS; u++) units.template numbers<decltype(tag)::slot>(codes + at + u * UNIT, w + 4 * u);
                const F scale = Seg::LANES ? load(scales) : splat(*scales);
                for (int m = 0; m < M; m++) {
                    F sum = product<VECTORS, chains(VECTORS, M)>(w, x + m * ld);
                    if (Form::COUNTS) sum = fma(Seg::LANES ? load(zeros) : splat(*zeros), load(x_sums + m * sums_ld), sum);
                    if (KEPT) acc[m] = fma(sum, scale, acc[m]);
                    else store(sums + m * W, fma(sum, scale, load(sums + m * W)));
                }
                x += Seg::COLUMNS, scales += Seg::SCALES;
                if (Form::COUNTS) zeros += Seg::SCALES, x_sums += W;
            }
        });
    }
    for (int m = 0; m < M && KEPT; m++) store(sums + m * W, acc[m]);
}

// The scales (or zeros) of the columns [from, to) of a row, one for every `step` columns. Up to W more may be written.
inline void spread_scales(const Weight& w, const void* p, int64_t row, int64_t from, int64_t to, int64_t step, float* out) {
    const int64_t count = (to - from) / step;
    if (w.groups == 1) return (void)std::fill_n(out, count, half_value(p, row, w.scale_type));
    const int64_t g0 = from / w.group, g1 = (to - 1) / w.group + 1;
    if (w.group == step) return load_scales(p, w.scale_type, row * w.groups + g0, row * w.groups + g1, out);
    float* each = static_cast<float*>(scratch(5, (g1 - g0) * sizeof(float)));
    load_scales(p, w.scale_type, row * w.groups + g0, row * w.groups + g1, each);
    for (int64_t g = g0, column = from; g < g1; g++) {
        const int64_t end = (g + 1) * w.group < to ? (g + 1) * w.group : to, copies = (end - column) / step;
        for (int64_t i = 0; i < copies; i += W) store(out + i, splat(each[g - g0]));
        out += copies, column = end;
    }
}

// The scales of the columns [from, to) of a row, one for every STEP columns, and what is added to its codes: the number
// `first` that the code 0 stands for, less the zero. Up to W more of both may be written.
template <class Form, int64_t STEP>
inline void scales_and_zeros(const Weight& w, int64_t row, int64_t from, int64_t to, float first, float* scales, float* zeros) {
    const int64_t count = (to - from) / STEP;
    const bool zero = Form::COUNTS && w.zero;
    if (w.group == STEP && w.scale_type == BF16) {  // the usual weight: 15 % less time for int4 with zeros (AVX2)
        const uint16_t* s = static_cast<const uint16_t*>(w.scale) + row * w.groups + from / STEP;
        const uint16_t* z = zero ? static_cast<const uint16_t*>(w.zero) + row * w.groups + from / STEP : nullptr;
        int64_t i = 0;
        for (; i + W <= count; i += W) {
            store(scales + i, load_bf16(s + i));
            if (zero) store(zeros + i, sub(splat(first), load_bf16(z + i)));
        }
        if (i == count) return;
        store(scales + i, loadn_bf16(s + i, count - i));
        if (zero) store(zeros + i, sub(splat(first), loadn_bf16(z + i, count - i)));
        return;
    }
    spread_scales(w, w.scale, row, from, to, STEP, scales);
    if (!zero) return;
    spread_scales(w, w.zero, row, from, to, STEP, zeros);
    for (int64_t i = 0; i < count; i += W) store(zeros + i, sub(splat(first), load(zeros + i)));
}

template <class Form, class Seg, int M>
inline void gemv_block_rows(const Linear& a, const OrderedX& x, Range part) {
    constexpr int64_t BLOCK = 64 * Form::PLANES;
    const Weight& w = a.w;
    const int64_t bytes = row_bytes(Form::CODES, w.k), columns = x.blocks * BLOCK, entries = x.chunk * BLOCK / Seg::STEP;
    float* scales = static_cast<float*>(scratch(4, 2 * (entries + W) * sizeof(float)));
    float* zeros = scales + entries + W;
    const float first = Form::COUNTS ? w.table[0] : 0.0f;
    if (Form::COUNTS && !w.zero) std::fill_n(zeros, entries, first);
    Form units(w);
    alignas(64) float sums[ROWS][M * W];
    alignas(64) float results[M][ROWS];
    for (int64_t row = part.begin; row < part.end; row += ROWS) {
        const int n = static_cast<int>(part.end - row < ROWS ? part.end - row : ROWS);
        std::fill_n(sums[0], n * M * W, 0.0f);
        for (int64_t b = 0; b < x.blocks; b += x.chunk) {
            const int64_t end = b + x.chunk < x.blocks ? b + x.chunk : x.blocks;
            const int64_t ahead = 1 + AHEAD_BYTES / ((end - b) * 64 + 1);  // rows
            for (int r = 0; r < n; r++) {
                scales_and_zeros<Form, Seg::STEP>(w, row + r, b * BLOCK, end * BLOCK, first, scales, zeros);
                add_blocks<Form, Seg, M>(units, w.packed + (row + r) * bytes + b * 64, end - b, scales, zeros, x.x + b * BLOCK * M,
                                         x.sums + b * BLOCK * M / Seg::COLUMNS * W,
                                         Ahead(w.packed, bytes, row + r + ahead, b, end), sums[r]);
                if (units.saw_nan()) {
                    std::fill_n(sums[r], M * W, std::numeric_limits<float>::quiet_NaN());
                    units = Form(w);
                }
            }
        }
        for (int r = 0; r < n; r++) {
            F rest[2 * M];
            for (F& v : rest) v = splat(0.0f);
            if (columns < w.k) dot_columns<Form::CODES, M>(w, row + r, columns, w.k, x.rest - columns, w.k - columns, rest);
            for (int m = 0; m < a.m; m++) {
                results[m][r] = sum(fma(load(sums[r] + m * W), splat(Form::RESULT), add(rest[m], rest[M + m])));
                if (std::isfinite(results[m][r])) continue;
                // x is tame, so that only a weight can do this: multiplied late, it makes another NaN or infinity
                F again[2] = {splat(0.0f), splat(0.0f)};
                dot_columns<Form::CODES, 1>(w, row + r, 0, w.k, x.natural + m * w.k, w.k, again);
                results[m][r] = sum(add(again[0], again[1]));
            }
        }
        with_type(a.x_type, [&](auto type) {
            for (int m = 0; m < a.m; m++)
                for (int r = 0; r < n; r += W)
                    put_vector<decltype(type)::type>(a, m, row + r, n - r < W ? n - r : W, load(results[m] + r), false);
        });
    }
}
