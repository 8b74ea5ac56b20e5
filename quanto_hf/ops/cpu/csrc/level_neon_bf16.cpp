// NEON with FEAT_BF16: armv8.6 and later (Graviton 3, Neoverse N2 and V1, Apple M2).
#if defined(__aarch64__)
#include <arm_neon.h>

#include "common.h"
#include "target.h"
#if defined(__clang__)
QUANTO_TARGET("bf16")
#else
QUANTO_TARGET("+bf16")
#endif

namespace quanto {
namespace neon_bf16 {
namespace {
#include "simd_neon.h"
#include "decode.h"
#include "grid.h"
#include "fit.h"
#include "quantize.h"
#include "gemv.h"
#include "gemm.h"
#include "neon_bf16_blocks.h"
#include "gemv_neon_bf16.h"
#include "gemm_neon_bf16.h"

void linear(const Linear& a) {
    const bool blocks = has_blocks(a.w);
    if (a.x_type == BF16) {
        if (a.m <= GEMV_ROWS) return blocks ? gemv_bf16(a) : gemv(a);
        return blocks ? gemm<DotBF16<true>>(a) : gemm<DotBF16<false>>(a);
    }
    a.m <= GEMV_ROWS ? gemv(a) : gemm<DotF32>(a);
}
}  // namespace
extern const Level level;
const Level level = {"neon_bf16", linear, dequantize, quantize, nullptr, nullptr};
}  // namespace neon_bf16
}  // namespace quanto
QUANTO_TARGET_END
#endif
