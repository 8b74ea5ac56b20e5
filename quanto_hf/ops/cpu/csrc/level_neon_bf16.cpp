// NEON with FEAT_BF16, FEAT_I8MM and FEAT_DotProd: armv8.6 and later (Graviton 3, Neoverse N2 and V1, Apple M2).
// Processors that have the first have the others.
#include "target.h"
#if defined(QUANTO_ARM64_ASSEMBLY)
#include <arm_neon.h>

#include "common.h"
#define QUANTO_AQLM_BF16
#if defined(__clang__)
QUANTO_TARGET("bf16,i8mm,dotprod")
#else
QUANTO_TARGET("arch=armv8.2-a+bf16+i8mm+dotprod")
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
#include "late.h"
#include "gemv_neon_bf16.h"
#include "neon_pairs.h"
#include "gemm_neon_bf16.h"
#include "int8_neon.h"
#include "gemm_int8_neon.h"
#include "linear_int8_neon.h"
#include "linear_bf16.h"
#include "aqlm_decode.h"
#include "aqlm_range.h"
#include "aqlm_rows.h"
#include "aqlm_tables.h"
#include "aqlm_panels.h"
#include "aqlm_panels_bf16.h"
#include "aqlm_eights.h"
#include "aqlm.h"
}  // namespace
extern const Level level;
const Level level = {"neon_bf16", linear, dequantize, quantize, linear_int8<PairPanels>, nullptr, aqlm_linear, aqlm_dequantize};
}  // namespace neon_bf16
}  // namespace quanto
QUANTO_TARGET_END
#endif
