// Codes to bfloat16, 16 columns at a time and in their natural order, and the instructions of FEAT_BF16. Included
// inside a level's namespace.
//
// Codes of 2 and 4 bits: the weights of a group take at most 16 values. They are computed once per group and rounded to
// bfloat16 as the reference rounds them; two byte lookups give the low and the high bytes of 16 weights.
// Codes of 8 bits with one scale per row: as bfloat16 they are exact; the scale multiplies the sum.

// Written as assembly: clang before 17 has these intrinsics only where the whole file is compiled for FEAT_BF16.
// bfdot and bfmmla take subnormal numbers for zero and round sums their own way, within the error of a float32 sum.
inline F dot_bf16(F acc, uint16x8_t a, uint16x8_t b) {  // lane i += a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
    __asm__("bfdot %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
}
inline uint16x8_t narrow_bf16(F low, F high) {
    uint16x8_t out;
    __asm__("bfcvtn %0.4h, %1.4s\n\tbfcvtn2 %0.8h, %2.4s" : "=&w"(out) : "w"(low), "w"(high));
    return out;
}
// Numbers for products in bfloat16.
inline void store_factors(uint16_t* p, F v) { vst1_u16(p, vget_low_u16(narrow_bf16(v, v))); }

using Factors = uint16x8_t;
inline Factors load_factors(const uint16_t* p) { return vld1q_u16(p); }
inline void store_factors(uint16_t* p, Factors v) { vst1q_u16(p, v); }
inline Factors gathered_factors(const uint16_t* const (&p)[1]) { return load_factors(p[0]); }
struct Eight {
    F low, high;
};
inline Eight load_eight(const float* p) { return {load(p), load(p + W)}; }
inline Eight add(Eight a, Eight b) { return {add(a.low, b.low), add(a.high, b.high)}; }
inline Factors narrow_eights(const Eight (&v)[1]) { return narrow_bf16(v[0].low, v[0].high); }

// Whether these kernels take a weight.
inline bool has_blocks(const Weight& w) {
    if (bits_of(w.codes) == 8) return w.groups == 1 && !w.zero;
    return w.groups == 1 || w.group % 16 == 0;
}

// Columns that are handled here: all of 8-bit codes, of others the whole blocks of 64 bytes.
inline int64_t block_columns(const Weight& w) {
    const int64_t block = BLOCK_BYTES * (8 / bits_of(w.codes));
    return bits_of(w.codes) == 8 ? w.k : w.k / block * block;
}

// The upper halves of 8 floats: they are bfloat16 already.
inline uint16x8_t upper_halves(F low, F high) {
    return vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high));
}
template <int CODES>
inline uint16x8_t bytes_to_bf16(uint8x8_t codes) {
    if constexpr (CODES == INT8) {
        const int16x8_t v = vmovl_s8(vreinterpret_s8_u8(codes));
        return upper_halves(to_float(vmovl_s16(vget_low_s16(v))), to_float(vmovl_s16(vget_high_s16(v))));
    } else if constexpr (CODES == E5M2) {
        const uint16x8_t half = vshll_n_u8(codes, 8);
        return upper_halves(from_half(vget_low_u16(half)), from_half(vget_high_u16(half)));
    } else {  // see e4m3()
        const uint8x8_t magnitude = vand_u8(codes, vdup_n_u8(0x7F));
        const uint16x8_t sign = vshll_n_u8(vand_u8(codes, vdup_n_u8(0x80)), 8);
        const uint16x8_t half = vorrq_u16(vshll_n_u8(magnitude, 7), sign);
        const uint16x8_t value = upper_halves(mul(from_half(vget_low_u16(half)), splat(256.0f)),
                                              mul(from_half(vget_high_u16(half)), splat(256.0f)));
        const int8x8_t nan = vreinterpret_s8_u8(vceq_u8(magnitude, vdup_n_u8(0x7F)));
        return vorrq_u16(value, vreinterpretq_u16_s16(vmovl_s8(nan)));  // all bits set is a NaN
    }
}

// 16 columns of R rows, as two vectors each.
template <int R>
struct Columns {
    uint16x8_t of[R][2];
};

