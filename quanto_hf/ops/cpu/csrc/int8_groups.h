// int4 and int2 weights times x in int8, each 32 columns of a row of x with a scale of their own. Included inside the
// namespace of a level for x86 that has a ByteDot.
//
// Lanes are W rows of the weight: a lane holds four columns of a row, and meets the same four columns of x in all lanes.
// The scales of x and of the weight then multiply the sums of W rows and of a whole unit at once; with columns in the
// lanes they would multiply sums of four products. The price is a transpose of the codes, which all rows of x share.

constexpr int64_t BYTE_CHUNK = 512, BYTE_PANEL = 96, BYTE_MAX_X = 512;
constexpr int BYTE_ROWS = W == 16 ? 8 : 4;  // of x at a time: three registers each

// The blocks [b0, b1) of the rows [row, row + W) as bytes: [column / 4][W][4]. The last row stands for those behind it.
template <int BITS>
inline void code_panel(const Weight& w, int64_t row, int64_t b0, int64_t b1, Ahead& ahead, uint8_t* out) {
    constexpr int PLANES = 8 / BITS;
    constexpr int64_t BLOCK = BLOCK_BYTES * PLANES, PARTS = BLOCK_BYTES / (4 * W);
    const int64_t bytes = row_bytes(w.codes, w.k), whole = w.k / BLOCK;
    for (int64_t b = b0; b < b1; b++) {
        const uint8_t* rows[W];
        uint8_t ends[W][BLOCK_BYTES];
        for (int i = 0; i < W; i++) {
            rows[i] = w.packed + (row + i < w.n ? row + i : w.n - 1) * bytes + b * BLOCK_BYTES;
            if (b == whole) whole_block<BITS>(rows[i], w.k - whole * BLOCK, ends[i]), rows[i] = ends[i];
            ahead.step();
        }
        for (int part = 0; part < PARTS; part++) {
            F v[W];
            for (int i = 0; i < W; i++) v[i] = load(reinterpret_cast<const float*>(rows[i]) + part * W);
            transpose(v);
            QUANTO_UNROLL
            for (int p = 0; p < PLANES; p++)
                for (int i = 0; i < W; i++)
                    store_words(out + (((b - b0) * PLANES + p) * BLOCK_BYTES / 4 + part * W + i) * 4 * W, field_of_bytes<BITS>(as_int(v[i]), p * BITS));
        }
    }
}

// sums[m] += the units [u0, u1) of W rows of the weight with M rows of x, from row m on; `units`: of a group.
template <int M, int UNIT>
inline void unit_products(const uint8_t* panel, const RoundedX& x, int64_t m0, int64_t u0, int64_t u1, int64_t units, int64_t groups,
                          const LaneScales& lanes, float* sums) {
    constexpr int DWORDS = UNIT / 4;
    const int32_t *q = x.q + m0 * x.ld + u0 * DWORDS, *starts = x.starts + m0 * x.units;
    const float* scales = x.scales + m0 * x.units;
    F total[M];
    for (int m = 0; m < M; m++) total[m] = load(sums + m * W);
    int64_t g = u0 / units, end = (g + 1) * units;
    for (int64_t u = u0; u < u1; g++, end += units) {
        F part[M];
        const bool shifted = lanes.zeros && u == g * units;
        for (int m = 0; m < M; m++)
            part[m] = shifted ? mul(load(lanes.zeros + g * W), splat(x.shifts[(m0 + m) * groups + g])) : splat(0.0f);
        for (; u < u1 && u < end; u++) {
            typename ByteDot::Sum acc[M];
            for (int m = 0; m < M; m++) acc[m] = ByteDot::begin(starts[m * x.units + u]);
            for (int d = 0; d < DWORDS; d++) {
                const I codes = load_words(panel);
                panel += 4 * W;
                for (int m = 0; m < M; m++) acc[m] = ByteDot::step(acc[m], codes, q[m * x.ld + d]);
            }
            q += DWORDS;
            for (int m = 0; m < M; m++)
                part[m] = fma(ByteDot::end(acc[m], starts[m * x.units + u]), splat(scales[m * x.units + u]), part[m]);
        }
        const F scale = load(lanes.scales + g * W);
        for (int m = 0; m < M; m++) total[m] = fma(part[m], scale, total[m]);
    }
    for (int m = 0; m < M; m++) store(sums + m * W, total[m]);
}

