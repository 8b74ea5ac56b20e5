// Compiles the rest of a file for more instructions than the rest of the library. One binary holds all levels, and the
// processor decides at run time. MSVC needs nothing: it compiles every intrinsic.
#pragma once

// 64-bit ARM. The levels above plain NEON use some assembly (neon_bf16_blocks.h says why), which MSVC does not know.
#if defined(__aarch64__) || defined(_M_ARM64)
#define QUANTO_ARM64 1
#if defined(__GNUC__) || defined(__clang__)
#define QUANTO_ARM64_ASSEMBLY 1
#endif
#endif

#define QUANTO_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QUANTO_TARGET(list) QUANTO_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define QUANTO_TARGET_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define QUANTO_TARGET(list) _Pragma("GCC push_options") QUANTO_PRAGMA(GCC target(list))
#define QUANTO_TARGET_END _Pragma("GCC pop_options")
#else
#define QUANTO_TARGET(list)
#define QUANTO_TARGET_END
#endif

// Unrolls the next loop completely: shifts by a constant take one operation, by a variable two and a register.
#if defined(__clang__)
#define QUANTO_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define QUANTO_UNROLL _Pragma("GCC unroll 16")
#else
#define QUANTO_UNROLL
#endif
