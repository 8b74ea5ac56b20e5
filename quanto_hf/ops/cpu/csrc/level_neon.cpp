// The NEON of every 64-bit ARM processor (armv8-a): nothing has to be raised.
#include "target.h"
#if defined(QUANTO_ARM64)
#include <arm_neon.h>

#include "common.h"

namespace quanto {
namespace neon {
namespace {
#include "simd_neon.h"
#include "decode.h"
#include "grid.h"
#include "fit.h"
#include "quantize.h"
#include "gemv.h"
#include "gemm.h"
#include "aqlm_decode.h"
#include "aqlm_range.h"
#include "aqlm_rows.h"
#include "aqlm_tables.h"
#include "aqlm_panels.h"
#include "aqlm.h"

void linear(const Linear& a) { a.m <= GEMV_ROWS ? gemv(a) : gemm<DotF32>(a); }
}  // namespace
extern const Level level;
const Level level = {"neon", linear, dequantize, quantize, nullptr, nullptr, aqlm_linear, aqlm_dequantize};
}  // namespace neon
}  // namespace quanto
#endif
