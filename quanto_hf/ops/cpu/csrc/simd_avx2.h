// 8 lanes of float with AVX2, FMA and F16C. Included inside the namespace of a level.

constexpr int W = 8;
using F = __m256;
using I = __m256i;
struct Table {
    __m256 low, high;
};

inline I first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F splat(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F loadn(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline void storen(float* p, F v, int64_t n) {
    if (n >= W) _mm256_storeu_ps(p, v);
    else _mm256_maskstore_ps(p, first(n), v);
}
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F root(F v) { return _mm256_sqrt_ps(v); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F round_even(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a < b ? x : y, lane by lane; y where a or b is NaN
inline F select_less(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline bool any_less(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0; }
// the bits of v: those of a mask, and all of them shifted right
inline F masked(F v, uint32_t bits) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(bits)))); }
inline I shifted(F v, int count) { return _mm256_srl_epi32(_mm256_castps_si256(v), _mm_cvtsi32_si128(count)); }
inline F as_float(I bits) { return _mm256_castsi256_ps(bits); }
inline I as_int(F v) { return _mm256_castps_si256(v); }
inline float largest(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// n bytes, or n halves, in the low end of a register
inline __m128i low_bytes(const void* p, int64_t bytes) {
    alignas(16) uint8_t buffer[16] = {};
    std::memcpy(buffer, p, bytes);
    return _mm_load_si128((const __m128i*)buffer);
}
inline I load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I loadn_bytes(const uint8_t* p, int64_t n) { return _mm256_cvtepu8_epi32(low_bytes(p, n)); }
inline I load_signed(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I loadn_signed(const uint8_t* p, int64_t n) { return _mm256_cvtepi8_epi32(low_bytes(p, n)); }
template <int BITS>
inline I field(I bytes, int shift) {
    return _mm256_and_si256(_mm256_srl_epi32(bytes, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32((1 << BITS) - 1));
}
inline I load_words(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
template <int BITS>
inline I field_of_bytes(I words, int shift) {
    return _mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi8((1 << BITS) - 1));
}
inline void store_words(uint8_t* p, I words) { _mm256_storeu_si256((__m256i*)p, words); }
inline I same_words(int32_t v) { return _mm256_set1_epi32(v); }
// unsigned bytes times signed ones, added in pairs of 16 bits (which saturate), and pairs added to words of 32
inline I products_in_pairs(I a, I b) { return _mm256_maddubs_epi16(a, b); }
inline I add_pairs(I a, I b) { return _mm256_add_epi16(a, b); }
inline I words_of_pairs(I pairs, I start) { return _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), start); }
// signed bytes as 16 bits, and pairs of those multiplied and added to words
inline I widen_bytes(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline I multiply_pairs(I a, I b) { return _mm256_madd_epi16(a, b); }
inline I add_words(I a, I b) { return _mm256_add_epi32(a, b); }
template <int SHIFT>
inline I words_right(I words) { return _mm256_srli_epi32(words, SHIFT); }
inline I words_and(I words, uint32_t bits) { return _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(bits))); }
inline I no_bits() { return _mm256_setzero_si256(); }
template <int SHIFT>
inline I words_left(I words) { return _mm256_slli_epi32(words, SHIFT); }
inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
inline I to_int(F v) { return _mm256_cvtps_epi32(v); }
inline Table load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F lookup(Table table, I index) {  // bit 3 of the index moves to the sign, which blendv looks at
    const F a = _mm256_permutevar8x32_ps(table.low, index), b = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
// The codes of a plane of 4 bits, four registers of numbers at a time: their four bytes are looked up on their own and
// joined. 14 operations, half of which two ports can do; by `lookup` it would be 19, 8 of them for a single port.
struct WordTable {
    I bytes[4];
};
constexpr bool LOOKUP_IN_ORDER = true;  // four columns side by side
inline WordTable load_word_table(const float* p) {
    uint8_t bytes[64], sorted[4][16];
    std::memcpy(bytes, p, 64);
    for (int i = 0; i < 64; i++) sorted[i % 4][i / 4] = bytes[i];
    WordTable t;
    for (int i = 0; i < 4; i++) t.bytes[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)sorted[i]));
    return t;
}
template <int PLANE>
inline void lookup_words(const WordTable& table, I words, F* out) {
    const I index = _mm256_and_si256(PLANE ? _mm256_srli_epi16(words, 4) : words, _mm256_set1_epi8(15));
    I b[4];
    for (int i = 0; i < 4; i++) b[i] = _mm256_shuffle_epi8(table.bytes[i], index);
    const I low = _mm256_unpacklo_epi8(b[0], b[1]), low_end = _mm256_unpackhi_epi8(b[0], b[1]);
    const I high = _mm256_unpacklo_epi8(b[2], b[3]), high_end = _mm256_unpackhi_epi8(b[2], b[3]);
    out[0] = as_float(_mm256_unpacklo_epi16(low, high)), out[1] = as_float(_mm256_unpackhi_epi16(low, high));
    out[2] = as_float(_mm256_unpacklo_epi16(low_end, high_end)), out[3] = as_float(_mm256_unpackhi_epi16(low_end, high_end));
}

