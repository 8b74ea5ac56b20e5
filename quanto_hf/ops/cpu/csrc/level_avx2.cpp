// AVX2, FMA and F16C: Haswell and later, all Zen.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "common.h"
#include "target.h"
QUANTO_TARGET("avx2,fma,f16c")

namespace quanto {
namespace avx2 {
namespace {
#include "simd_avx2.h"
#include "decode.h"
#include "grid.h"
#include "fit.h"
#include "quantize.h"
#include "gemv.h"
#include "gemm.h"
#include "ahead.h"
#include "words.h"
#include "ordered_x.h"
#include "gemv_blocks.h"
#include "gemv_forms.h"
#include "int8_wide.h"
#include "int8_wide_gemm.h"
#include "int8_x_groups.h"
#include "int8_dot_madd.h"
#include "row_lanes.h"
#include "int8_groups.h"
#include "linear_int8.h"
#include "aqlm_decode.h"
#include "aqlm_range.h"
#include "aqlm_rows.h"
#include "aqlm_tables.h"
#include "aqlm_panels.h"
#include "aqlm.h"

void linear(const Linear& a) {
    if (a.m > GEMV_ROWS) return gemm<DotF32>(a);
    if (!gemv_blocks(a)) gemv(a);
}
}  // namespace
extern const Level level;
const Level level = {"avx2", linear, dequantize, quantize, linear_int8, linear_int8_groups, aqlm_linear, aqlm_dequantize};
}  // namespace avx2
}  // namespace quanto
QUANTO_TARGET_END
#endif
