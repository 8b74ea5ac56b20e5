// A prototype that decided on the layout of the packed codes; compare.py compiles it, checks it and times it. It is not
// part of the package. AVX-512 BF16 and VBMI, K a multiple of 64, N of 32.
//
// Tiles: 16 rows of the weight stand in the 16 lanes of a register. A dword holds 8 codes of 4 bits (columns 0 2 4 6 1 3 5
// 7, so that each half has one code of every pair) or 4 codes of 8 bits: [N/16][K/8][16] and [N/16][K/4][16] dwords.
// Scales and zeros of groups of 64 columns are bfloat16 [N/16][K/64][16]; those of rows are float32 [N].
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <vector>

using F = __m512;
using I = __m512i;
constexpr int64_t GROUP = 64, AHEAD = 1024;  // bytes of prefetch

static F dot(F acc, I a, I b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
static F widen(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static uint16_t bf16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static I fetch(const uint8_t* p) {
    _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
    return _mm512_loadu_si512(p);
}
static I code_table() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = bf16(i % 16);
    return _mm512_load_si512(values);
}

// out[m][n] as float32. x is [K/2][M] pairs of bfloat16, sums[m][K/64] those of x by group.
template <int M, int T>
static void int4_tiles(const uint8_t* packed, const uint16_t* scale, const uint16_t* zero, int64_t n, int64_t k, const int32_t* x,
                       const float* sums, float* out, int64_t t0, int64_t t1) {
    constexpr int CHAINS = M == 1 ? 2 : 1;
    const I table = code_table();
    const int64_t groups = k / GROUP, step = 128 / M;  // at most 16 KB of x at a time
    for (int64_t g0 = 0; g0 < groups; g0 += step)
        for (int64_t tile = t0; tile < t1; tile += T) {
            F total[T][M];
            for (int t = 0; t < T; t++)
                for (int m = 0; m < M; m++)
                    total[t][m] = g0 ? _mm512_loadu_ps(out + m * n + (tile + t) * 16) : _mm512_setzero_ps();
            for (int64_t g = g0; g < g0 + step && g < groups; g++) {
                F acc[T][M][CHAINS];
                for (auto& a : acc)
                    for (auto& b : a)
                        for (F& c : b) c = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (int64_t c = g * 8; c < g * 8 + 8; c++) {
                    I v[T];
                    for (int t = 0; t < T; t++) v[t] = fetch(packed + ((tile + t) * (k / 8) + c) * 64);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        I w[T];
                        for (int t = 0; t < T; t++) w[t] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v[t], 4 * i), table);
                        for (int m = 0; m < M; m++) {
                            const I pair = _mm512_set1_epi32(x[(c * 4 + i) * M + m]);
                            for (int t = 0; t < T; t++) acc[t][m][i % CHAINS] = dot(acc[t][m][i % CHAINS], w[t], pair);
                        }
                    }
                }
                for (int t = 0; t < T; t++) {
                    const int64_t at = ((tile + t) * groups + g) * 16;
                    const F s = widen(scale + at), z = widen(zero + at);
                    for (int m = 0; m < M; m++) {
                        F a = acc[t][m][0];
                        if (CHAINS == 2) a = _mm512_add_ps(a, acc[t][m][CHAINS - 1]);
                        a = _mm512_fnmadd_ps(z, _mm512_set1_ps(sums[m * groups + g]), a);
                        total[t][m] = _mm512_fmadd_ps(s, a, total[t][m]);
                    }
                }
            }
            for (int t = 0; t < T; t++)
                for (int m = 0; m < M; m++) _mm512_storeu_ps(out + m * n + (tile + t) * 16, total[t][m]);
        }
}

