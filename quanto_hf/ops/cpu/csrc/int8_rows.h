// The same for one or two rows of x, where the transpose of int8_groups.h would cost more than it saves: lanes are columns
// of one row of the weight, and every 64 products per row of x are scaled. Included after int8_groups.h at a level with
// AVX-512 VNNI.
//
// Speed at 4096 x 4096, int4 with zeros, in times that of the exact kernel: 0.92 at one row with the transpose, 0.99 without,
// and 1.09 at two; int2 0.81, 1.20 and 1.02.

constexpr int64_t FEW_ROWS = 2;

// x once more, a plane of 64 columns after the other, for the 16 lanes of a product: [m][planes][W].
struct LaneX {
    int64_t planes;
    float* scales;
    int32_t* starts;
};

// How many groups of the weight a plane can meet.
enum PlaneScales { ONE, SOME };

inline bool takes_rows(const Weight& w) { return w.groups == 1 || w.group % 64 == 0 || 64 % w.group == 0; }

inline void lane_row(const RoundedX& x, int64_t m, int64_t unit, int middle, const LaneX& out) {
    float* scales = out.scales + m * out.planes * W;
    for (int64_t i = 0; i < out.planes * W; i++) {
        const int64_t u = i * 4 / unit;
        scales[i] = u < x.units ? x.scales[m * x.units + u] : 0.0f;
    }
    const I weight = _mm512_set1_epi8(static_cast<char>(middle));
    for (int64_t p = 0; p < out.planes; p++) {
        const I total = (I)dot_bytes(no_sum(), weight, _mm512_loadu_si512(x.q + m * x.ld + p * W));
        _mm512_storeu_si512(out.starts + (m * out.planes + p) * W, _mm512_sub_epi32(_mm512_setzero_si512(), total));
    }
}

// sums[r * M + m]: R rows of the weight times M rows of x, over the powers of x.
template <int BITS, PlaneScales SCALES, int M, int R>
inline void row_products(const Weight& w, const RoundedX& x, const LaneX& lanes, float offset, int64_t row, float* sums) {
    constexpr int PLANES = 8 / BITS;
    constexpr int64_t BLOCK = BLOCK_BYTES * PLANES;
    const int64_t bytes = row_bytes(w.codes, w.k), blocks = lanes.planes / PLANES, whole = w.k / BLOCK;
    const int64_t planes = w.groups == 1 ? int64_t(1) << 40 : w.group / 64;  // of a group, if there are that many
    // behind the last group: zeros, which the columns behind the last one meet
    const int64_t width = round_up((w.groups == 1 ? 0 : lanes.planes * 64 / w.group) + 2 * W, W);
    float* scales = static_cast<float*>(scratch(3, R * width * sizeof(float)));
    F acc[R][M];
    for (int r = 0; r < R; r++) {
        const int64_t from = (row + r) * w.groups;
        std::memset(scales + r * width + w.groups, 0, (width - w.groups) * sizeof(float));
        load_scales(w.scale, w.scale_type, from, from + w.groups, scales + r * width);
        for (int m = 0; m < M; m++) acc[r][m] = splat(0.0f);
        if (!w.zero) continue;
        with_type(w.scale_type, [&](auto tag) {
            for (int64_t g = 0; g < w.groups; g += W) {
                const int64_t n = w.groups - g < W ? w.groups - g : W;
                const F zero = sub(loadn_as<decltype(tag)::type>(w.zero, from + g, n), splat(offset));
                const F shift = mul(loadn(scales + r * width + g, n), zero);
                for (int m = 0; m < M; m++) acc[r][m] = fma(shift, loadn(x.shifts + m * w.groups + g, n), acc[r][m]);
            }
        });
    }
    const I which = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), w.group == 16 ? 2 : 3);
    const uint8_t* packed = w.packed + row * bytes;
    Ahead ahead(w.packed, bytes, row + R, 0, blocks);
    int64_t g = 0, left = planes;
    for (int64_t b = 0; b < blocks; b++) {
        I codes[R];
        for (int r = 0; r < R; r++) {
            alignas(64) uint8_t end[BLOCK_BYTES];
            const uint8_t* at = packed + r * bytes + b * BLOCK_BYTES;
            if (b == whole) whole_block<BITS>(at, w.k - whole * BLOCK, end), at = end;
            codes[r] = load_words(at);
            ahead.step();
        }
        QUANTO_UNROLL
        for (int p = 0; p < PLANES; p++) {
            const int64_t plane = b * PLANES + p;
            if (SCALES == ONE && left-- == 0) g++, left = planes - 1;
            for (int r = 0; r < R; r++) {
                const float* at = scales + r * width + g;
                const F scale = SCALES == ONE ? splat(*at) : _mm512_permutexvar_ps(which, load(at));
                const I numbers = field_of_bytes<BITS>(codes[r], p * BITS);
                for (int m = 0; m < M; m++) {
                    const int64_t lane = (m * lanes.planes + plane) * W;
                    const Ints dots = dot_bytes((Ints)_mm512_loadu_si512(lanes.starts + lane), numbers, _mm512_loadu_si512(x.q + m * x.ld + plane * W));
                    acc[r][m] = fma(mul(to_float((I)dots), load(lanes.scales + lane)), scale, acc[r][m]);
                }
            }
            if (SCALES == SOME) g += 64 / w.group;
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r * M + m] = sum(acc[r][m]);
}