// 32-bit lanes to the low 8 halves
inline __m128i narrow(I v) {
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
// the low bytes of the lanes
inline void storen_bytes(uint8_t* p, I v, int64_t n) {
    const __m128i halves = narrow(_mm256_and_si256(v, _mm256_set1_epi32(0xFF))), bytes = _mm_packus_epi16(halves, halves);
    if (n >= W) return _mm_storel_epi64((__m128i*)p, bytes);
    alignas(16) uint8_t buffer[16];
    _mm_store_si128((__m128i*)buffer, bytes);
    std::memcpy(p, buffer, n);
}
inline F from_half(__m128i h) { return _mm256_cvtph_ps(h); }
inline F e5m2(I v) { return from_half(narrow(_mm256_slli_epi32(v, 8))); }
inline F e4m3(I v) {
    // the bits of a half with the exponent 8 too small; halves keep their subnormals whatever the flush mode is
    const I magnitude = _mm256_and_si256(v, _mm256_set1_epi32(0x7F)), sign = _mm256_and_si256(v, _mm256_set1_epi32(0x80));
    const I half = _mm256_or_si256(_mm256_slli_epi32(magnitude, 7), _mm256_slli_epi32(sign, 8));
    const F value = mul(from_half(narrow(half)), splat(256.0f));
    const I nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
    return _mm256_or_ps(value, _mm256_castsi256_ps(nan));  // all bits set is a NaN
}

// The float8 of a register, as halves: those of the even and of the odd bytes of its lower half, then of its upper.
inline void split_halves(I even, I odd, F* out) {
    out[0] = from_half(_mm256_castsi256_si128(even)), out[1] = from_half(_mm256_castsi256_si128(odd));
    out[2] = from_half(_mm256_extracti128_si256(even, 1)), out[3] = from_half(_mm256_extracti128_si256(odd, 1));
}
inline void e5m2_words(I words, F* out) {
    split_halves(_mm256_slli_epi16(words, 8), _mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xFF00))), out);
}
inline void e4m3_words(I words, F* out) {  // divided by 256, and NaN as a number: see above, and e4m3_saw_nan
    const I bits = _mm256_set1_epi16(static_cast<int16_t>(0xBF80));  // the shift doubles the sign
    split_halves(_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1), bits),
                 _mm256_and_si256(_mm256_srai_epi16(words, 1), bits), out);
}
// The largest magnitudes that were seen, doubled.
inline I e4m3_seen(I seen, I words) { return _mm256_max_epu8(seen, _mm256_add_epi8(words, words)); }
inline bool e4m3_saw_nan(I seen) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8(static_cast<char>(0xFE)))) != 0;
}

inline F widen(__m128i b) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16)); }
inline F load_bf16(const uint16_t* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
inline F loadn_bf16(const uint16_t* p, int64_t n) { return n >= W ? load_bf16(p) : widen(low_bytes(p, 2 * n)); }
inline F load_f16(const uint16_t* p) { return from_half(_mm_loadu_si128((const __m128i*)p)); }
inline F loadn_f16(const uint16_t* p, int64_t n) { return n >= W ? load_f16(p) : from_half(low_bytes(p, 2 * n)); }

// The W numbers at p. (Wider vectors have more at q.)
inline F load_runs(const float* p, const float*) { return load(p); }
inline F load_runs_bf16(const uint16_t* p, const uint16_t*) { return load_bf16(p); }
inline F load_runs_f16(const uint16_t* p, const uint16_t*) { return load_f16(p); }

// float to bfloat16, round to nearest even; NaN stays NaN
inline __m128i narrow_bf16(F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return narrow(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan));
}
inline F round_bf16(F v) { return widen(narrow_bf16(v)); }
inline void store_halves(uint16_t* p, __m128i v, int64_t n) {
    if (n >= W) return _mm_storeu_si128((__m128i*)p, v);
    alignas(16) uint16_t buffer[W];
    _mm_store_si128((__m128i*)buffer, v);
    std::memcpy(p, buffer, 2 * n);
}
inline void store_bf16(uint16_t* p, F v) { _mm_storeu_si128((__m128i*)p, narrow_bf16(v)); }
inline void storen_bf16(uint16_t* p, F v, int64_t n) { store_halves(p, narrow_bf16(v), n); }
inline void storen_f16(uint16_t* p, F v, int64_t n) {
    store_halves(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}

// Rows become columns.
inline void transpose(F (&v)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4) {
        v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20), t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    for (int i = 0; i < 8; i++) v[i] = t[i];
}