// The bytes of bfloat16 of 0 to 127: codes of 8 bits become bfloat16 as the row-major kernel makes them. The unpacking
// leaves each row in two neighbouring lanes of `lo` or `hi`, whose sums are added at the end.
struct Bytes {
    I low[2], high[2];
    Bytes() {
        alignas(64) uint8_t a[128], b[128];
        for (int i = 0; i < 128; i++) a[i] = (uint8_t)bf16(i), b[i] = bf16(i) >> 8;
        low[0] = _mm512_load_si512(a), low[1] = _mm512_load_si512(a + 64);
        high[0] = _mm512_load_si512(b), high[1] = _mm512_load_si512(b + 64);
    }
    void operator()(I codes, I& lo, I& hi) const {  // codes are never -128
        const I magnitude = _mm512_abs_epi8(codes), l = _mm512_permutex2var_epi8(low[0], magnitude, low[1]);
        I h = _mm512_permutex2var_epi8(high[0], magnitude, high[1]);
        h = _mm512_ternarylogic_epi64(h, codes, _mm512_set1_epi8((char)0x80), 0xF8);
        lo = _mm512_unpacklo_epi8(l, h), hi = _mm512_unpackhi_epi8(l, h);
    }
};

template <int M, int T>
static void int8_tiles(const uint8_t* packed, const float* scale, int64_t n, int64_t k, const int64_t* x, float* out, int64_t t0,
                       int64_t t1) {
    const Bytes bytes;
    std::vector<F> kept((t1 - t0) * M * 2);
    const int64_t quads = k / 4, step = 2048 / M;
    for (int64_t q0 = 0; q0 < quads; q0 += step)
        for (int64_t tile = t0; tile < t1; tile += T) {
            F acc[T][M][2];
            for (int t = 0; t < T; t++)
#pragma GCC unroll 16
                for (int i = 0; i < 2 * M; i++) acc[t][i / 2][i % 2] = kept[(tile - t0 + t) * 2 * M + i];
            for (int64_t q = q0; q < q0 + step && q < quads; q++) {
                I w[T][2];
                for (int t = 0; t < T; t++) bytes(fetch(packed + ((tile + t) * quads + q) * 64), w[t][0], w[t][1]);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const I four = _mm512_set1_epi64(x[q * M + m]);
                    for (int t = 0; t < T; t++)
                        for (int h = 0; h < 2; h++) acc[t][m][h] = dot(acc[t][m][h], w[t][h], four);
                }
            }
            for (int t = 0; t < T; t++)
#pragma GCC unroll 16
                for (int i = 0; i < 2 * M; i++) kept[(tile - t0 + t) * 2 * M + i] = acc[t][i / 2][i % 2];
        }
    for (int64_t tile = t0; tile < t1; tile++)
        for (int m = 0; m < M; m++) {
            alignas(64) float a[2][16];
            for (int h = 0; h < 2; h++) _mm512_store_ps(a[h], kept[(tile - t0) * 2 * M + 2 * m + h]);
            for (int r = 0; r < 16; r++) {  // rows 0 1 of four are in lo, 2 3 in hi
                const float* p = a[r / 2 % 2] + r / 4 * 4 + r % 2 * 2;
                out[m * n + tile * 16 + r] = (p[0] + p[1]) * scale[tile * 16 + r];
            }
        }
}

