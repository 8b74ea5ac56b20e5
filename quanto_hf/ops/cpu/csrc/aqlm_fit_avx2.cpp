// Making additive codebooks with AVX2 and FMA.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "aqlm_fit.h"
#include "target.h"
QUANTO_TARGET("avx2,fma,f16c")

namespace quanto {
namespace avx2 {
namespace {
#include "simd_avx2.h"
#include "aqlm_search.h"
#include "aqlm_sweep.h"
}  // namespace
extern const AqlmFit aqlm_fit;
const AqlmFit aqlm_fit = {aqlm_search, aqlm_sweep, product};
}  // namespace avx2
}  // namespace quanto
QUANTO_TARGET_END
#endif
