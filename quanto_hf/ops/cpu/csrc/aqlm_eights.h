// Weights of additive codes as factors of bfloat16 products, where blocks are 1 x 8, as in almost all checkpoints: entries are
// taken, or added, without the scale of the row, which multiplies the sum of the products. Included inside the namespace of
// a level with bfloat16 products, behind aqlm_decode.h.
//
// One codebook is bfloat16 here, and a weight is a copy of it; several are float32.

constexpr int FACTORS = 2 * W, GROUPS = FACTORS / 8;  // that fill a register
constexpr int64_t MOST_BOOKS = 8;

inline bool has_eights(const Aqlm& q) {
    // several codebooks of more bits would leave the caches as float32
    return q.in_group == 8 && q.out_group == 1 && (q.books == 1 ? q.bits <= 16 : q.bits <= 8 && q.books <= MOST_BOOKS);
}

// The decoders: GROUPS groups of a row, whose codes lie at `codes`, as factors.
template <class Code>
struct OneBook {
    static constexpr int64_t BYTES = GROUPS * sizeof(Code);
    const uint16_t* entries;
    size_t mask;
    explicit OneBook(const Aqlm& q) : entries(static_cast<const uint16_t*>(q.codebooks)), mask((size_t{1} << q.bits) - 1) {}
    Factors operator()(const uint8_t* codes) const {
        const uint16_t* at[GROUPS];
        QUANTO_UNROLL
        for (int g = 0; g < GROUPS; g++) {
            Code code;
            std::memcpy(&code, codes + g * sizeof(Code), sizeof(Code));
            at[g] = entries + (code & mask) * 8;
        }
        return gathered_factors(at);
    }
};

// All codes are read at once: one by one they take 1.8 times as long.
struct TwoBooks {
    static constexpr int64_t BYTES = GROUPS * 2;
    static constexpr int ENTRY = 5;  // of 2^5 bytes
    const uint8_t *first, *second;
    uint64_t mask;
    explicit TwoBooks(const Aqlm& q)
        : first(static_cast<const uint8_t*>(q.codebooks)), second(first + (size_t{32} << q.bits)), mask(((uint64_t{1} << q.bits) - 1) << ENTRY) {}
    Factors operator()(const uint8_t* codes) const {
        uint64_t word = 0;
        std::memcpy(&word, codes, BYTES);
        const auto entry = [=](const uint8_t* book, uint64_t code) { return load_eight(reinterpret_cast<const float*>(book + (code & mask))); };
        Eight v[GROUPS];
        QUANTO_UNROLL
        for (int g = 0; g < GROUPS; g++)
            v[g] = add(entry(first, g ? word >> (16 * g - ENTRY) : word << ENTRY), entry(second, word >> (16 * g + 8 - ENTRY)));
        return narrow_eights(v);
    }
};

struct MoreBooks {
    const int64_t BYTES;
    const float* entries;
    int64_t books, mask;
    explicit MoreBooks(const Aqlm& q)
        : BYTES(GROUPS * q.books), entries(static_cast<const float*>(q.codebooks)), books(q.books), mask((int64_t{1} << q.bits) - 1) {}
    Factors operator()(const uint8_t* codes) const {
        Eight v[GROUPS];
        for (int g = 0; g < GROUPS; g++, codes += books) {
            v[g] = load_eight(entries + (codes[0] & mask) * 8);
            for (int64_t b = 1; b < books; b++) v[g] = add(v[g], load_eight(entries + (b * (mask + 1) + (codes[b] & mask)) * 8));
        }
        return narrow_eights(v);
    }
};

template <class Run>
inline void with_decoder(const Aqlm& q, const Run& run) {
    if (q.books == 2) run(TwoBooks(q));
    else if (q.books > 2) run(MoreBooks(q));
    else if (q.code_bytes == 1) run(OneBook<uint8_t>(q));
    else run(OneBook<uint16_t>(q));
}

inline int64_t code_bytes_of_row(const Weight& w) { return w.k / 8 * w.aqlm->books * w.aqlm->code_bytes; }

// The codes of the last FACTORS columns of a row that does not end there, filled up with zeros: entries that x is 0 for.
struct LastCodes {
    alignas(8) uint8_t bytes[GROUPS * MOST_BOOKS] = {};
    LastCodes(const Weight& w, const uint8_t* row) {
        const int64_t all = code_bytes_of_row(w), rest = w.k % FACTORS / 8 * w.aqlm->books * w.aqlm->code_bytes;
        std::memcpy(bytes, row + all - rest, rest);
    }
};

