// Blocks of codes to bfloat16, 64 columns at a time, for AVX-512 BF16 and VBMI. Included inside a level's namespace.
//
// Codes of 2 and 4 bits: the weights of a group take at most 16 values. They are computed once per group, rounded to
// bfloat16 as the reference rounds them, to the bit, and one vpermw looks up 32 weights. A 16-bit lane holds two bytes, so that a
// plane of 64 codes gives the 32 even ones first, then the 32 odd ones: x is brought into the same order.
// Codes of 8 bits with one scale per row: two vpermi2b give the high and the low bytes of 64 codes as bfloat16 (exact);
// the scale multiplies the sum.

// Numbers for products in bfloat16: subnormal ones become 0, as vdpbf16ps takes them anyway.
inline void store_factors(uint16_t* p, F v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

using Factors = __m512i;
inline Factors load_factors(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline void store_factors(uint16_t* p, Factors v) { _mm512_storeu_si512(p, v); }
// Four times 8 factors, from as many places or of as many numbers.
inline Factors join(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
inline Factors gathered_factors(const uint16_t* const (&p)[4]) { return join(half_runs(p[0], p[1]), half_runs(p[2], p[3])); }
using Eight = __m256;
inline Eight load_eight(const float* p) { return _mm256_loadu_ps(p); }
inline Eight add(Eight a, Eight b) { return _mm256_add_ps(a, b); }
inline Factors narrow_eights(const Eight (&v)[4]) {
    return join((__m256i)_mm256_cvtne2ps_pbh(v[1], v[0]), (__m256i)_mm256_cvtne2ps_pbh(v[3], v[2]));
}

// Whether these kernels take a weight.
inline bool has_blocks(const Weight& w) {
    if (bits_of(w.codes) == 8) return w.groups == 1 && !w.zero;
    return w.groups == 1 || w.group % 32 == 0;
}

// Columns that are handled as blocks. A row of 8-bit codes may end anywhere (the rest of its last block counts as
// zeros); the shorter last block of the other codes is dequantized like any other weight.
inline int64_t block_columns(const Weight& w) {
    const int64_t block = BLOCK_BYTES * (8 / bits_of(w.codes));
    return bits_of(w.codes) == 8 ? round_up(w.k, block) : w.k / block * block;
}

// The order of 64 columns that the kernels produce.
inline void order_indices(int codes, __m512i& a, __m512i& b) {
    alignas(64) uint16_t first_half[32], second_half[32];
    for (int i = 0; i < 32; i++) {
        first_half[i] = static_cast<uint16_t>(bits_of(codes) == 8 ? i / 8 * 16 + i % 8 : 2 * i);
        second_half[i] = static_cast<uint16_t>(first_half[i] + (bits_of(codes) == 8 ? 8 : 1));
    }
    a = _mm512_load_si512(first_half), b = _mm512_load_si512(second_half);
}

// A row of bfloat16 x in that order: block_columns(w) of them, the rest as they are, zeros up to `padded`.
inline void order_row(const Weight& w, const uint16_t* x, int64_t padded, uint16_t* out) {
    const int64_t blocks = block_columns(w);
    __m512i ia, ib;
    order_indices(w.codes, ia, ib);
    for (int64_t i = 0; i < blocks; i += 64) {
        const int64_t left = w.k - i;
        const __mmask32 ma = left >= 32 ? ~0u : (1u << left) - 1;
        const __mmask32 mb = left >= 64 ? ~0u : left > 32 ? (1u << (left - 32)) - 1 : 0;
        const __m512i a = _mm512_maskz_loadu_epi16(ma, x + i), b = _mm512_maskz_loadu_epi16(mb, x + i + 32);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(a, ia, b));
        _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(a, ib, b));
    }
    const int64_t from = blocks < w.k ? blocks : w.k, done = blocks < w.k ? w.k : blocks;
    std::memcpy(out + from, x + from, (blocks < w.k ? w.k - blocks : 0) * 2);
    std::memset(out + done, 0, (padded - done) * 2);
}

// The bytes of the bfloat16 of magnitudes 0 to 63 and 64 to 127.
struct ByteTable {
    __m512i low[2], high[2];
};
template <int CODES>
inline ByteTable byte_table() {
    alignas(64) uint8_t low[128], high[128], codes[128];
    for (int i = 0; i < 128; i++) codes[i] = static_cast<uint8_t>(i);
    for (int i = 0; i < 128; i += W) {
        uint16_t b[W];
        storen_bf16(b, value<CODES>(codes + i, 0, Table{}), W);
        for (int j = 0; j < W; j++) low[i + j] = static_cast<uint8_t>(b[j]), high[i + j] = static_cast<uint8_t>(b[j] >> 8);
    }
    return {{_mm512_load_si512(low), _mm512_load_si512(low + 64)}, {_mm512_load_si512(high), _mm512_load_si512(high + 64)}};
}
template <int CODES>
inline void bytes_to_bf16(const ByteTable& t, __m512i codes, __m512i& a, __m512i& b) {
    const __m512i magnitude = CODES == INT8 ? _mm512_abs_epi8(codes) : codes;  // the lookup takes the low 7 bits
    const __m512i low = _mm512_permutex2var_epi8(t.low[0], magnitude, t.low[1]);
    __m512i high = _mm512_permutex2var_epi8(t.high[0], magnitude, t.high[1]);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    high = _mm512_ternarylogic_epi64(high, codes, sign, 0xF8);  // high | (codes & sign)
    // the magnitude of -128 does not fit in 7 bits; as bfloat16 it is 0xC300
    if (CODES == INT8) high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(codes, sign), _mm512_set1_epi8(static_cast<char>(0xC3)));
    a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
}

