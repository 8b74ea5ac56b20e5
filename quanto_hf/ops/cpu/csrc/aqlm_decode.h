// From additive codes (Aqlm in common.h) to weights. Included inside a level's namespace, behind decode.h.

// Calls run(book, code): the type of the codebooks as a TypeTag, and a 0 of the type of the codes.
template <class Run>
inline void with_aqlm(const Aqlm& q, const Run& run) {
    with_type(q.book_type, [&](auto book) {
        if (q.code_bytes == 1) run(book, int8_t{0});
        else if (q.code_bytes == 2) run(book, int16_t{0});
        else run(book, int32_t{0});
    });
}

// The codebooks in the type that is decoded from. Into `slot`, unless they have it already.
inline Aqlm with_books(const Aqlm& q, int type, int slot, int threads) {
    Aqlm out = q;
    if (q.book_type == type) return out;
    const int64_t values = (q.books << q.bits) * q.out_group * q.in_group;
    void* books = scratch(slot, round_up(values, W) * size_of(type));
    parallel(values > 65536 ? threads : 1, [&](int thread, int of) {
        const Range part = share(values, 64, thread, of);
        with_type(q.book_type, [&](auto from) {
            for (int64_t i = part.begin; i < part.end; i += W) {
                const int64_t n = part.end - i < W ? part.end - i : W;
                const F v = loadn_as<decltype(from)::type>(q.codebooks, i, n);
                if (type == F32) storen_as<F32>(books, i, v, n);
                else storen_as<BF16>(books, i, v, n);
            }
        });
    });
    out.codebooks = books, out.book_type = type;
    return out;
}

// n <= W values of the sum of the entries that `codes` names, from value `at` of the entries on.
template <int BOOK, class Code>
inline F aqlm_sum(const Aqlm& q, const Code* codes, int64_t at, int64_t n) {
    const int64_t values = q.out_group * q.in_group, entries = int64_t{1} << q.bits, mask = entries - 1;
    F v = loadn_as<BOOK>(q.codebooks, (codes[0] & mask) * values + at, n);
    for (int64_t b = 1; b < q.books; b++)
        v = add(v, loadn_as<BOOK>(q.codebooks, (b * entries + (codes[b] & mask)) * values + at, n));
    return v;
}

// load_runs of any type, from the i-th numbers on.
template <int TYPE>
inline F runs_as(const void* p, const void* next, int64_t i) {
    if constexpr (TYPE == F32) {
        return load_runs(static_cast<const float*>(p) + i, static_cast<const float*>(next) + i);
    } else {
        const uint16_t *half = static_cast<const uint16_t*>(p) + i, *next_half = static_cast<const uint16_t*>(next) + i;
        if constexpr (TYPE == BF16) return load_runs_bf16(half, next_half);
        else return load_runs_f16(half, next_half);
    }
}

// What almost all checkpoints have, blocks of 1 x 8 values: entries fill vectors. BOOKS: how many there are; 0: any number.
template <int BOOK, class Code, int BOOKS>
inline void eight_columns(const Aqlm& q, const Code* codes, F scale, int64_t groups, float* out) {
    constexpr int RUNS = W > 8 ? W / 8 : 1;  // groups in a vector
    const int64_t mask = (int64_t{1} << q.bits) - 1, books = BOOKS ? BOOKS : q.books;
    const int64_t book_bytes = (mask + 1) * 8 * size_of(BOOK);
    const uint8_t* entries = static_cast<const uint8_t*>(q.codebooks);
    const auto at = [=](int64_t group, int64_t book) {
        return entries + book * book_bytes + (codes[group * books + book] & mask) * (8 * size_of(BOOK));
    };
    for (int64_t group = 0; group < groups; group += RUNS) {
        const int64_t next = group + RUNS - 1 < groups ? group + RUNS - 1 : group;
        for (int i = 0; i < 8; i += W) {
            F v = runs_as<BOOK>(at(group, 0), at(next, 0), i);
            for (int64_t b = 1; b < books; b++) v = add(v, runs_as<BOOK>(at(group, b), at(next, b), i));
            store(out + group * 8 + i, mul(v, scale));
        }
    }
}

