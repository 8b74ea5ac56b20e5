// W rows of the weight in the lanes of a vector, for the kernels that multiply so: int8_groups.h and gemv_lanes.h. Included
// inside the namespace of a level for x86.

// A shorter last block as a whole one: docs/format.md. What lies behind the last code does not matter, x is 0 there.
template <int BITS>
inline void whole_block(const uint8_t* packed, int64_t codes, uint8_t* out) {
    constexpr int PLANES = 8 / BITS;
    const int64_t bytes = (codes + PLANES - 1) / PLANES;
    uint8_t natural[PLANES * BLOCK_BYTES] = {};
    for (int p = 0; p < PLANES; p++)
        for (int64_t i = 0; i < bytes; i++) natural[p * bytes + i] = packed[i] >> (p * BITS) & ((1 << BITS) - 1);
    std::memcpy(out, natural, BLOCK_BYTES);
    for (int p = 1; p < PLANES; p++)
        for (int64_t i = 0; i < BLOCK_BYTES; i++) out[i] |= static_cast<uint8_t>(natural[p * BLOCK_BYTES + i] << (p * BITS));
}

// Scales of W rows, and zeros less the middle code: [group][W].
struct LaneScales {
    float *scales, *zeros;  // zeros: null if they are all 0
};

inline void lane_scales(const Weight& w, const void* from, int64_t row, float offset, float* out) {
    with_type(w.scale_type, [&](auto tag) {
        for (int64_t g = 0; g < w.groups; g += W) {
            F v[W];
            for (int i = 0; i < W; i++) {
                const int64_t at = (row + i < w.n ? row + i : w.n - 1) * w.groups + g, n = w.groups - g < W ? w.groups - g : W;
                v[i] = sub(loadn_as<decltype(tag)::type>(from, at, n), splat(offset));
            }
            transpose(v);
            for (int i = 0; i < W && g + i < w.groups; i++) store(out + (g + i) * W, v[i]);
        }
    });
}