// Few rows of x.
template <class Decoder, int M, int R>
inline void eights_product(const Linear& a, const Decoder& decode, const uint16_t* x, int64_t x_ld, Range part) {
    const int64_t bytes = code_bytes_of_row(a.w), whole = a.w.k / FACTORS;
    for (int64_t row = part.begin; row < part.end; row += R) {
        const uint8_t *first = static_cast<const uint8_t*>(a.w.aqlm->codes) + row * bytes, *codes[R];
        for (int r = 0; r < R; r++) codes[r] = row + r < part.end ? first + r * bytes : first;
        F acc[R][M];
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) acc[r][m] = splat(0.0f);
        const auto multiply = [&](const Factors* weights, int64_t column) {
            for (int m = 0; m < M; m++) {
                const Factors v = load_factors(x + m * x_ld + column);
                for (int r = 0; r < R; r++) acc[r][m] = dot_bf16(acc[r][m], weights[r], v);
            }
        };
        Factors weights[R];
        for (int64_t i = 0; i < whole; i++) {
            ask_for(first + R * bytes + i * R * decode.BYTES);  // the codes of the next R rows, in the order of their addresses
            for (int r = 0; r < R; r++) weights[r] = decode(codes[r] + i * decode.BYTES);
            multiply(weights, i * FACTORS);
        }
        if (a.w.k % FACTORS) {
            for (int r = 0; r < R; r++) weights[r] = decode(LastCodes(a.w, codes[r]).bytes);
            multiply(weights, whole * FACTORS);
        }
        for (int r = 0; r < R && row + r < part.end; r++) {
            const float scale = half_value(a.w.scale, row + r, a.w.scale_type);
            for (int m = 0; m < M; m++) put(a, m, row + r, sum(acc[r][m]) * scale);
        }
    }
}

inline void eights_rows(const Linear& a) {
    const int64_t x_ld = round_up(a.w.k, FACTORS);
    uint16_t* x = static_cast<uint16_t*>(scratch(0, a.m * x_ld * 2));
    for (int64_t m = 0; m < a.m; m++) {
        std::memcpy(x + m * x_ld, static_cast<const uint16_t*>(a.x) + m * a.w.k, a.w.k * 2);
        std::memset(x + m * x_ld + a.w.k, 0, (x_ld - a.w.k) * 2);
    }
    with_decoder(*a.w.aqlm, [&](const auto& decode) {
        parallel(a.threads, [&](int thread, int of) {
            const Range part = share(a.w.n, 32, thread, of);
            with_rows(a.m, [&](auto count) {
                constexpr int M = decltype(count)::slot, R = rows_at_a_time(M);
                eights_product<std::decay_t<decltype(decode)>, M, R>(a, decode, x, x_ld, part);
            });
        });
    });
}

// Many rows of x. The codes of some rows are copied before the first of these is decoded: a code whose address ends in
// the same 12 bits as that of a factor just written would wait for it, and with 4096 columns, where both rows are 1024
// bytes, either none or all do: 1.8 or 5.3 ms for all panels of 4096 x 4096 weights of 2x8, by where memory was given.
struct EightsPanels : DotBF16<false> {
    static constexpr int64_t TOGETHER = 16;  // rows

    static bool late(const Weight&) { return true; }
    static void panel(const Weight& w, const Tables&, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* out) {
        const Aqlm& q = *w.aqlm;
        const int64_t columns = (w.k < to ? w.k : to) - from, filled = round_up(columns, FACTORS);
        const int64_t stride = code_bytes_of_row(w), bytes = columns * stride / w.k, padded = filled * stride / w.k;
        const uint8_t* codes = static_cast<const uint8_t*>(q.codes) + row * stride + from * stride / w.k;
        with_decoder(q, [&](auto decode) {  // a copy: what it holds stays in registers
            alignas(64) uint8_t copied[TOGETHER * CHUNK / 8 * MOST_BOOKS];
            for (int64_t first = 0; first < rows; first += TOGETHER) {
                const int64_t count = rows - first < TOGETHER ? rows - first : TOGETHER;
                for (int64_t r = 0; r < count; r++) {
                    std::memcpy(copied + r * padded, codes + (first + r) * stride, bytes);
                    if (padded > bytes) std::memset(copied + r * padded + bytes, 0, padded - bytes);  // entries that x is 0 for
                }
                for (int64_t r = 0; r < count; r++, out += CHUNK) {
                    for (int64_t i = 0; i < filled / FACTORS; i++)
                        store_factors(out + i * FACTORS, decode(copied + r * padded + i * decode.BYTES));
                    if (filled < to - from) std::memset(out + filled, 0, (to - from - filled) * 2);
                }
            }
        });
    }
};

// As all others of this level.
inline void multiply(EightsPanels, const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                     int64_t columns, float* sums, int64_t sums_ld, bool first) {
    multiply(DotBF16<false>{}, panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}

// False if this is not the way to multiply.
inline bool aqlm_eights(const Linear& a) {
    if (a.x_type != BF16 || !has_eights(*a.w.aqlm) || !scale_may_come_late(a)) return false;
    const Aqlm q = with_books(*a.w.aqlm, a.w.aqlm->books == 1 ? BF16 : F32, 4, a.threads);
    Linear prepared = a;
    prepared.w.aqlm = &q, prepared.w.scale = q.scales, prepared.w.scale_type = q.scale_type;
    a.m <= GEMV_ROWS ? eights_rows(prepared) : gemm<EightsPanels>(prepared);
    return true;
}
