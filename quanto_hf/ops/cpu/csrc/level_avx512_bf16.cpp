// AVX-512 with BF16, VBMI and VNNI: Zen 4 and later, Sapphire Rapids and later.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "common.h"
#define QUANTO_AQLM_BF16
#include "target.h"
QUANTO_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,avx2,fma,f16c")

namespace quanto {
namespace avx512_bf16 {
namespace {
#include "simd_avx512.h"
#include "decode.h"
#include "grid.h"
#include "fit.h"
#include "quantize.h"
#include "gemv.h"
#include "gemm.h"
#include "ahead.h"
#include "bf16_blocks.h"
#include "late.h"
#include "row_lanes.h"
#include "gemv_lanes.h"
#include "gemv_bf16.h"
#include "gemm_bf16.h"
#include "int8.h"
#include "int8_gemm.h"
#include "int8_x_groups.h"
#include "int8_dot_vnni.h"
#include "int8_groups.h"
#include "int8_rows.h"
#include "linear_int8.h"
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
const Level level = {"avx512_bf16", linear, dequantize, quantize, linear_int8, linear_int8_groups, aqlm_linear, aqlm_dequantize};
}  // namespace avx512_bf16
}  // namespace quanto
QUANTO_TARGET_END
#endif
