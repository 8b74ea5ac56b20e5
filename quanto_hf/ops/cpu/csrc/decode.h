// From codes to weights, a vector at a time and in the natural order of columns: for dequantizing, for group sizes that
// the block kernels do not take, and for the shorter block at the end of a row. Included inside a level's namespace.

template <int CODES>
inline F value(const uint8_t* p, int shift, Table table) {
    if constexpr (CODES == INT8) return to_float(load_signed(p));
    else if constexpr (CODES == E4M3) return e4m3(load_bytes(p));
    else if constexpr (CODES == E5M2) return e5m2(load_bytes(p));
    else return lookup(table, field<bits_of(CODES)>(load_bytes(p), shift));
}

template <int CODES>
inline F valuen(const uint8_t* p, int shift, Table table, int64_t n) {
    if constexpr (CODES == INT8) return to_float(loadn_signed(p, n));
    else if constexpr (CODES == E4M3) return e4m3(loadn_bytes(p, n));
    else if constexpr (CODES == E5M2) return e5m2(loadn_bytes(p, n));
    else return lookup(table, field<bits_of(CODES)>(loadn_bytes(p, n), shift));
}

inline float half_value(const void* p, int64_t i, int type) {
    if (type == F32) return static_cast<const float*>(p)[i];
    const uint16_t* h = static_cast<const uint16_t*>(p) + i;
    float lanes[W];
    store(lanes, type == BF16 ? loadn_bf16(h, 1) : loadn_f16(h, 1));
    return lanes[0];
}

// Two sums side by side hide the latency of the multiply-add: a vector goes to slot 0 or 1.
template <int SLOT>
struct Slot {
    static constexpr int slot = SLOT;
};

// Calls run(Slot<m>) for 1 to GEMV_ROWS rows of x.
template <class Run>
inline void with_rows(int64_t m, const Run& run) {
    switch (m) {
        case 1: return run(Slot<1>{});
        case 2: return run(Slot<2>{});
        case 3: return run(Slot<3>{});
        case 4: return run(Slot<4>{});
        case 5: return run(Slot<5>{});
        case 6: return run(Slot<6>{});
        case 7: return run(Slot<7>{});
        default: return run(Slot<8>{});
    }
}

// Calls step(weights, column, count, slot) for the columns [from, to) of a row, in order; count <= W weights.
// `from` is the first column of a block or of a group that starts one. Columns beyond `count` hold numbers without
// meaning. All the weights of one call share a group.
template <int CODES, class Step>
inline void for_each_weight(const Weight& w, int64_t row, int64_t from, int64_t to, const Step& step) {
    if (from >= to) return;
    constexpr int BITS = bits_of(CODES), PER_BYTE = 8 / BITS;
    constexpr int64_t BLOCK = BLOCK_BYTES * PER_BYTE;
    const uint8_t* packed = w.packed + row * row_bytes(CODES, w.k);
    Table table{};
    if constexpr (BITS < 8) table = load_table(w.table);  // others may have none
    int64_t column = from, g = from / w.group, group_end = (g + 1) * w.group;
    F scale = splat(half_value(w.scale, row * w.groups + g, w.scale_type));
    F zero = splat(w.zero ? half_value(w.zero, row * w.groups + g, w.scale_type) : 0.0f);
    while (column < to) {
        const int64_t block = column / BLOCK, base = block * BLOCK;
        const int64_t codes = w.k - base < BLOCK ? w.k - base : BLOCK, plane_bytes = (codes + PER_BYTE - 1) / PER_BYTE;
        const int64_t plane = (column - base) / plane_bytes;
        int64_t end = base + (plane + 1) * plane_bytes;
        if (end > to) end = to;
        const uint8_t* bytes = packed + block * BLOCK_BYTES - base - plane * plane_bytes;  // + column
        const int shift = static_cast<int>(plane) * BITS;
        while (column < end) {
            if (column == group_end) {
                g++, group_end += w.group;
                scale = splat(half_value(w.scale, row * w.groups + g, w.scale_type));
                if (w.zero) zero = splat(half_value(w.zero, row * w.groups + g, w.scale_type));
            }
            const int64_t stop = end < group_end ? end : group_end;
            for (; column + 2 * W <= stop; column += 2 * W) {
                step(mul(sub(value<CODES>(bytes + column, shift, table), zero), scale), column, W, Slot<0>{});
                step(mul(sub(value<CODES>(bytes + column + W, shift, table), zero), scale), column + W, W, Slot<1>{});
            }
            for (; column < stop; column += W) {
                const int n = static_cast<int>(stop - column < W ? stop - column : W);
                const F codes_there = n == W ? value<CODES>(bytes + column, shift, table)
                                             : valuen<CODES>(bytes + column, shift, table, n);
                step(mul(sub(codes_there, zero), scale), column, n, Slot<0>{});
            }
            column = stop;
        }
    }
}

