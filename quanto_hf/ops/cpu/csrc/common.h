// What every file of the native library shares: the description of a weight and of one call, threads, scratch memory.
// Standard headers are included here, before any file raises its instruction set: an inline function of theirs that
// is compiled for AVX-512 must never be the copy that the linker keeps for older processors.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#elif defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

namespace quanto {


// How codes are stored. TABLE types are looked up in `Weight::table`: int4, nf4, fp4 (4 bits) and int2 (2 bits).
enum Codes { INT8 = 0, E4M3 = 1, E5M2 = 2, TABLE4 = 3, TABLE2 = 4 };
enum Float { F32 = 0, BF16 = 1, F16 = 2 };

constexpr int64_t BLOCK_BYTES = 64;  // docs/format.md: codes are planar in blocks of 64 bytes

constexpr int bits_of(int codes) { return codes == TABLE4 ? 4 : codes == TABLE2 ? 2 : 8; }
constexpr int size_of(int type) { return type == F32 ? 4 : 2; }

// A matrix of n rows and k columns in blocks of out_group x in_group values, each the sum of an entry of each codebook,
// times a scale. Codes count modulo 2^bits.
struct Aqlm {
    const void* codes;      // [n / out_group][k / in_group][books], signed integers of code_bytes
    const void* codebooks;  // [books][1 << bits][out_group][in_group]
    const void* scales;     // [n / out_group]
    int64_t books, out_group, in_group;
    int bits, code_bytes, book_type, scale_type;
};

// A quantized matrix of n rows and k columns: w[i, j] = (value(code[i, j]) - zero[i, g]) * scale[i, g], g = j / group.
struct Weight {
    const uint8_t* packed;  // n rows of row_bytes(codes, k)
    const void* scale;      // n rows of `groups`
    const void* zero;       // the same, or null
    const float* table;     // 16 values of a TABLE type (int2 uses 4)
    int64_t n, k, group, groups;
    int codes, scale_type;
    const Aqlm* aqlm = nullptr;  // if there is one, it stands for all of the above but n and k
};

struct Linear {
    Weight w;
    const void* x;     // m rows of k
    const void* bias;  // n, or null
    void* out;         // m rows of n
    int64_t m;
    int x_type;  // of x, bias and out
    int threads;
    const float* x_scale = nullptr;  // x in int8: the scale of all of it; null: each row or group has its own
};

// The step of rounded numbers. 0, that of a row or of a calibration that saw only zeros, counts as 1.
inline float usable_scale(float scale) { return scale == 0.0f ? 1.0f : scale; }

// How scale and zero are found. RANGE: absmax and minmax.
enum Fit { RANGE = 0, MSE = 1, HQQ = 2 };

// A float matrix of n rows and k columns to be quantized. `group` columns share a scale, 0: the whole row; the last
// group of a row may be shorter.
struct Quantize {
    const void* in;
    uint8_t* packed;  // n rows of row_bytes(codes, k)
    void* scale;      // n rows of groups
    void* zero;       // the same; null: a symmetric grid
    const float* table;  // of nf4 and fp4 (grid.h), else null
    // lowest and highest number of the grid, then those of the fit. MSE: the share of the lost gain that is given back,
    // rounds of least squares, shares of the range to start from. HQQ: p, beta, kappa, iterations.
    const double* numbers;
    int64_t number_count;
    int64_t n, k, stride, group;  // stride: from row to row of `in`, in numbers
    int in_type, scale_type, codes, fit, threads;
};

constexpr int64_t row_bytes(int codes, int64_t k) {
    const int64_t per_byte = 8 / bits_of(codes), block = BLOCK_BYTES * per_byte;
    return k / block * BLOCK_BYTES + (k % block + per_byte - 1) / per_byte;
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Runs task(thread, threads) on that many threads and waits. Results never depend on the number of threads: a row of
// the output is computed by one thread, in one order.
template <class Task>
void parallel(int threads, const Task& task) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        task(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#elif defined(__APPLE__)
    if (threads > 1) {
        struct Context {
            const Task* task;
            int threads;
        } context = {&task, threads};
        dispatch_apply_f(static_cast<size_t>(threads), DISPATCH_APPLY_AUTO, &context, [](void* p, size_t thread) {
            const Context* c = static_cast<const Context*>(p);
            (*c->task)(static_cast<int>(thread), c->threads);
        });
        return;
    }
#endif
    (void)threads;
    task(0, 1);
}

// The part of `rows` that belongs to a thread: whole steps, spread evenly, so that no two threads write to one cache
// line of an output row and no thread gets more than one step above the others.
struct Range {
    int64_t begin, end;
};
inline Range share(int64_t rows, int64_t step, int thread, int threads) {
    const int64_t steps = (rows + step - 1) / step;
    const int64_t begin = steps * thread / threads * step, end = steps * (thread + 1) / threads * step;
    return {begin < rows ? begin : rows, end < rows ? end : rows};
}

// Asks for memory that will be read soon. It need not exist.
inline void ask_for(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}

// Memory that a thread keeps between calls, aligned to a cache line. Each `slot` is one buffer: 0 to 5 belong to the
// kernels of a level, those above to what calls them (experts.cpp).
constexpr int SLOTS = 9;
inline void* scratch(int slot, size_t bytes) {
    struct Buffers {
        void* raw[SLOTS] = {};
        void* aligned[SLOTS] = {};
        size_t size[SLOTS] = {};
        ~Buffers() {
            for (void* p : raw) std::free(p);
        }
    };
    thread_local Buffers buffers;
    if (buffers.size[slot] < bytes) {
        std::free(buffers.raw[slot]);
        buffers.raw[slot] = std::malloc(bytes + 64);
        buffers.size[slot] = buffers.raw[slot] ? bytes : 0;
        buffers.aligned[slot] = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffers.raw[slot]) + 63) & ~uintptr_t(63));
        if (!buffers.raw[slot]) std::abort();
    }
    return buffers.aligned[slot];
}

// Up to this many rows of x, each row of the weight is multiplied as it is decoded; above, panels of it are.
constexpr int64_t GEMV_ROWS = 8;

// What a level of instructions offers; null: no such kernel.
struct Level {
    const char* name;
    void (*linear)(const Linear&);
    void (*dequantize)(const Weight&, int out_type, void* out, const int64_t* rows, int64_t count, int threads);
    bool (*quantize)(const Quantize&);  // false: a value or a scale is not finite, and the result means nothing
    void (*linear_int8)(const Linear&);  // x is rounded to int8, a scale per row; w is int8 with one scale per row
    void (*linear_int8_groups)(const Linear&);  // a scale per 32 columns of x; w is int4 or int2, see linear_int8.h
    void (*aqlm_linear)(const Linear&);  // w has an Aqlm
    void (*aqlm_dequantize)(const Weight&, int out_type, void* out, int threads);
};

}  // namespace quanto
