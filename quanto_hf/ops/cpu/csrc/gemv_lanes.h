// Five to eight rows of bfloat16 x and looked-up codes: lanes are W rows of the weight, and a pair of columns of x is
// broadcast to all of them. Included after row_lanes.h, and before gemv_bf16.h, which calls them.
//
// What costs here is operations. With columns in the lanes, the table of each group of each row, and the steps between
// chunks of x, cost as much as six rows of x: 28 cycles per 64 weights of 4 bits at 8 rows, of which the products take 16.
// Here the table holds the codes' own numbers, as in fold_sums(), and a scale multiplies the sums of 16 rows at once; the
// price is a transpose of the codes, which all rows of x share: 25 cycles, for 2 bits 22 in place of 27. Two times 16
// rows at once, to load x half as often, were no faster (29).

constexpr int64_t LANES_FROM = 5;  // rows of x: below, block_sums() and fold_sums() are as fast

// x for these kernels, by units: the columns that share a scale, 64 or 32.
struct BroadcastX {
    int32_t* pairs;  // [4 columns][2][M]: columns 0 and 2, then 1 and 3
    float* sums;     // [unit][M]
};

inline void broadcast_rows(const Linear& a, int64_t columns, int64_t unit, const BroadcastX& out) {
    alignas(64) uint16_t from[32];  // pairs of 32 columns
    for (int i = 0; i < 32; i++) from[i] = static_cast<uint16_t>(i / 4 * 4 + i % 2 * 2 + i / 2 % 2);
    const __m512i order = _mm512_load_si512(from);
    const auto some = static_cast<__mmask16>((1 << a.m) - 1);
    for (int64_t k = 0; k < columns; k += 32) {
        const int64_t left = a.w.k - k;
        const __mmask32 mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
        F v[W];
        for (int m = 0; m < W; m++) {
            const __m512i x = m < a.m ? _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(a.x) + m * a.w.k + k) : _mm512_setzero_si512();
            v[m] = as_float(_mm512_permutexvar_epi16(order, x));
            if (m >= a.m) continue;
            float* total = out.sums + k / unit * a.m + m;
            *total = (k % unit ? *total : 0.0f) + sum(dot_bf16(splat(0.0f), as_int(v[m]), _mm512_set1_epi16(0x3F80)));
        }
        transpose(v);
        for (int i = 0; i < W; i++) _mm512_mask_storeu_epi32(out.pairs + (k / 2 + i) * a.m, some, as_int(v[i]));
    }
}

// totals[m]: the products of W rows of the weight with M rows of x.
template <int BITS, int UNIT, int M>
inline void lane_totals(const Weight& w, const BroadcastX& x, const LaneScales& lanes, __m512i table, int64_t row, F* totals) {
    constexpr int PLANES = 8 / BITS;
    constexpr int64_t BLOCK = BLOCK_BYTES * PLANES;
    const int64_t bytes = row_bytes(w.codes, w.k), whole = w.k / BLOCK, blocks = (w.k + BLOCK - 1) / BLOCK;
    const int64_t units = w.groups == 1 ? int64_t(1) << 40 : w.group / UNIT;
    Ahead ahead(w.packed, bytes, row + W, 0, blocks);
    const int32_t* pairs = x.pairs;
    const float *sums = x.sums, *scale = lanes.scales, *zero = lanes.zeros;
    int64_t left = units;
    F total[M];  // not `totals`, which would be written at each step
    for (int m = 0; m < M; m++) total[m] = splat(0.0f);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* rows[W];
        uint8_t ends[W][BLOCK_BYTES];
        for (int i = 0; i < W; i++) {
            rows[i] = w.packed + (row + i < w.n ? row + i : w.n - 1) * bytes + b * BLOCK_BYTES;
            if (b == whole) whole_block<BITS>(rows[i], w.k - whole * BLOCK, ends[i]), rows[i] = ends[i];
            ahead.step();
        }
        F codes[W];
        for (int i = 0; i < W; i++) codes[i] = load(reinterpret_cast<const float*>(rows[i]));
        transpose(codes);
        QUANTO_UNROLL
        for (int p = 0; p < PLANES; p++)
            for (int d = 0; d < W;) {
                F acc[M];
                for (int m = 0; m < M; m++) acc[m] = zero ? mul(load(zero), splat(sums[m])) : splat(0.0f);
                for (const int end = d + UNIT / 4; d < end; d++, pairs += 2 * M) {
                    const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(as_int(codes[d]), p * BITS), table);
                    const __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(as_int(codes[d]), 8 + p * BITS), table);
                    for (int m = 0; m < M; m++) acc[m] = dot_bf16(acc[m], even, _mm512_set1_epi32(pairs[m]));
                    for (int m = 0; m < M; m++) acc[m] = dot_bf16(acc[m], odd, _mm512_set1_epi32(pairs[M + m]));
                }
                for (int m = 0; m < M; m++) total[m] = fma(acc[m], load(scale), total[m]);
                sums += M;
                if (--left == 0) {
                    left = units, scale += W;
                    if (zero) zero += W;
                }
            }
    }
    for (int m = 0; m < M; m++) totals[m] = total[m];
}