// The columns [from, to) of a row, as float. Up to W - 1 numbers behind the last one are written too: a vector that is
// cut off costs more than one that the next group overwrites.
template <int BOOK, class Code>
inline void aqlm_columns(const Weight& w, int64_t row, int64_t from, int64_t to, float* out) {
    const Aqlm& q = *w.aqlm;
    const int64_t groups = w.k / q.in_group, line = row / q.out_group, first = row % q.out_group * q.in_group;
    const Code* codes = static_cast<const Code*>(q.codes) + line * groups * q.books;
    const F scale = splat(half_value(q.scales, line, q.scale_type));
    if (q.in_group == 8 && q.out_group == 1 && from % 8 == 0 && to % 8 == 0) {
        codes += from / 8 * q.books;
        if (q.books == 1) return eight_columns<BOOK, Code, 1>(q, codes, scale, (to - from) / 8, out);
        if (q.books == 2) return eight_columns<BOOK, Code, 2>(q, codes, scale, (to - from) / 8, out);
        return eight_columns<BOOK, Code, 0>(q, codes, scale, (to - from) / 8, out);
    }
    for (int64_t column = from; column < to;) {
        const int64_t group = column / q.in_group, start = column - group * q.in_group;
        const int64_t count = to - column < q.in_group - start ? to - column : q.in_group - start;
        for (int64_t i = 0; i < count; i += W) {
            const int64_t n = count - i < W ? count - i : W;
            store(out + column - from + i, mul(aqlm_sum<BOOK>(q, codes + group * q.books, first + start + i, n), scale));
        }
        column += count;
    }
}

// The codes of these columns of a row that is decoded later: rows lie too far apart for the prefetchers of a processor.
inline void ask_for_codes(const Weight& w, int64_t row, int64_t from, int64_t to) {
    const Aqlm& q = *w.aqlm;
    if (row >= w.n) return;
    const int64_t group = q.books * q.code_bytes, begin = (row / q.out_group * (w.k / q.in_group) + from / q.in_group) * group;
    for (int64_t i = 0; i < (to - from) / q.in_group * group; i += 64) ask_for(static_cast<const uint8_t*>(q.codes) + begin + i);
}

constexpr int64_t AQLM_AHEAD = 12;   // rows
constexpr int64_t AQLM_CHUNK = 512;  // columns that are decoded at a time, into memory that stays in the first-level cache

// Calls step(values, column, count) for the chunks of the columns [from, to) of a row, in order.
template <int BOOK, class Code, class Step>
inline void for_each_chunk(const Weight& w, int64_t row, int64_t from, int64_t to, const Step& step) {
    alignas(64) float values[AQLM_CHUNK + W];
    for (int64_t column = from; column < to; column += AQLM_CHUNK) {
        const int64_t count = to - column < AQLM_CHUNK ? to - column : AQLM_CHUNK;
        aqlm_columns<BOOK, Code>(w, row, column, column + count, values);
        step(values, column, count);
    }
}

// `count` floats to numbers of a type.
template <int TYPE>
inline void put_floats(const float* values, int64_t count, void* out, int64_t at) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        // a store of a part, even of all of it, takes several times as long
        if constexpr (TYPE == F32) store(static_cast<float*>(out) + at + i, load(values + i));
        else if constexpr (TYPE == BF16) store_bf16(static_cast<uint16_t*>(out) + at + i, load(values + i));
        else storen_as<TYPE>(out, at + i, load(values + i), W);
    }
    if (i < count) storen_as<TYPE>(out, at + i, load(values + i), count - i);
}

inline void aqlm_dequantize(const Weight& w, int out_type, void* out, int threads) {
    with_aqlm(*w.aqlm, [&](auto book, auto code) {
        with_type(out_type, [&](auto type) {
            parallel(threads, [&](int thread, int of) {
                const Range part = share(w.n, 1, thread, of);
                for (int64_t row = part.begin; row < part.end; row++)
                    for_each_chunk<decltype(book)::type, decltype(code)>(
                        w, row, 0, w.k, [&](const float* values, int64_t column, int64_t count) {
                            put_floats<decltype(type)::type>(values, count, out, row * w.k + column);
                        });
            });
        });
    });
}