// Codes of 8 bits in the blocks [b0, b1) of R rows: emit(column, weights[R]), 32 weights in bfloat16 each.
template <int CODES, int R, class Emit>
inline void byte_blocks(const Weight& w, const ByteTable& t, int64_t row, int64_t b0, int64_t b1, const Emit& emit) {
    const uint8_t* packed = w.packed + row * w.k;
    Ahead ahead(w.packed, w.k, row + R, b0, b1);
    for (int64_t b = b0; b < b1; b++) {
        __m512i a[R], c[R];
        const int64_t left = w.k - b * 64;
        const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
        for (int r = 0; r < R; r++) {
            bytes_to_bf16<CODES>(t, _mm512_maskz_loadu_epi8(mask, packed + r * w.k + b * 64), a[r], c[r]);
            ahead.step();
        }
        emit(b * 64, a);
        emit(b * 64 + 32, c);
    }
}

// The same for codes of BITS bits that are looked up. (Subnormal bfloat16 become 0, as vdpbf16ps takes them anyway.)
enum Groups { PER_ROW, PER_PLANE, PER_PLANES, PER_HALVES };  // a group: a row, 64 columns, a multiple of 64, of 32

template <int BITS, Groups GROUPS, int R, class Emit>
inline void table_blocks(const Weight& w, int64_t row, int64_t b0, int64_t b1, const Emit& emit) {
    if (b0 == b1) return;
    constexpr int PLANES = 8 / BITS, UNIT = GROUPS == PER_HALVES ? 32 : 64;
    const int64_t bytes = row_bytes(BITS == 4 ? TABLE4 : TABLE2, w.k);
    const int64_t units = GROUPS == PER_ROW ? int64_t(1) << 40 : w.group / UNIT;  // per group
    const int64_t u0 = b0 * PLANES * 64 / UNIT, g0 = u0 / units, g1 = (b1 * PLANES * 64 / UNIT - 1) / units + 1;
    const int64_t width = round_up(g1 - g0, W);
    float* scales = static_cast<float*>(scratch(5, 2 * R * width * sizeof(float)));
    float* shifts = scales + R * width;
    for (int r = 0; r < R; r++) {
        const int64_t from = (row + r) * w.groups + g0, to = (row + r) * w.groups + g1;
        load_scales(w.scale, w.scale_type, from, to, scales + r * width);
        if (!w.zero) continue;
        load_scales(w.zero, w.scale_type, from, to, shifts + r * width);
    }
    if (!w.zero) std::memset(shifts, 0, R * width * sizeof(float));
    const F table = BITS == 4 ? load_table(w.table) : _mm512_broadcast_f32x4(_mm_loadu_ps(w.table));
    const auto group_values = [&](int r, int64_t g) {
        return mul(sub(table, splat(shifts[r * width + g])), splat(scales[r * width + g]));
    };
    const __m512i code = _mm512_set1_epi16((1 << BITS) - 1);
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x10), 1);
    const uint8_t* packed = w.packed + row * bytes;
    Ahead ahead(w.packed, bytes, row + R, b0, b1);
    int64_t g = 0, left = (g0 + 1) * units - u0;  // units until the next group
    __m512i values[R];
    const auto look_up_group = [&] {
        for (int r = 0; r < R; r++)
            values[r] = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(group_values(r, g)));
    };
    if (GROUPS == PER_ROW || GROUPS == PER_PLANES) look_up_group();
    for (int64_t b = b0; b < b1; b++) {
        __m512i codes[R];
        for (int r = 0; r < R; r++) {
            codes[r] = _mm512_loadu_si512(packed + r * bytes + b * 64);
            ahead.step();
        }
        QUANTO_UNROLL
        for (int p = 0; p < PLANES; p++) {
            if (GROUPS == PER_PLANE) {
                look_up_group();
                g++;
            } else if (GROUPS == PER_PLANES) {
                if (left == 0) g++, left = units, look_up_group();
                left--;
            } else if (GROUPS == PER_HALVES) {
                if (left == 0) g++, left = units;
                const int64_t low = g;
                if (--left == 0) g++, left = units;
                left--;
                for (int r = 0; r < R; r++)
                    values[r] = (__m512i)_mm512_cvtne2ps_pbh(group_values(r, g), group_values(r, low));
            }
            QUANTO_UNROLL
            for (int h = 0; h < 2; h++) {
                __m512i weights[R];
                for (int r = 0; r < R; r++) {
                    __m512i index = _mm512_srli_epi16(codes[r], h * 8 + p * BITS);
                    // vpermw looks at 5 bits. Where both halves share a table, each value stands at every index that
                    // ends in its code; else bit 4 chooses the table of the half.
                    if (GROUPS == PER_HALVES) index = _mm512_ternarylogic_epi64(index, code, upper, 0xEA);  // (index & code) | upper
                    weights[r] = _mm512_permutexvar_epi16(index, values[r]);
                }
                emit((b * PLANES + p) * 64 + h * 32, weights);
            }
        }
    }
}

