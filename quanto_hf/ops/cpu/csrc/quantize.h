// Floats to packed codes, scales and zeros in one pass over memory: some rows at a time are fitted and, while they are
// in the cache, encoded. Included inside a level's namespace.
//
// Every group is computed by itself, in one order: results do not depend on the threads. -ffp-contract=off and IEEE
// division make absmax and minmax equal to torch to the last bit.

constexpr int64_t FITTED_AT_A_TIME = 16384;  // values of the rows that are fitted before they are encoded: 32 KB bfloat16

inline float read_scale(const void* p, int type, int64_t i) {
    if (type == F32) return static_cast<const float*>(p)[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void write_scale(void* p, int type, int64_t i, float value) {  // `value` is rounded already
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == F32) static_cast<float*>(p)[i] = value;
    else static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits >> 16);
}

// Rows of codes, one byte each, to the planar blocks of docs/format.md. 8 codes are shifted at a time: none has bits
// that would reach the next byte.
template <int BITS>
inline void pack_row(const uint8_t* codes, int64_t k, uint8_t* out) {
    constexpr int PLANES = 8 / BITS;
    for (; k >= PLANES * BLOCK_BYTES; k -= PLANES * BLOCK_BYTES, codes += PLANES * BLOCK_BYTES, out += BLOCK_BYTES) {
        for (int i = 0; i < BLOCK_BYTES; i += 8) {
            uint64_t packed = 0;
            for (int plane = 0; plane < PLANES; plane++) {
                uint64_t word;
                std::memcpy(&word, codes + plane * BLOCK_BYTES + i, 8);
                packed |= word << (plane * BITS);
            }
            std::memcpy(out + i, &packed, 8);
        }
    }
    const int64_t bytes = (k + PLANES - 1) / PLANES;
    for (int64_t i = 0; i < bytes; i++) {
        int packed = 0;
        for (int64_t plane = 0; plane < PLANES && plane * bytes + i < k; plane++)
            packed |= codes[plane * bytes + i] << (plane * BITS);
        out[i] = static_cast<uint8_t>(packed);
    }
}

template <int TYPE, class G>
struct Quantizer {
    const Quantize& q;
    const G grid;
    const int64_t group = q.group ? q.group : q.k;
    const int64_t full = q.group ? q.k / q.group : 0;  // groups of a row that are not cut off, and not the whole row
    const int64_t groups = q.group ? (q.k + q.group - 1) / q.group : 1;
    F bad = splat(0.0f);  // 0 * v for all values: NaN if one is not finite

    explicit Quantizer(const Quantize& quantize) : q(quantize), grid(quantize) {}

    const char* row(int64_t i) const { return static_cast<const char*>(q.in) + i * q.stride * size_of(TYPE); }

    template <bool ACROSS>
    ScaleZero fit(const float* at, int64_t count) {
        const Values<ACROSS> values = {at, count};
        float* scaled = nullptr;
        if (q.fit == HQQ) scaled = static_cast<float*>(scratch(1, round_up(count, W) * (ACROSS ? 1 : W) * sizeof(float)));
        const ScaleZero found = Fitter<Values<ACROSS>, G>{q, values, grid}(scaled);
        bad = fma(found.scale, splat(0.0f), bad);
        return found;
    }

    // The full groups [from, to) of the rows from `first_row` on, W at a time.
    void fit_groups(int64_t first_row, int64_t from, int64_t to) {
        float* values = static_cast<float*>(scratch(0, group * W * sizeof(float)));
        for (; from < to; from += W) {
            const int64_t lanes = to - from < W ? to - from : W;
            const char* at[W];
            int64_t index[W];
            for (int64_t lane = 0; lane < W; lane++) {
                // lanes without a group repeat the last one
                const int64_t g = from + (lane < lanes ? lane : lanes - 1), r = first_row + g / full;
                at[lane] = row(r) + g % full * group * size_of(TYPE);
                index[lane] = r * groups + g % full;
            }
            for (int64_t i = 0; i < group; i += W) {
                F tile[W];
                for (int lane = 0; lane < W; lane++) {
                    tile[lane] = loadn_as<TYPE>(at[lane], i, W);
                    bad = fma(tile[lane], splat(0.0f), bad);
                }
                transpose(tile);
                for (int j = 0; j < W; j++) store(values + (i + j) * W, tile[j]);
            }
            const ScaleZero found = fit<false>(values, group);
            float scale[W], zero[W];
            store(scale, found.scale), store(zero, found.zero);
            for (int64_t lane = 0; lane < lanes; lane++) {
                write_scale(q.scale, q.scale_type, index[lane], scale[lane]);
                if (q.zero) write_scale(q.zero, q.scale_type, index[lane], zero[lane]);
            }
        }
    }

