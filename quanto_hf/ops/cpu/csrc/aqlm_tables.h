// One to a few rows of x and codes of up to 8 bits: a row of x has only 2^bits different products with a codebook per group
// of columns. They are computed once, and an output is the sum of those that its codes name. The scale multiplies the sum,
// which aqlm_range.h must allow. Included inside a level's namespace, behind gemv.h and aqlm_decode.h.
//
//   entries  [books][out_group][in_group][stride]   the codebooks as float, lanes are entries
//   tables   [TABLE_CODES][stride]                  the products for so many codes of a row: 16 KB of the first-level cache
//   sums     [rows of x][rows of the weight]        of one thread

constexpr int64_t TABLE_CODES = 16;

inline int64_t table_stride(const Aqlm& q) { return (1 << q.bits) < W ? W : 1 << q.bits; }

// The codebooks with their entries side by side.
inline const float* turned_codebooks(const Aqlm& q) {
    const int64_t entries = int64_t{1} << q.bits, values = q.out_group * q.in_group, stride = table_stride(q);
    float* out = static_cast<float*>(scratch(2, q.books * values * stride * sizeof(float)));
    float* plain = static_cast<float*>(scratch(3, round_up(entries * values, W) * sizeof(float)));
    for (int64_t b = 0; b < q.books; b++) {
        load_scales(q.codebooks, q.book_type, b * entries * values, (b + 1) * entries * values, plain);
        for (int64_t v = 0; v < values; v++)
            for (int64_t e = 0; e < stride; e++) out[(b * values + v) * stride + e] = e < entries ? plain[e * values + v] : 0.0f;
    }
    return out;
}

// The products of the columns of code t, t + 1, ... of a row, for `count` of them.
inline void fill_tables(const Aqlm& q, const float* entries, const float* x, int64_t sub_row, int64_t t, int64_t count, float* out) {
    const int64_t stride = table_stride(q);
    for (int64_t c = 0; c < count; c++) {
        const int64_t group = (t + c) / q.books, book = (t + c) % q.books;
        const float* columns = x + group * q.in_group;
        const float* from = entries + (book * q.out_group + sub_row) * q.in_group * stride;
        for (int64_t e = 0; e < stride; e += 4 * W) {
            const int vectors = stride - e < 4 * W ? static_cast<int>((stride - e) / W) : 4;
            F v[4];
            for (F& one : v) one = splat(0.0f);
            if (vectors == 4) {
                for (int64_t i = 0; i < q.in_group; i++) {
                    const F factor = splat(columns[i]);
                    for (int u = 0; u < 4; u++) v[u] = fma(factor, load(from + i * stride + e + u * W), v[u]);
                }
            } else {
                for (int64_t i = 0; i < q.in_group; i++)
                    for (int u = 0; u < vectors; u++) v[u] = fma(splat(columns[i]), load(from + i * stride + e + u * W), v[u]);
            }
            for (int u = 0; u < vectors; u++) store(out + c * stride + e + u * W, v[u]);
        }
    }
}

// The sum of the 16 numbers that 16 codes of 8 bits name.
inline float look_up_16(const float* tables, const uint8_t* codes) {
    uint64_t low, high;
    std::memcpy(&low, codes, 8);
    std::memcpy(&high, codes + 8, 8);
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    QUANTO_UNROLL
    for (int c = 0; c < 8; c++) {
        sums[c % 2] += tables[c * 256 + (low >> (8 * c) & 255)];
        sums[2 + c % 2] += tables[(8 + c) * 256 + (high >> (8 * c) & 255)];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline float look_up(const float* tables, const uint8_t* codes, int64_t count, int64_t stride, int mask) {
    float total = 0.0f;
    for (int64_t c = 0; c < count; c++) total += tables[c * stride + (codes[c] & mask)];
    return total;
}

inline void aqlm_tables(const Linear& a) {
    const Aqlm& q = *a.w.aqlm;
    const float *x = x_as_float(a, 0), *entries = turned_codebooks(q);
    const int64_t lines = a.w.n / q.out_group, row_codes = a.w.k / q.in_group * q.books, stride = table_stride(q);
    const int mask = (1 << q.bits) - 1;
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(lines, 32, thread, of);
        const int64_t rows = (part.end - part.begin) * q.out_group;
        float* tables = static_cast<float*>(scratch(4, TABLE_CODES * stride * sizeof(float)));
        float* sums = static_cast<float*>(scratch(5, a.m * rows * sizeof(float) + W * sizeof(float)));
        std::memset(sums, 0, a.m * rows * sizeof(float));
        const uint8_t* codes = static_cast<const uint8_t*>(q.codes) + part.begin * row_codes;
        for (int64_t t = 0; t < row_codes; t += TABLE_CODES) {
            const int64_t count = row_codes - t < TABLE_CODES ? row_codes - t : TABLE_CODES;
            for (int64_t m = 0; m < a.m; m++)
                for (int64_t r = 0; r < q.out_group; r++) {
                    fill_tables(q, entries, x + m * a.w.k, r, t, count, tables);
                    float* out = sums + m * rows + r;
                    if (count == TABLE_CODES && stride == 256)
                        for (int64_t line = 0; line < part.end - part.begin; line++)
                            out[line * q.out_group] += look_up_16(tables, codes + line * row_codes + t);
                    else
                        for (int64_t line = 0; line < part.end - part.begin; line++)
                            out[line * q.out_group] += look_up(tables, codes + line * row_codes + t, count, stride, mask);
                }
        }
        for (int64_t m = 0; m < a.m; m++)
            for (int64_t i = 0; i < rows; i++) {
                const float scale = half_value(q.scales, part.begin + i / q.out_group, q.scale_type);
                put(a, m, part.begin * q.out_group + i, sums[m * rows + i] * scale);
            }
    });
}
