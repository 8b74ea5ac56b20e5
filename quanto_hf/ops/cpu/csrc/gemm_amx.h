// The products of gemm.h and int8_gemm.h on AMX tiles. Included inside the namespace of the level that has them.
//
// Everything is laid out for this already: the panel is 16 rows of 64 bytes per tile (the left operand), x tiles are
// [columns / STEP][16 rows of x][STEP] (the right one), and the sums are 16 x 16. Four tiles of sums at a time.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct AmxBF16 {
    static void dot00() { _tile_dpbf16ps(0, 4, 6); }
    static void dot01() { _tile_dpbf16ps(1, 4, 7); }
    static void dot10() { _tile_dpbf16ps(2, 5, 6); }
    static void dot11() { _tile_dpbf16ps(3, 5, 7); }
};
struct AmxInt8 {  // signed weights, unsigned x
    static void dot00() { _tile_dpbsud(0, 4, 6); }
    static void dot01() { _tile_dpbsud(1, 4, 7); }
    static void dot10() { _tile_dpbsud(2, 5, 6); }
    static void dot11() { _tile_dpbsud(3, 5, 7); }
};

template <class Dot, class Amx>
inline void amx_product(const typename Dot::Number* panel, int64_t rows, const typename Dot::Number* x, int64_t x_ld,
                        int64_t tiles, int64_t columns, float* sums, int64_t sums_ld, bool first) {
    constexpr int64_t STEP = 16 * Dot::STEP, PANEL_BYTES = CHUNK * sizeof(typename Dot::Number);
    const TileConfig config;
#if defined(__GNUC__)
    // GCC 12 drops the stores to the configuration otherwise, and the load faults
    __asm__ volatile("" : : "r"(&config) : "memory");
#endif
    _tile_loadconfig(&config);
    const int64_t sums_bytes = sums_ld * static_cast<int64_t>(sizeof(float));
    for (int64_t t = 0; t < tiles; t += 2) {
        const bool right = t + 1 < tiles;
        for (int64_t r = 0; r < rows; r += 32) {
            const bool below = r + 16 < rows;  // rows behind the last one are multiplied too, and never looked at
            float *c0 = sums + r * sums_ld + t * W, *c1 = c0 + 16 * sums_ld;
            if (first) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else {
                _tile_loadd(0, c0, sums_bytes);
                if (right) _tile_loadd(1, c0 + W, sums_bytes);
                if (below) _tile_loadd(2, c1, sums_bytes);
                if (below && right) _tile_loadd(3, c1 + W, sums_bytes);
            }
            for (int64_t k = 0; k < columns; k += STEP) {
                const auto *a = panel + r * CHUNK + k, *b = x + t * x_ld + k * W;
                _tile_loadd(4, a, PANEL_BYTES);
                _tile_loadd(6, b, 64);
                Amx::dot00();
                if (right) {
                    _tile_loadd(7, b + x_ld, 64);
                    Amx::dot01();
                }
                if (below) {
                    _tile_loadd(5, a + 16 * CHUNK, PANEL_BYTES);
                    Amx::dot10();
                    if (right) Amx::dot11();
                }
            }
            _tile_stored(0, c0, sums_bytes);
            if (right) _tile_stored(1, c0 + W, sums_bytes);
            if (below) _tile_stored(2, c1, sums_bytes);
            if (below && right) _tile_stored(3, c1 + W, sums_bytes);
        }
    }
    _tile_release();
}

template <bool BLOCKS>
inline void multiply(DotBF16<BLOCKS>, const uint16_t* panel, int64_t rows, const uint16_t* x, int64_t x_ld, int64_t tiles,
                     int64_t columns, float* sums, int64_t sums_ld, bool first) {
    amx_product<DotBF16<BLOCKS>, AmxBF16>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}
inline void multiply(DotInt8, const uint8_t* panel, int64_t rows, const uint8_t* x, int64_t x_ld, int64_t tiles,
                     int64_t columns, float* sums, int64_t sums_ld, bool first) {
    amx_product<DotInt8, AmxInt8>(panel, rows, x, x_ld, tiles, columns, sums, sums_ld, first);
}