template <int CODES, int R, class Emit>
inline void blocks(const Weight& w, const ByteTable& t, int64_t row, int64_t b0, int64_t b1, const Emit& emit) {
    if constexpr (bits_of(CODES) == 8) byte_blocks<CODES, R>(w, t, row, b0, b1, emit);
    else if (w.groups == 1) table_blocks<bits_of(CODES), PER_ROW, R>(w, row, b0, b1, emit);
    else if (w.group == 64) table_blocks<bits_of(CODES), PER_PLANE, R>(w, row, b0, b1, emit);
    else if (w.group % 64 == 0) table_blocks<bits_of(CODES), PER_PLANES, R>(w, row, b0, b1, emit);
    else table_blocks<bits_of(CODES), PER_HALVES, R>(w, row, b0, b1, emit);
}

// What late.h needs: the largest magnitude among k bfloat16 (as their bits, NaN above all), and whether all lanes are
// finite.
inline uint32_t largest_magnitude(const uint16_t* x, int64_t k) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask32 mask = k - i >= 32 ? ~0u : (1u << (k - i)) - 1;
        most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i), _mm512_set1_epi16(0x7FFF)));
    }
    return _mm512_reduce_max_epu32(_mm512_max_epu16(_mm512_and_si512(most, _mm512_set1_epi32(0xFFFF)), _mm512_srli_epi32(most, 16)));
}
inline bool is_finite(F v) { return _mm512_fpclass_ps_mask(v, 0x99) == 0; }  // NaN of both kinds, infinity of both signs

inline F dot_bf16(F acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