    // The columns from `column` on of a row: the whole row, or its last group.
    void fit_rest(int64_t r, int64_t column) {
        const int64_t count = q.k - column;
        float* values = static_cast<float*>(scratch(0, round_up(count, W) * sizeof(float)));
        for (int64_t i = 0; i < count; i += W) {
            const F v = loadn_as<TYPE>(row(r), column + i, count - i < W ? count - i : W);
            bad = fma(v, splat(0.0f), bad);
            store(values + i, v);
        }
        const ScaleZero found = fit<true>(values, count);
        float lanes[W];
        store(lanes, found.scale);
        write_scale(q.scale, q.scale_type, r * groups + groups - 1, lanes[0]);
        store(lanes, found.zero);
        if (q.zero) write_scale(q.zero, q.scale_type, r * groups + groups - 1, lanes[0]);
    }

    void encode(int64_t r) {
        uint8_t* out = q.packed + r * row_bytes(q.codes, q.k);
        uint8_t* codes = bits_of(q.codes) == 8 ? out : static_cast<uint8_t*>(scratch(2, q.k));
        for (int64_t g = 0; g < groups; g++) {
            const F scale = splat(read_scale(q.scale, q.scale_type, r * groups + g));
            const F zero = splat(q.zero ? read_scale(q.zero, q.scale_type, r * groups + g) : 0.0f);
            const int64_t end = g + 1 < groups ? (g + 1) * group : q.k;
            for (int64_t i = g * group; i < end; i += W) {
                const int64_t n = end - i < W ? end - i : W;
                F u = div(loadn_as<TYPE>(row(r), i, n), scale);
                if (G::HAS_ZERO) u = add(u, zero);
                storen_bytes(codes + i, to_int(grid.code(u)), n);
            }
        }
        if (bits_of(q.codes) == 4) pack_row<4>(codes, q.k, out);
        if (bits_of(q.codes) == 2) pack_row<2>(codes, q.k, out);
    }

    // Whether all numbers are finite.
    bool run(Range rows) {
        const int64_t step = FITTED_AT_A_TIME / q.k > 1 ? FITTED_AT_A_TIME / q.k : 1;
        for (int64_t begin = rows.begin; begin < rows.end; begin += step) {
            const int64_t end = begin + step < rows.end ? begin + step : rows.end;
            fit_groups(begin, 0, (end - begin) * full);
            for (int64_t r = begin; r < end; r++) {
                if (full * group < q.k) fit_rest(r, full * group);
                encode(r);
            }
        }
        return sum(bad) == 0;
    }
};

template <class G>
inline bool quantize_on(const Quantize& q) {
    std::atomic<bool> finite{true};
    parallel(q.threads, [&](int thread, int of) {
        const Range part = share(q.n, 1, thread, of);
        with_type(q.in_type, [&](auto type) {
            if (!Quantizer<decltype(type)::type, G>(q).run(part)) finite = false;
        });
    });
    return finite;
}

inline bool quantize(const Quantize& q) {
    if (q.table) return quantize_on<TableGrid>(q);
    if (q.codes == E4M3) return quantize_on<FloatGrid<3, -6>>(q);
    if (q.codes == E5M2) return quantize_on<FloatGrid<2, -14>>(q);
    return quantize_on<IntGrid>(q);
}