static void transpose(I* v) {  // 16 x 16 dwords
    alignas(64) static const int step[16] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const I lo = _mm512_load_si512(step), hi = _mm512_add_epi32(lo, _mm512_set1_epi32(8));
    for (int round = 0; round < 4; round++) {
        I t[16];
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_permutex2var_epi32(v[i], lo, v[i + 8]);
            t[2 * i + 1] = _mm512_permutex2var_epi32(v[i], hi, v[i + 8]);
        }
        std::memcpy(v, t, sizeof t);
    }
}
// Even and odd 16-bit lanes side by side.
static I zip(__m512bh even_odd) {
    alignas(64) static uint16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = i / 2 + i % 2 * 16;
    return _mm512_permutexvar_epi16(_mm512_load_si512(index), (I)even_odd);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void tiled_linear(int bits, const uint8_t* packed, const void* scale, const uint16_t* zero, int64_t n, int64_t k,
                         const uint16_t* x, float* out, int64_t m, int threads) {
    std::vector<int32_t> pairs(m * k / 2);
    std::vector<float> sums(m * (k / GROUP));
    const int64_t unit = bits == 4 ? 2 : 4;
    for (int64_t r = 0; r < m; r++)
        for (int64_t i = 0; i < k / unit; i++) std::memcpy((uint16_t*)pairs.data() + (i * m + r) * unit, x + r * k + i * unit, unit * 2);
    for (int64_t r = 0; bits == 4 && r < m; r++)
        for (int64_t g = 0; g < k / GROUP; g++) {
            F v = _mm512_setzero_ps();
            for (int64_t i = 0; i < GROUP; i += 16) v = _mm512_add_ps(v, widen(x + r * k + g * GROUP + i));
            sums[r * (k / GROUP) + g] = _mm512_reduce_add_ps(v);
        }
#pragma omp parallel num_threads(threads)
    {
        const int64_t t0 = n / 32 * omp_get_thread_num() / threads * 2, t1 = n / 32 * (omp_get_thread_num() + 1) / threads * 2;
        const uint16_t* s = (const uint16_t*)scale;
        const int64_t* fours = (const int64_t*)pairs.data();
        if (bits == 4 && m == 1) int4_tiles<1, 2>(packed, s, zero, n, k, pairs.data(), sums.data(), out, t0, t1);
        if (bits == 4 && m == 8) int4_tiles<8, 2>(packed, s, zero, n, k, pairs.data(), sums.data(), out, t0, t1);
        if (bits == 8 && m == 1) int8_tiles<1, 2>(packed, (const float*)scale, n, k, fours, out, t0, t1);
        if (bits == 8 && m == 8) int8_tiles<8, 1>(packed, (const float*)scale, n, k, fours, out, t0, t1);
    }
}

// int4 to bfloat16 [N][K]: a vector per column and its 16 rows, then a transpose.
EXPORT void tiled_dequantize(const uint8_t* packed, const uint16_t* scale, const uint16_t* zero, int64_t n, int64_t k, uint16_t* out,
                             int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < n / 16; tile++)
        for (int64_t c = 0; c < k / 8; c += 4) {
            const int64_t at = (tile * (k / GROUP) + c / 8) * 16;
            const F s = widen(scale + at), z = widen(zero + at);
            const auto value = [&](I v, int i) {
                const F code = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 4 * i), _mm512_set1_epi32(15)));
                return _mm512_mul_ps(_mm512_sub_ps(code, z), s);
            };
            I rows[16];
            for (int j = 0; j < 16; j++) {
                const I v = _mm512_loadu_si512(packed + (tile * (k / 8) + c + j / 4) * 64);
                rows[j] = zip(_mm512_cvtne2ps_pbh(value(v, 4 + j % 4), value(v, j % 4)));
            }
            transpose(rows);
            for (int r = 0; r < 16; r++) _mm512_storeu_si512(out + (tile * 16 + r) * k + c * 8, rows[r]);
        }
}

// The same for single rows, 32 columns at a time: 4 dwords that lie 64 bytes apart.
EXPORT void tiled_rows(const uint8_t* packed, const uint16_t* scale, const uint16_t* zero, int64_t k, const int64_t* index,
                       int64_t count, uint16_t* out, int threads) {
    const I shifts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < k / 8; c += 4) {
            const int64_t tile = index[i] / 16, lane = index[i] % 16;
            const int32_t* p = (const int32_t*)packed + (tile * (k / 8) + c) * 16 + lane;
            const int64_t at = (tile * (k / GROUP) + c / 8) * 16 + lane;
            const auto one = [&](uint16_t b) { return _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)b << 16)); };
            const F s = one(scale[at]), z = one(zero[at]);
            const I v = _mm512_setr_epi32(p[0], p[0], p[0], p[0], p[16], p[16], p[16], p[16], p[32], p[32], p[32], p[32], p[48], p[48],
                                          p[48], p[48]);
            const auto value = [&](I codes) {
                codes = _mm512_and_si512(_mm512_srlv_epi32(codes, shifts), _mm512_set1_epi32(15));
                return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), z), s);
            };
            _mm512_storeu_si512(out + i * k + c * 8, zip(_mm512_cvtne2ps_pbh(value(_mm512_srli_epi32(v, 16)), value(v))));
        }
}
