// Making additive codebooks with the NEON of every 64-bit ARM processor.
#include "target.h"
#if defined(QUANTO_ARM64)
#include <arm_neon.h>

#include "aqlm_fit.h"

namespace quanto {
namespace neon {
namespace {
#include "simd_neon.h"
#include "aqlm_search.h"
#include "aqlm_sweep.h"
}  // namespace
extern const AqlmFit aqlm_fit;
const AqlmFit aqlm_fit = {aqlm_search, aqlm_sweep, product};
}  // namespace neon
}  // namespace quanto
#endif
