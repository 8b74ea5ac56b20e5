// 4 lanes of float with the NEON of every aarch64 processor. Included inside the namespace of a level.

constexpr int W = 4;
using F = float32x4_t;
using I = int32x4_t;
using Table = uint8x16x4_t;  // the bytes of 16 floats

inline F splat(float v) { return vdupq_n_f32(v); }
inline F load(const float* p) { return vld1q_f32(p); }
inline F loadn(const float* p, int64_t n) {
    if (n >= W) return vld1q_f32(p);
    F v = vdupq_n_f32(0.0f);
    if (n & 2) v = vcombine_f32(vld1_f32(p), vdup_n_f32(0.0f));
    if (n == 1) v = vld1q_lane_f32(p, v, 0);
    if (n == 3) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
}
inline void store(float* p, F v) { vst1q_f32(p, v); }
inline void storen(float* p, F v, int64_t n) {
    if (n >= W) return vst1q_f32(p, v);
    if (n & 2) vst1_f32(p, vget_low_f32(v));
    if (n == 1) vst1q_lane_f32(p, v, 0);
    if (n == 3) vst1q_lane_f32(p + 2, v, 2);
}
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F root(F v) { return vsqrtq_f32(v); }
// a < b ? x : y, lane by lane; y where a or b is NaN
inline F select_less(F a, F b, F x, F y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
inline F min(F a, F b) { return select_less(a, b, a, b); }  // b where one is NaN, as on x86; vminq would give NaN
inline F max(F a, F b) { return select_less(b, a, a, b); }
inline F round_even(F v) { return vrndnq_f32(v); }
inline bool any_less(F a, F b) { return vmaxvq_u32(vcltq_f32(a, b)) != 0; }
// the bits of v: those of a mask, and all of them shifted right
inline F masked(F v, uint32_t bits) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(bits))); }
inline I shifted(F v, int count) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_f32(v), vdupq_n_s32(-count)));
}
inline F as_float(I bits) { return vreinterpretq_f32_s32(bits); }
inline float sum(F v) { return vaddvq_f32(v); }

// n <= 4 bytes, or n <= 4 halves, in the low end of a register; zeros above
inline uint8x8_t low_bytes(const uint8_t* p, int64_t n) {
    uint32_t bits = 0;
    if (n >= W) std::memcpy(&bits, p, 4);
    else for (int64_t i = 0; i < n; i++) bits |= static_cast<uint32_t>(p[i]) << (8 * i);
    return vreinterpret_u8_u32(vdup_n_u32(bits));
}
inline uint16x4_t low_halves(const uint16_t* p, int64_t n) {
    if (n >= W) return vld1_u16(p);
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; i++) bits |= static_cast<uint64_t>(p[i]) << (16 * i);
    return vcreate_u16(bits);
}
inline I loadn_bytes(const uint8_t* p, int64_t n) {
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(low_bytes(p, n)))));
}
inline I load_bytes(const uint8_t* p) { return loadn_bytes(p, W); }
inline I loadn_signed(const uint8_t* p, int64_t n) {
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(low_bytes(p, n)))));
}
inline I load_signed(const uint8_t* p) { return loadn_signed(p, W); }
template <int BITS>
inline I field(I bytes, int shift) {
    return vandq_s32(vshlq_s32(bytes, vdupq_n_s32(-shift)), vdupq_n_s32((1 << BITS) - 1));
}
inline F to_float(I v) { return vcvtq_f32_s32(v); }
inline I to_int(F v) { return vcvtnq_s32_f32(v); }
// the low bytes of the lanes
inline void storen_bytes(uint8_t* p, I v, int64_t n) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(v);
    const uint8x16_t low = vuzp1q_u8(vuzp1q_u8(bytes, bytes), vuzp1q_u8(bytes, bytes));
    const uint32_t bits = vgetq_lane_u32(vreinterpretq_u32_u8(low), 0);
    if (n >= W) std::memcpy(p, &bits, 4);
    else for (int64_t i = 0; i < n; i++) p[i] = static_cast<uint8_t>(bits >> (8 * i));
}
inline Table load_table(const float* p) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}
inline F lookup(Table table, I index) {  // the four bytes of the float `index` are 4 * index + 0, 1, 2, 3
    const I bytes = vmlaq_n_s32(vdupq_n_s32(0x03020100), index, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_s32(bytes)));
}

inline F from_half(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
inline uint16x4_t narrow(I v) { return vmovn_u32(vreinterpretq_u32_s32(v)); }
inline F e5m2(I v) { return from_half(narrow(vshlq_n_s32(v, 8))); }
inline F e4m3(I v) {
    // the bits of a half with the exponent 8 too small; halves keep their subnormals whatever the flush mode is
    const I magnitude = vandq_s32(v, vdupq_n_s32(0x7F)), sign = vandq_s32(v, vdupq_n_s32(0x80));
    const I half = vorrq_s32(vshlq_n_s32(magnitude, 7), vshlq_n_s32(sign, 8));
    const F value = mul(from_half(narrow(half)), splat(256.0f));
    const uint32x4_t nan = vceqq_s32(magnitude, vdupq_n_s32(0x7F));
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(value), nan));  // all bits set is a NaN
}

inline F widen(uint16x4_t b) { return vreinterpretq_f32_u32(vshll_n_u16(b, 16)); }
inline F load_bf16(const uint16_t* p) { return widen(vld1_u16(p)); }
inline F loadn_bf16(const uint16_t* p, int64_t n) { return widen(low_halves(p, n)); }
inline F load_f16(const uint16_t* p) { return from_half(vld1_u16(p)); }
inline F loadn_f16(const uint16_t* p, int64_t n) { return from_half(low_halves(p, n)); }

// The W numbers at p. (Wider vectors have more at q.)
inline F load_runs(const float* p, const float*) { return load(p); }
inline F load_runs_bf16(const uint16_t* p, const uint16_t*) { return load_bf16(p); }
inline F load_runs_f16(const uint16_t* p, const uint16_t*) { return load_f16(p); }

// float to bfloat16, round to nearest even; NaN stays NaN
inline uint16x4_t narrow_bf16(F v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), rounded, vdup_n_u16(0x7FC0));
}
inline F round_bf16(F v) { return widen(narrow_bf16(v)); }
inline void store_halves(uint16_t* p, uint16x4_t v, int64_t n) {
    if (n >= W) return vst1_u16(p, v);
    const uint64_t bits = vget_lane_u64(vreinterpret_u64_u16(v), 0);
    for (int64_t i = 0; i < n; i++) p[i] = static_cast<uint16_t>(bits >> (16 * i));
}
inline void store_bf16(uint16_t* p, F v) { vst1_u16(p, narrow_bf16(v)); }
inline void storen_bf16(uint16_t* p, F v, int64_t n) { store_halves(p, narrow_bf16(v), n); }
inline void storen_f16(uint16_t* p, F v, int64_t n) { store_halves(p, vreinterpret_u16_f16(vcvt_f16_f32(v)), n); }

// Rows become columns.
inline void transpose(F (&v)[4]) {
    const F a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]), c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
    v[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    v[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    v[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    v[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}
