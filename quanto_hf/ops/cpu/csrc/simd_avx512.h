// 16 lanes of float with AVX-512 F, BW, DQ, VL. Included inside the namespace of a level.

constexpr int W = 16;
using F = __m512;
using I = __m512i;
using Table = __m512;

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1); }

inline F splat(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F loadn(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void storen(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F root(F v) { return _mm512_sqrt_ps(v); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F round_even(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a < b ? x : y, lane by lane; y where a or b is NaN
inline F select_less(F a, F b, F x, F y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
inline bool any_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }
// the bits of v: those of a mask, and all of them shifted right
inline F masked(F v, uint32_t bits) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits)))); }
inline I shifted(F v, int count) { return _mm512_srl_epi32(_mm512_castps_si512(v), _mm_cvtsi32_si128(count)); }
inline F as_float(I bits) { return _mm512_castsi512_ps(bits); }
inline I as_int(F v) { return _mm512_castps_si512(v); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }
inline float largest(F v) { return _mm512_reduce_max_ps(v); }

inline I load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I loadn_bytes(const uint8_t* p, int64_t n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
inline I load_signed(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I loadn_signed(const uint8_t* p, int64_t n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
template <int BITS>
inline I field(I bytes, int shift) {
    return _mm512_and_si512(_mm512_srl_epi32(bytes, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32((1 << BITS) - 1));
}
inline I load_words(const uint8_t* p) { return _mm512_loadu_si512((const __m512i*)p); }
template <int BITS>
inline I field_of_bytes(I words, int shift) {
    return _mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi8((1 << BITS) - 1));
}
inline void store_words(uint8_t* p, I words) { _mm512_storeu_si512(p, words); }
inline I same_words(int32_t v) { return _mm512_set1_epi32(v); }
// unsigned bytes times signed ones, added in pairs of 16 bits (which saturate), and pairs added to words of 32
inline I products_in_pairs(I a, I b) { return _mm512_maddubs_epi16(a, b); }
inline I add_pairs(I a, I b) { return _mm512_add_epi16(a, b); }
inline I words_of_pairs(I pairs, I start) { return _mm512_add_epi32(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)), start); }
// signed bytes as 16 bits, and pairs of those multiplied and added to words
inline I widen_bytes(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline I multiply_pairs(I a, I b) { return _mm512_madd_epi16(a, b); }
inline I add_words(I a, I b) { return _mm512_add_epi32(a, b); }
template <int SHIFT>
inline I words_right(I words) { return _mm512_srli_epi32(words, SHIFT); }
inline I words_and(I words, uint32_t bits) { return _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(bits))); }
inline I no_bits() { return _mm512_setzero_si512(); }
template <int SHIFT>
inline I words_left(I words) { return _mm512_slli_epi32(words, SHIFT); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I to_int(F v) { return _mm512_cvtps_epi32(v); }
// the low bytes of the lanes
inline void storen_bytes(uint8_t* p, I v, int64_t n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(v)); }
inline Table load_table(const float* p) { return _mm512_loadu_ps(p); }
inline F lookup(Table table, I index) { return _mm512_permutexvar_ps(index, table); }
using WordTable = Table;
constexpr bool LOOKUP_IN_ORDER = false;
inline WordTable load_word_table(const float* p) { return load_table(p); }
template <int PLANE>
inline void lookup_words(WordTable table, I words, F* out) {  // the permutation looks at 4 bits
    out[0] = lookup(table, _mm512_srli_epi32(words, 4 * PLANE)), out[1] = lookup(table, _mm512_srli_epi32(words, 8 + 4 * PLANE));
    out[2] = lookup(table, _mm512_srli_epi32(words, 16 + 4 * PLANE)), out[3] = lookup(table, _mm512_srli_epi32(words, 24 + 4 * PLANE));
}

inline F from_half(__m256i h) { return _mm512_cvtph_ps(h); }
inline F e5m2(I v) { return from_half(_mm512_cvtepi32_epi16(_mm512_slli_epi32(v, 8))); }
inline F e4m3(I v) {
    // the bits of a half with the exponent 8 too small; halves keep their subnormals whatever the flush mode is
    const I magnitude = _mm512_and_si512(v, _mm512_set1_epi32(0x7F));
    const I sign = _mm512_and_si512(v, _mm512_set1_epi32(0x80));
    const I half = _mm512_or_si512(_mm512_slli_epi32(magnitude, 7), _mm512_slli_epi32(sign, 8));
    const F value = mul(from_half(_mm512_cvtepi32_epi16(half)), splat(256.0f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
    return _mm512_mask_mov_ps(value, nan, splat(std::numeric_limits<float>::quiet_NaN()));
}

// The float8 of a register, as halves: those of the even and of the odd bytes of its lower half, then of its upper.
inline void split_halves(I even, I odd, F* out) {
    out[0] = from_half(_mm512_castsi512_si256(even)), out[1] = from_half(_mm512_castsi512_si256(odd));
    out[2] = from_half(_mm512_extracti64x4_epi64(even, 1)), out[3] = from_half(_mm512_extracti64x4_epi64(odd, 1));
}
inline void e5m2_words(I words, F* out) {
    split_halves(_mm512_slli_epi16(words, 8), _mm512_and_si512(words, _mm512_set1_epi16(static_cast<int16_t>(0xFF00))), out);
}
inline void e4m3_words(I words, F* out) {  // divided by 256, and NaN as a number: see above, and e4m3_saw_nan
    const I bits = _mm512_set1_epi16(static_cast<int16_t>(0xBF80));  // the shift doubles the sign
    split_halves(_mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(words, 8), 1), bits),
                 _mm512_and_si512(_mm512_srai_epi16(words, 1), bits), out);
}
// The largest magnitudes that were seen, doubled.
inline I e4m3_seen(I seen, I words) { return _mm512_max_epu8(seen, _mm512_add_epi8(words, words)); }
inline bool e4m3_saw_nan(I seen) { return _mm512_cmpeq_epi8_mask(seen, _mm512_set1_epi8(static_cast<char>(0xFE))) != 0; }

inline F widen(__m256i b) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)); }
inline __m256i mask_load16(const uint16_t* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
inline F load_bf16(const uint16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline F loadn_bf16(const uint16_t* p, int64_t n) { return widen(mask_load16(p, n)); }
inline F load_f16(const uint16_t* p) { return from_half(_mm256_loadu_si256((const __m256i*)p)); }
inline F loadn_f16(const uint16_t* p, int64_t n) { return from_half(mask_load16(p, n)); }

// The 8 numbers at p, then the 8 at q.
inline F load_runs(const float* p, const float* q) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(q), 1);
}
inline __m256i half_runs(const uint16_t* p, const uint16_t* q) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)), _mm_loadu_si128((const __m128i*)q), 1);
}
inline F load_runs_bf16(const uint16_t* p, const uint16_t* q) { return widen(half_runs(p, q)); }
inline F load_runs_f16(const uint16_t* p, const uint16_t* q) { return from_half(half_runs(p, q)); }

// float to bfloat16, round to nearest even, NaN stays NaN, subnormals are kept (vcvtneps2bf16 would drop them)
inline __m256i narrow_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
}
inline F round_bf16(F v) { return widen(narrow_bf16(v)); }
inline void store_bf16(uint16_t* p, F v) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(v)); }
inline void storen_bf16(uint16_t* p, F v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v)); }
inline void storen_f16(uint16_t* p, F v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rows become columns.
inline void transpose(F (&v)[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    }
}
