// Few rows of bfloat16 x: blocks of codes become pairs of bfloat16 in registers and go through vdpbf16ps. Included
// inside the namespace of a level that has AVX-512 BF16 and VBMI.

constexpr int64_t X_BYTES = 16384;  // of x in a step: half of the smallest first-level cache
constexpr int ROWS = 16;            // of the weight at a time: their sums become one vector of the output

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

// One or two rows of x and looked-up codes: what costs is the weight, not the product. The table holds the codes'
// own numbers, the same for all groups (exact in bfloat16 but for nf4, whose weights are rounded in any case), and the scale multiplies the sum of 64 (HALVES: 32) products in float32:
// 7 operations per 64 weights where a table per group takes 10. Zeros: sum((c - z) * s * x) = s * sum(c * x) - s * z * sum(x).
struct Folded {
    const float* x_sums;  // [rows of x][groups]: sums of the columns that are handled as blocks, or null without zeros
};

template <int BITS, bool HALVES, int M, int R>
inline void fold_sums(const Weight& w, const Folded& folded, int64_t row, int64_t blocks, const uint16_t* x, int64_t ld, F* sums) {
    constexpr int PLANES = 8 / BITS, UNIT = HALVES ? 32 : 64;
    const int64_t bytes = row_bytes(BITS == 4 ? TABLE4 : TABLE2, w.k), width = round_up(w.groups, W);
    const int64_t units = w.groups == 1 ? int64_t(1) << 40 : w.group / UNIT;  // per group
    float* scales = static_cast<float*>(scratch(5, R * width * sizeof(float)));
    F acc[R][M];
    for (int r = 0; r < R; r++) {
        const int64_t from = (row + r) * w.groups, to = from + w.groups;
        load_scales(w.scale, w.scale_type, from, to, scales + r * width);
        for (int m = 0; m < M; m++) acc[r][m] = splat(0.0f);
        if (!w.zero) continue;
        with_type(w.scale_type, [&](auto tag) {
            for (int64_t g = 0; g < w.groups; g += W) {
                const int64_t n = w.groups - g < W ? w.groups - g : W;
                // behind the last group the memory holds what an earlier call left there
                const F shift = mul(loadn(scales + r * width + g, n), loadn_as<decltype(tag)::type>(w.zero, from + g, n));
                for (int m = 0; m < M; m++)
                    acc[r][m] = sub(acc[r][m], mul(shift, loadn(folded.x_sums + m * width + g, n)));
            }
        });
    }
    const F numbers = BITS == 4 ? load_table(w.table) : _mm512_broadcast_f32x4(_mm_loadu_ps(w.table));
    const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(numbers));
    const uint8_t* packed = w.packed + row * bytes;
    Ahead ahead(w.packed, bytes, row + R, 0, blocks);
    int64_t g = 0, in_group = 0;
    for (int64_t b = 0; b < blocks; b++) {
        __m512i codes[R];
        for (int r = 0; r < R; r++) {
            codes[r] = _mm512_loadu_si512(packed + r * bytes + b * 64);
            ahead.step();
        }
        QUANTO_UNROLL
        for (int p = 0; p < PLANES; p++) {
            const float* low = scales + g;
            if (++in_group == units) in_group = 0, g++;
            const float* high = scales + g;
            if (HALVES && ++in_group == units) in_group = 0, g++;
            for (int r = 0; r < R; r++) {
                F scale = splat(low[r * width]);
                if (HALVES) scale = _mm512_mask_broadcastss_ps(scale, 0xFF00, _mm_load_ss(high + r * width));
                const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes[r], p * BITS), table);
                const __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes[r], 8 + p * BITS), table);
                for (int m = 0; m < M; m++) {
                    const uint16_t* v = x + m * ld + (b * PLANES + p) * 64;
                    const F products = dot_bf16(dot_bf16(splat(0.0f), even, _mm512_loadu_si512(v)), odd, _mm512_loadu_si512(v + 32));
                    acc[r][m] = fma(products, scale, acc[r][m]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r * M + m] = acc[r][m];
}

