// AMX tiles in plain C++, so that the kernels that use them can be tested on a processor that has none. What the
// instructions do: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS and TDPBSUD.
#pragma once

#include <cstdint>
#include <cstring>

namespace amx_emulation {
struct Tile {
    uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void need_configuration() {
    if (!configured) __builtin_trap();  // the processor would fault as well
}
inline void load(int t, const void* from, int64_t stride) {
    need_configuration();
    for (int r = 0; r < 16; r++) std::memcpy(tiles[t].bytes[r], static_cast<const uint8_t*>(from) + r * stride, 64);
}
inline void store(int t, void* to, int64_t stride) {
    need_configuration();
    for (int r = 0; r < 16; r++) std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles[t].bytes[r], 64);
}
inline float wide(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
inline void dot_bf16(int c, int a, int b) {
    need_configuration();
    uint16_t left[16][32], right[16][32];
    float sums[16][16];
    std::memcpy(left, tiles[a].bytes, 1024), std::memcpy(right, tiles[b].bytes, 1024), std::memcpy(sums, tiles[c].bytes, 1024);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 2; i++) sums[m][n] += wide(left[m][2 * k + i]) * wide(right[k][2 * n + i]);
    std::memcpy(tiles[c].bytes, sums, 1024);
}
inline void dot_int8(int c, int a, int b) {  // signed times unsigned
    need_configuration();
    int32_t sums[16][16];
    std::memcpy(sums, tiles[c].bytes, 1024);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 4; i++)
                    sums[m][n] += static_cast<int8_t>(tiles[a].bytes[m][4 * k + i]) * tiles[b].bytes[k][4 * n + i];
    std::memcpy(tiles[c].bytes, sums, 1024);
}
inline void configure(const void* config) {
    const uint8_t* bytes = static_cast<const uint8_t*>(config);
    if (bytes[0] != 1) __builtin_trap();
    for (int t = 0; t < 8; t++)
        if (bytes[16 + 2 * t] != 64 || bytes[48 + t] != 16) __builtin_trap();
    configured = true;
}
}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) amx_emulation::configure(config)
#define _tile_release() (amx_emulation::configured = false)
#define _tile_zero(t) std::memset(amx_emulation::tiles[t].bytes, 0, 1024)
#define _tile_loadd(t, from, stride) amx_emulation::load(t, from, stride)
#define _tile_stored(t, to, stride) amx_emulation::store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::dot_bf16(c, a, b)
#define _tile_dpbsud(c, a, b) amx_emulation::dot_int8(c, a, b)
