// Making additive codebooks with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "aqlm_fit.h"
#include "target.h"
QUANTO_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace quanto {
namespace avx512 {
namespace {
#include "simd_avx512.h"
#include "aqlm_search.h"
#include "aqlm_sweep.h"
}  // namespace
extern const AqlmFit aqlm_fit;
const AqlmFit aqlm_fit = {aqlm_search, aqlm_sweep, product};
}  // namespace avx512
}  // namespace quanto
QUANTO_TARGET_END
#endif