template <int BITS, PlaneScales SCALES, int M>
inline void multiply_few(const Linear& a, const RoundedX& x, const LaneX& lanes, float offset, Range part) {
    constexpr int R = 4;
    for (int64_t row = part.begin; row < part.end; row += W) {
        const int n = static_cast<int>(part.end - row < W ? part.end - row : W);
        float sums[W * M];
        scales_ahead(a.w, row + W, W);
        int r = 0;
        for (; r + R <= n; r += R) row_products<BITS, SCALES, M, R>(a.w, x, lanes, offset, row + r, sums + r * M);
        for (; r < n; r++) row_products<BITS, SCALES, M, 1>(a.w, x, lanes, offset, row + r, sums + r * M);
        for (int m = 0; m < M; m++) {
            float column[W] = {};
            for (r = 0; r < n; r++) column[r] = sums[r * M + m];
            with_type(a.x_type, [&](auto type) {
                put_vector<decltype(type)::type>(a, m, row, n, mul(load(column), splat(x.powers[m])), false);
            });
        }
    }
}

// False if these kernels do not take the call.
inline bool few_rows(const Linear& a, const RoundedX& x, int64_t unit, int middle, float offset) {
    if (a.m > FEW_ROWS || !takes_rows(a.w)) return false;
    const int bits = bits_of(a.w.codes);
    LaneX lanes;
    lanes.planes = round_up(a.w.k, BLOCK_BYTES * (8 / bits)) / 64;
    lanes.scales = static_cast<float*>(scratch(5, 2 * a.m * lanes.planes * W * sizeof(float)));
    lanes.starts = reinterpret_cast<int32_t*>(lanes.scales + a.m * lanes.planes * W);
    for (int64_t m = 0; m < a.m; m++) lane_row(x, m, unit, middle, lanes);
    const bool one = a.w.groups == 1 || a.w.group % 64 == 0;
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        const auto run = [&](auto width, auto count) {
            constexpr int B = decltype(width)::slot, M = decltype(count)::slot;
            one ? multiply_few<B, ONE, M>(a, x, lanes, offset, part) : multiply_few<B, SOME, M>(a, x, lanes, offset, part);
        };
        if (bits == 4) a.m == 1 ? run(Slot<4>{}, Slot<1>{}) : run(Slot<4>{}, Slot<2>{});
        else a.m == 1 ? run(Slot<2>{}, Slot<1>{}) : run(Slot<2>{}, Slot<2>{});
    });
    return true;
}
