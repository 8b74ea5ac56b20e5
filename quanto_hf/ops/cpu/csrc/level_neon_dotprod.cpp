// NEON with FEAT_DotProd: many from armv8.2 on (Cortex-A76, Neoverse N1 and Graviton 2, Apple M1).
#include "target.h"
#if defined(QUANTO_ARM64_ASSEMBLY)
#include <arm_neon.h>

#include "common.h"
#if defined(__clang__)
QUANTO_TARGET("dotprod")
#else
QUANTO_TARGET("arch=armv8.2-a+dotprod")  // the assembler takes sdot from there on
#endif

namespace quanto {
namespace neon_dotprod {
namespace {
#include "simd_neon.h"
#include "decode.h"
#include "grid.h"
#include "fit.h"
#include "quantize.h"
#include "gemv.h"
#include "gemm.h"
#include "int8_neon.h"
#include "gemm_int8_neon.h"
#include "linear_int8_neon.h"
#include "aqlm_decode.h"
#include "aqlm_range.h"
#include "aqlm_rows.h"
#include "aqlm_tables.h"
#include "aqlm_panels.h"
#include "aqlm.h"

void linear(const Linear& a) { a.m <= GEMV_ROWS ? gemv(a) : gemm<DotF32>(a); }
}  // namespace
extern const Level level;
const Level level = {"neon_dotprod", linear, dequantize, quantize, linear_int8<LanePanels>, nullptr, aqlm_linear, aqlm_dequantize};
}  // namespace neon_dotprod
}  // namespace quanto
QUANTO_TARGET_END
#endif