// Calls run(std::integral_constant-like tag) for the way a weight is stored.
template <int CODES>
struct Tag {
    static constexpr int codes = CODES;
};
template <class Run>
inline void with_codes(int codes, const Run& run) {
    switch (codes) {
        case INT8: return run(Tag<INT8>{});
        case E4M3: return run(Tag<E4M3>{});
        case E5M2: return run(Tag<E5M2>{});
        case TABLE4: return run(Tag<TABLE4>{});
        default: return run(Tag<TABLE2>{});
    }
}

// Floats of any type, as float.
template <int TYPE>
inline F loadn_as(const void* p, int64_t i, int64_t n) {
    if constexpr (TYPE == F32) return loadn(static_cast<const float*>(p) + i, n);
    else if constexpr (TYPE == BF16) return loadn_bf16(static_cast<const uint16_t*>(p) + i, n);
    else return loadn_f16(static_cast<const uint16_t*>(p) + i, n);
}
template <int TYPE>
inline void storen_as(void* p, int64_t i, F v, int64_t n) {
    if constexpr (TYPE == F32) storen(static_cast<float*>(p) + i, v, n);
    else if constexpr (TYPE == BF16) storen_bf16(static_cast<uint16_t*>(p) + i, v, n);
    else storen_f16(static_cast<uint16_t*>(p) + i, v, n);
}
template <int TYPE>
struct TypeTag {
    static constexpr int type = TYPE;
};
template <class Run>
inline void with_type(int type, const Run& run) {
    if (type == F32) run(TypeTag<F32>{});
    else if (type == BF16) run(TypeTag<BF16>{});
    else run(TypeTag<F16>{});
}

// Scales [from, to) of a tensor, as float.
inline void load_scales(const void* p, int type, int64_t from, int64_t to, float* out) {
    with_type(type, [&](auto tag) {
        int64_t i = from;
        for (; i + W <= to; i += W) store(out + i - from, loadn_as<decltype(tag)::type>(p, i, W));
        if (i < to) storen(out + i - from, loadn_as<decltype(tag)::type>(p, i, to - i), to - i);
    });
}

// `count` rows of the weight, chosen by `rows` (null: rows 0, 1, 2, ...), to out[count][k].
inline void dequantize(const Weight& w, int out_type, void* out, const int64_t* rows, int64_t count, int threads) {
    with_codes(w.codes, [&](auto codes) {
        with_type(out_type, [&](auto type) {
            parallel(threads, [&](int thread, int of) {
                const Range part = share(count, 1, thread, of);
                for (int64_t i = part.begin; i < part.end; i++) {
                    for_each_weight<decltype(codes)::codes>(
                        w, rows ? rows[i] : i, 0, w.k,
                        [&](F v, int64_t column, int n, auto) {
                            storen_as<decltype(type)::type>(out, i * w.k + column, v, n);
                        });
                }
            });
        });
    });
}