// x is in the order of the blocks; `rest` holds the columns behind them as float32, or is null.
template <int CODES, int M, bool FOLD>
inline void gemv_bf16_rows(const Linear& a, const ByteTable& t, const Folded& folded, const uint16_t* x, int64_t ld,
                           const float* rest, Range part) {
    constexpr int64_t BLOCK = BLOCK_BYTES * (8 / bits_of(CODES)), STEP = X_BYTES / (2 * BLOCK * M);
    constexpr int R = M <= 2 ? 4 : 2;
    constexpr bool LATE = bits_of(CODES) == 8;
    const int64_t columns = block_columns(a.w), whole = columns / BLOCK;
    alignas(64) F sums[ROWS * M];
    for (int64_t row = part.begin; row < part.end; row += ROWS) {
        const int n = static_cast<int>(part.end - row < ROWS ? part.end - row : ROWS);
        if constexpr (FOLD) {
            const auto fold = [&](auto halves, auto count, int r) {
                fold_sums<bits_of(CODES), decltype(halves)::slot, M, decltype(count)::slot>(a.w, folded, row + r, whole, x, ld, sums + r * M);
            };
            const bool halves = a.w.groups > 1 && a.w.group % 64 != 0;
            int r = 0;
            for (; r + R <= n; r += R) halves ? fold(Slot<1>{}, Slot<R>{}, r) : fold(Slot<0>{}, Slot<R>{}, r);
            for (; r < n; r++) halves ? fold(Slot<1>{}, Slot<1>{}, r) : fold(Slot<0>{}, Slot<1>{}, r);
            // x is tame, so that only a scale or a zero can do this: NaN, infinite, or too large for their product
            for (r = 0; r < n; r++)
                for (int m = 0; m < M; m++)
                    if (!is_finite(sums[r * M + m])) {
                        block_sums<CODES, M, 1>(a.w, t, row + r, 0, whole, x, ld, sums + r * M);
                        break;
                    }
        } else {
            for (int64_t b = 0; b < whole || b == 0; b += STEP) {
                const int64_t end = b + STEP < whole ? b + STEP : whole;
                int r = 0;
                for (; r + R <= n; r += R) block_sums<CODES, M, R>(a.w, t, row + r, b, end, x, ld, sums + r * M);
                for (; r < n; r++) block_sums<CODES, M, 1>(a.w, t, row + r, b, end, x, ld, sums + r * M);
            }
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
            put_vector<BF16>(a, m, row, n, v[0], LATE);
        }
    }
}

inline void gemv_bf16(const Linear& a) {
    const Weight& w = a.w;
    const int64_t columns = block_columns(w), padded = round_up(columns > w.k ? columns : w.k, 64);
    const int64_t behind = columns < w.k ? w.k - columns : 0;
    // Rows of x are an odd number of half pages apart: a power of two would put them all into the same few sets of the
    // first-level cache.
    const int64_t ld = round_up(padded, 2048) + 1024;
    uint16_t* x = static_cast<uint16_t*>(scratch(0, a.m * ld * 2));
    float* rest = static_cast<float*>(scratch(1, a.m * behind * sizeof(float)));
    bool fold = (a.m <= 2 || a.m >= LANES_FROM) && bits_of(w.codes) < 8;
    for (int64_t m = 0; m < a.m; m++) {
        const uint16_t* row = static_cast<const uint16_t*>(a.x) + m * w.k;
        fold = fold && is_tame(row, w.k);
        order_row(w, row, padded, x + m * ld);
        for (int64_t i = 0; i < behind; i += W) {
            const int64_t n = behind - i < W ? behind - i : W;
            storen(rest + m * behind + i, loadn_bf16(row + columns + i, n), n);
        }
    }
    Folded folded = {nullptr};
    const auto some_rows = [&](Range part, auto folds) {
        with_codes(w.codes, [&](auto tag) {
            constexpr int C = decltype(tag)::codes;
            constexpr bool FOLD = decltype(folds)::slot;
            ByteTable t;
            if constexpr (bits_of(C) == 8) t = byte_table<C>();
            const auto run = [&](auto count) {
                constexpr int M = decltype(count)::slot;
                if constexpr (!FOLD || (bits_of(C) < 8 && M <= 2))
                    gemv_bf16_rows<C, M, FOLD>(a, t, folded, x, ld, behind ? rest : nullptr, part);
            };
            with_rows(a.m, run);
        });
    };
    if (fold && gemv_lanes(a, [&](Range part) { some_rows(part, Slot<0>{}); })) return;
    if (fold && w.zero) {
        const int64_t width = round_up(w.groups, W);
        float* sums = static_cast<float*>(scratch(2, a.m * width * sizeof(float)));
        for (int64_t m = 0; m < a.m; m++)
            for (int64_t g = 0; g < w.groups; g++) {
                const uint16_t* row = static_cast<const uint16_t*>(a.x) + m * w.k;
                const int64_t end = (g + 1) * w.group < columns ? (g + 1) * w.group : columns;
                F total = splat(0.0f);
                for (int64_t i = g * w.group; i < end; i += W) total = add(total, loadn_bf16(row + i, end - i));
                sums[m * width + g] = sum(total);
            }
        folded.x_sums = sums;
    }
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(w.n, 32, thread, of);
        fold ? some_rows(part, Slot<1>{}) : some_rows(part, Slot<0>{});
    });
}