// The same for `count` rows of x.
template <int M, int UNIT, class... Rest>
inline void all_products(int64_t count, float* sums, const uint8_t* panel, const RoundedX& x, int64_t m0, const Rest&... rest) {
    for (; count >= M; count -= M, m0 += M, sums += M * W) unit_products<M, UNIT>(panel, x, m0, rest..., sums);
    if constexpr (M > 1) {
        if (count) all_products<M - 1, UNIT>(count, sums, panel, x, m0, rest...);
    }
}

template <int BITS, int UNIT>
inline void multiply_rows(const Linear& a, const RoundedX& x, bool zeros, float offset, Range part) {
    const Weight& w = a.w;
    constexpr int64_t BLOCK = BLOCK_BYTES * (8 / BITS), STEP = BYTE_CHUNK / BLOCK;
    const int64_t units = w.groups == 1 ? x.units : w.group / UNIT, blocks = (w.k + BLOCK - 1) / BLOCK;
    const int64_t tiles = a.m <= GEMV_ROWS ? 1 : BYTE_PANEL / W, lane_numbers = w.groups * W;
    uint8_t* panel = static_cast<uint8_t*>(scratch(2, BYTE_CHUNK * W));
    float* scales = static_cast<float*>(scratch(3, 2 * tiles * lane_numbers * sizeof(float)));
    for (int64_t m0 = 0; m0 < a.m; m0 += BYTE_MAX_X) {
        const int64_t count = a.m - m0 < BYTE_MAX_X ? a.m - m0 : BYTE_MAX_X;
        float* sums = static_cast<float*>(scratch(4, tiles * count * W * sizeof(float)));
        for (int64_t row = part.begin; row < part.end; row += tiles * W) {
            const int64_t here = part.end - row < tiles * W ? (part.end - row + W - 1) / W : tiles;
            const auto lanes = [&](int64_t t) {
                float* at = scales + 2 * t * lane_numbers;
                return LaneScales{at, zeros ? at + lane_numbers : nullptr};
            };
            for (int64_t t = 0; t < here; t++) {
                lane_scales(w, w.scale, row + t * W, 0.0f, lanes(t).scales);
                if (zeros) lane_scales(w, w.zero, row + t * W, offset, lanes(t).zeros);
            }
            scales_ahead(w, row + tiles * W, tiles * W);
            std::memset(sums, 0, here * count * W * sizeof(float));
            Ahead whole(w.packed, row_bytes(w.codes, w.k), row + W, 0, blocks);
            for (int64_t b = 0; b < blocks; b += STEP) {
                const int64_t b1 = b + STEP < blocks ? b + STEP : blocks, end = b1 * BLOCK / UNIT;
                for (int64_t t = 0; t < here; t++) {
                    Ahead next(w.packed, row_bytes(w.codes, w.k), row + (t + 1) * W, b, b1);
                    code_panel<BITS>(w, row + t * W, b, b1, tiles == 1 ? whole : next, panel);
                    all_products<BYTE_ROWS, UNIT>(count, sums + t * count * W, panel, x, m0, b * BLOCK / UNIT,
                                                  end < x.units ? end : x.units, units, w.groups, lanes(t));
                }
            }
            for (int64_t t = 0; t < here; t++)
                for (int64_t m = 0; m < count; m++) {
                    const int64_t at = row + t * W, n = part.end - at < W ? part.end - at : W;
                    with_type(a.x_type, [&](auto type) {
                        put_vector<decltype(type)::type>(a, m0 + m, at, n, mul(load(sums + (t * count + m) * W), splat(x.powers[m0 + m])), false);
                    });
                }
        }
    }
}
