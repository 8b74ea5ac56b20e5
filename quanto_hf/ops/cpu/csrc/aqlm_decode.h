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

// n <= W values of the sum of the entries that `codes` names, from value `at` of the entries on.
template <int BOOK, class Code>
inline F aqlm_sum(const Aqlm& q, const Code* codes, int64_t at, int64_t n) {
    const int64_t values = q.out_group * q.in_group, entries = int64_t{1} << q.bits, mask = entries - 1;
    F v = loadn_as<BOOK>(q.codebooks, (codes[0] & mask) * values + at, n);
    for (int64_t b = 1; b < q.books; b++)
        v = add(v, loadn_as<BOOK>(q.codebooks, (b * entries + (codes[b] & mask)) * values + at, n));
    return v;
}

// The columns [from, to) of a row, as float. Up to W - 1 numbers behind the last one are written too: a vector that is
// cut off costs more than one that the next group overwrites.
template <int BOOK, class Code>
inline void aqlm_columns(const Weight& w, int64_t row, int64_t from, int64_t to, float* out) {
    const Aqlm& q = *w.aqlm;
    const int64_t groups = w.k / q.in_group, line = row / q.out_group, first = row % q.out_group * q.in_group;
    const Code* codes = static_cast<const Code*>(q.codes) + line * groups * q.books;
    const F scale = splat(half_value(q.scales, line, q.scale_type));
    if (q.in_group == 8 && from % 8 == 0 && to % 8 == 0) {
        constexpr int N = W < 8 ? W : 8;
        for (int64_t column = from; column < to; column += 8)
            for (int i = 0; i < 8; i += N)
                store(out + column - from + i, mul(aqlm_sum<BOOK>(q, codes + column / 8 * q.books, first + i, N), scale));
        return;
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
    for (; i + W <= count; i += W) storen_as<TYPE>(out, at + i, load(values + i), W);
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