// False if these kernels do not take the call. `plain` computes rows of the weight another way.
template <class Plain>
inline bool gemv_lanes(const Linear& a, const Plain& plain) {
    const Weight& w = a.w;
    if (a.m < LANES_FROM || bits_of(w.codes) == 8) return false;
    const int bits = bits_of(w.codes);
    const int64_t unit = w.groups == 1 || w.group % 64 == 0 ? 64 : 32, columns = round_up(w.k, BLOCK_BYTES * (8 / bits));
    BroadcastX x;
    x.pairs = static_cast<int32_t*>(scratch(3, a.m * (columns / 2 + columns / unit) * sizeof(int32_t)));
    x.sums = reinterpret_cast<float*>(x.pairs + a.m * columns / 2);
    broadcast_rows(a, columns, unit, x);
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(w.n, 32, thread, of);
        const int64_t groups = round_up(w.groups, W) + columns / unit;  // blocks go on behind the last group
        float* scales = static_cast<float*>(scratch(4, 2 * groups * W * sizeof(float)));
        std::memset(scales, 0, 2 * groups * W * sizeof(float));
        const LaneScales lanes = {scales, w.zero ? scales + groups * W : nullptr};
        const F numbers = bits == 4 ? load_table(w.table) : _mm512_broadcast_f32x4(_mm_loadu_ps(w.table));
        const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(numbers));
        for (int64_t row = part.begin; row < part.end; row += W) {
            const int64_t n = part.end - row < W ? part.end - row : W;
            lane_scales(w, w.scale, row, 0.0f, lanes.scales);
            if (w.zero) {
                lane_scales(w, w.zero, row, 0.0f, lanes.zeros);
                for (int64_t i = 0; i < w.groups * W; i += W) store(lanes.zeros + i, sub(splat(0.0f), load(lanes.zeros + i)));
            }
            scales_ahead(w, row + W, W);
            F totals[GEMV_ROWS];
            const auto run = [&](auto count) {
                constexpr int M = decltype(count)::slot;
                if (bits == 4) unit == 64 ? lane_totals<4, 64, M>(w, x, lanes, table, row, totals) : lane_totals<4, 32, M>(w, x, lanes, table, row, totals);
                else unit == 64 ? lane_totals<2, 64, M>(w, x, lanes, table, row, totals) : lane_totals<2, 32, M>(w, x, lanes, table, row, totals);
            };
            switch (a.m) {
                case 5: run(Slot<5>{}); break;
                case 6: run(Slot<6>{}); break;
                case 7: run(Slot<7>{}); break;
                default: run(Slot<8>{});
            }
            bool finite = true;
            for (int64_t m = 0; m < a.m; m++) {
                finite = finite && is_finite(totals[m]);
                put_vector<BF16>(a, m, row, n, totals[m], false);
            }
            // x is tame, so that only a scale or a zero can do this: NaN, infinite, or too large for their product
            if (!finite) plain(Range{row, row + n});
        }
    });
    return true;
}