// Codes of 8 bits in the columns [from, to) of R rows: emit(column, weights), zeros beyond `to`.
template <int CODES, int R, class Emit>
inline void byte_blocks(const Weight& w, int64_t row, int64_t from, int64_t to, const Emit& emit) {
    const uint8_t* packed = w.packed + row * w.k;
    for (int64_t column = from; column < to; column += 16) {
        Columns<R> weights;
        for (int r = 0; r < R; r++) {
            uint8x16_t codes;
            if (to - column >= 16) {
                codes = vld1q_u8(packed + r * w.k + column);
            } else {
                uint8_t rest[16] = {};
                std::memcpy(rest, packed + r * w.k + column, to - column);
                codes = vld1q_u8(rest);
            }
            weights.of[r][0] = bytes_to_bf16<CODES>(vget_low_u8(codes));
            weights.of[r][1] = bytes_to_bf16<CODES>(vget_high_u8(codes));
        }
        emit(column, weights);
    }
}

// The bytes of the 16 values of a group.
struct ByteTable {
    uint8x16_t low, high;
};
inline ByteTable group_values(const Weight& w, int64_t row, int64_t g) {
    const int64_t i = row * w.groups + g;
    const F scale = splat(half_value(w.scale, i, w.scale_type));
    const F zero = splat(w.zero ? half_value(w.zero, i, w.scale_type) : 0.0f);
    F v[4];
    for (int j = 0; j < 4; j++) v[j] = mul(sub(load(w.table + 4 * j), zero), scale);
    const uint8x16_t a = vreinterpretq_u8_u16(narrow_bf16(v[0], v[1])), b = vreinterpretq_u8_u16(narrow_bf16(v[2], v[3]));
    return {vuzp1q_u8(a, b), vuzp2q_u8(a, b)};
}

// The same for codes of BITS bits, whole blocks. Groups are a multiple of 16 columns.
template <int BITS, int R, class Emit>
inline void table_blocks(const Weight& w, int64_t row, int64_t from, int64_t to, const Emit& emit) {
    if (from >= to) return;
    constexpr int PLANES = 8 / BITS;
    const int64_t bytes = row_bytes(BITS == 4 ? TABLE4 : TABLE2, w.k);
    const uint8_t* packed = w.packed + row * bytes;
    ByteTable values[R];
    const auto look_up_group = [&](int64_t g) {
        for (int r = 0; r < R; r++) values[r] = group_values(w, row + r, g);
    };
    int64_t g = from / w.group, group_end = (g + 1) * w.group;
    look_up_group(g);
    for (int64_t block = from; block < to; block += PLANES * 64) {
        const uint8_t* codes = packed + block / PLANES;
        for (int p = 0; p < PLANES; p++) {
            const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-p * BITS));
            for (int q = 0; q < 64; q += 16) {
                const int64_t column = block + p * 64 + q;
                if (column == group_end) g++, group_end += w.group, look_up_group(g);
                Columns<R> weights;
                for (int r = 0; r < R; r++) {
                    const uint8x16_t shifted = vshlq_u8(vld1q_u8(codes + r * bytes + q), shift);
                    const uint8x16_t index = vandq_u8(shifted, vdupq_n_u8((1 << BITS) - 1));
                    const uint8x16_t low = vqtbl1q_u8(values[r].low, index), high = vqtbl1q_u8(values[r].high, index);
                    weights.of[r][0] = vreinterpretq_u16_u8(vzip1q_u8(low, high));
                    weights.of[r][1] = vreinterpretq_u16_u8(vzip2q_u8(low, high));
                }
                emit(column, weights);
            }
        }
    }
}

template <int CODES, int R, class Emit>
inline void blocks(const Weight& w, int64_t row, int64_t from, int64_t to, const Emit& emit) {
    if constexpr (bits_of(CODES) == 8) byte_blocks<CODES, R>(w, row, from, to, emit);
    else table_blocks<bits_of(CODES), R>(w, row, from, to, emit);
}

// What late.h needs: the largest magnitude among k bfloat16 (as their bits, NaN above all), and whether all lanes are
// finite.
inline uint32_t largest_magnitude(const uint16_t* x, int64_t k) {
    uint16x8_t most = vdupq_n_u16(0);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) most = vmaxq_u16(most, vandq_u16(vld1q_u16(x + i), vdupq_n_u16(0x7FFF)));
    uint32_t largest = vmaxvq_u16(most);
    for (; i < k; i++)
        if ((x[i] & 0x7FFFu) > largest) largest = x[i] & 0x7FFFu;
    return largest;
}
inline bool is_finite(F v) { return vmaxvq_u32(vreinterpretq_u32_f32(masked(v, 0x7FFFFFFF))) < 0x7F800000; }
