// Few rows of x against whole blocks of evenly spaced codes (int8, int4, int2), in float32: four bytes of codes per lane
// are taken apart by shifts, where a load per byte and a table take three times as long. Included inside the namespace
// of a level for x86.
//
// A unit is 4 * W columns of a plane. Lane l holds its bytes 4 l to 4 l + 3, so x has the order
// [unit][byte in the lane][lane]. The scale multiplies the sum of a unit, and a unit lies inside one group.

constexpr int64_t UNIT = 4 * W, AHEAD_BYTES = 4096;

// Whether codes stand for numbers that are 1 apart; int8 has no table.
inline bool evenly_spaced(const Weight& w) {
    if (w.codes == INT8) return true;
    if (w.codes != TABLE4 && w.codes != TABLE2) return false;
    for (int i = 1; i < 1 << bits_of(w.codes); i++)
        if (w.table[i] != w.table[0] + static_cast<float>(i)) return false;
    return true;
}

template <int CODES, int PLANE, int BYTE>
inline F code_of_word(I words) {
    if constexpr (CODES == INT8) return to_float(signed_byte<BYTE>(words));
    else return to_float(field_of_word<bits_of(CODES), 8 * BYTE + PLANE * bits_of(CODES)>(words));
}

template <int CODES, int PLANE, int M>
inline void unit_sums(I words, F zero, F scale, const float* x, int64_t ld, F* acc) {
    const auto shifted = [&](F code) { return CODES == INT8 ? code : sub(code, zero); };  // int8 has no zero here
    const F w0 = shifted(code_of_word<CODES, PLANE, 0>(words)), w1 = shifted(code_of_word<CODES, PLANE, 1>(words));
    const F w2 = shifted(code_of_word<CODES, PLANE, 2>(words)), w3 = shifted(code_of_word<CODES, PLANE, 3>(words));
    for (int m = 0; m < M; m++) {
        const float* v = x + m * ld;
        const F low = fma(w1, load(v + W), mul(w0, load(v))), high = fma(w3, load(v + 3 * W), mul(w2, load(v + 2 * W)));
        acc[m] = fma(add(low, high), scale, acc[m]);
    }
}

template <int CODES, int M>
inline void gemv_block_rows(const Linear& a, const float* natural, const float* x, int64_t ld, const float* rest, int64_t m0, Range part) {
    constexpr int PLANES = 8 / bits_of(CODES), UNITS = static_cast<int>(64 / UNIT);
    const Weight& w = a.w;
    const int64_t whole = w.k / (64 * PLANES), columns = whole * 64 * PLANES, bytes = row_bytes(CODES, w.k);
    const int64_t per_group = w.groups == 1 ? int64_t(1) << 40 : w.group / UNIT, width = round_up(w.groups, W);
    const float offset = CODES == INT8 ? 0.0f : w.table[0];  // a code is the value of its number plus this
    float* scales = static_cast<float*>(scratch(4, 2 * width * sizeof(float)));
    float* zeros = scales + width;
    for (int64_t row = part.begin; row < part.end; row++) {
        load_scales(w.scale, w.scale_type, row * w.groups, (row + 1) * w.groups, scales);
        if (w.zero) load_scales(w.zero, w.scale_type, row * w.groups, (row + 1) * w.groups, zeros);
        for (int64_t g = 0; g < w.groups; g++) zeros[g] = (w.zero ? zeros[g] : 0.0f) - offset;
        F acc[2 * M];
        for (F& v : acc) v = splat(0.0f);
        const uint8_t* packed = w.packed + row * bytes;
        int64_t g = 0, left = per_group;
        for (int64_t b = 0; b < whole; b++) {
            _mm_prefetch(reinterpret_cast<const char*>(packed + b * 64 + AHEAD_BYTES), _MM_HINT_T0);
            const auto plane = [&](auto tag) {
                constexpr int P = decltype(tag)::slot;
                for (int u = 0; u < UNITS; u++) {
                    if (left == 0) g++, left = per_group;
                    left--;
                    unit_sums<CODES, P, M>(load_words(packed + b * 64 + u * UNIT), splat(zeros[g]), splat(scales[g]),
                                           x + ((b * PLANES + P) * UNITS + u) * UNIT, ld, acc + (u & 1) * M);
                }
            };
            plane(Slot<0>{});
            if constexpr (PLANES > 1) plane(Slot<1>{});
            if constexpr (PLANES > 2) plane(Slot<2>{}), plane(Slot<3>{});
        }
        if (columns < w.k) dot_columns<CODES, M>(w, row, columns, w.k, rest - columns, w.k - columns, acc);
        bool finite = true;
        for (int m = 0; m < M; m++) finite = finite && std::isfinite(sum(add(acc[m], acc[M + m])));
        if (!finite) {
            // x is tame, so that only a scale or a zero can do this: multiplied late, it makes another NaN or infinity
            for (F& v : acc) v = splat(0.0f);
            dot_columns<CODES, M>(w, row, 0, w.k, natural + m0 * w.k, w.k, acc);
        }
        for (int m = 0; m < M; m++) put(a, m0 + m, row, sum(add(acc[m], acc[M + m])));
    }
}

// False if these kernels do not take the call.
inline bool gemv_blocks(const Linear& a) {
    const Weight& w = a.w;
    if (!evenly_spaced(w) || (w.codes == INT8 && w.zero) || (w.groups > 1 && w.group % UNIT != 0)) return false;
    const int64_t block = 64 * (8 / bits_of(w.codes)), columns = w.k / block * block, behind = w.k - columns;
    const float* natural = x_as_float(a, 0);
    float* x = static_cast<float*>(scratch(1, a.m * columns * sizeof(float)));
    float* rest = static_cast<float*>(scratch(2, a.m * behind * sizeof(float)));
    for (int64_t m = 0; m < a.m; m++) {
        const float* row = natural + m * w.k;
        float most = 0.0f;
        for (int64_t i = 0; i < columns; i += UNIT)
            for (int64_t j = 0; j < UNIT; j++) {
                const float v = row[i + j], size = std::fabs(v);
                x[m * columns + i + (j % 4) * W + j / 4] = v;
                most = size > most ? size : most;
                if (size != size) return false;
            }
        if (most >= 1.2676506e30f) return false;  // 2^100: a product could overflow before its scale brings it back
        if (behind) std::memcpy(rest + m * behind, row + columns, behind * sizeof(float));
    }
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(w.n, 32, thread, of);
        const auto run = [&](auto codes, auto rows, int64_t m) {
            gemv_block_rows<decltype(codes)::codes, decltype(rows)::slot>(a, natural, x + m * columns, columns, rest + m * behind, m, part);
        };
        const auto all = [&](auto codes) {
            int64_t m = 0;
            for (; m + 4 <= a.m; m += 4) run(codes, Slot<4>{}, m);
            for (; m + 2 <= a.m; m += 2) run(codes, Slot<2>{}, m);
            if (m < a.m) run(codes, Slot<1>{}, m);
        };
        if (w.codes == INT8) all(Tag<INT8>{});
        else if (w.codes == TABLE4) all(Tag<TABLE4>{});
        else all(Tag<TABLE2>{});
    });
    return true;
}
