// x in the order in which words.h takes codes apart. Included inside the namespace of a level for x86.

constexpr int64_t X_BYTES = 16384;  // of x at a time: half of the smallest first-level cache

// How long a segment is, and whether each of its lanes has a scale of its own.
template <int UNITS_, bool LANES_>
struct Segment {
    static constexpr int UNITS = UNITS_;
    static constexpr bool LANES = LANES_;
    static constexpr int64_t COLUMNS = UNITS * UNIT, SCALES = LANES ? W : 1, STEP = COLUMNS / SCALES;  // columns per scale
};

// x of a call, by chunks of columns: [chunk][row][columns of the chunk], and the sums of its segments, W lanes each.
struct OrderedX {
    float *x, *sums, *rest;  // rest: the columns behind the last block, in the natural order
    const float* natural;    // all columns
    int64_t blocks, chunk;   // in a row, and in a chunk
};

// The products of VECTORS vectors of weights with a row of x, in CHAINS sums side by side: a processor holds about 64
// operations that wait, and with one chain of 8 multiply-adds, each 4 cycles long, those of one row leave it idle: 9.9
// cycles for 64 weights of 4 bits, 9.0 with two chains, 9.1 with four, which must be added (AVX2 on Zen 4).
constexpr int chains(int vectors, int rows) { return rows == 1 ? 2 : vectors / 4; }

template <int VECTORS, int CHAINS>
inline F product(const F* w, const float* x) {
    F sums[CHAINS];
    for (int v = 0; v < CHAINS; v++) sums[v] = mul(w[v], load(x + v * W));
    for (int v = CHAINS; v < VECTORS; v++) sums[v % CHAINS] = fma(w[v], load(x + v * W), sums[v % CHAINS]);
    for (int c = CHAINS / 2; c > 0; c /= 2)
        for (int i = 0; i < c; i++) sums[i] = add(sums[i], sums[i + c]);
    return sums[0];
}

// `rows` rows of x in the order of the kernel, and rows of zeros up to M.
template <class Form, class Seg, int M>
inline void order_x(const OrderedX& x, int64_t k, int64_t rows) {
    constexpr int64_t BLOCK = 64 * Form::PLANES;
    constexpr int VECTORS = 4 * Seg::UNITS;
    for (int64_t from = 0; from < x.blocks; from += x.chunk) {
        const int64_t count = x.blocks - from < x.chunk ? x.blocks - from : x.chunk, ld = count * BLOCK;
        float *out = x.x + from * BLOCK * M, *sums = x.sums + from * BLOCK * M / Seg::COLUMNS * W;
        for (int m = 0; m < rows; m++, out += ld, sums += ld / Seg::COLUMNS * W)
            for (int64_t b = 0; b < count; b++)
                for_each_plane<Form::PLANES>([&](auto tag) {
                    constexpr int PLANE = decltype(tag)::slot;
                    const int64_t at = b * BLOCK + PLANE * 64;
                    for (int u = 0; u < 64; u += UNIT)
                        Form::template order<PLANE>(x.natural + m * k + from * BLOCK + at + u, out + at + u);
                    if constexpr (Form::COUNTS) {
                        F ones[VECTORS];
                        for (int v = 0; v < VECTORS; v++) ones[v] = splat(Form::power(PLANE, v % 4));
                        for (int64_t u = at; u < at + 64; u += Seg::COLUMNS)
                            store(sums + u / Seg::COLUMNS * W, product<VECTORS, chains(VECTORS, M)>(ones, out + u));
                    }
                });
        std::memset(out, 0, (M - rows) * ld * sizeof(float));
        std::memset(sums, 0, (M - rows) * ld / Seg::COLUMNS * W * sizeof(float));
    }
}
