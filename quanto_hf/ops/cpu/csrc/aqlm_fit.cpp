#include "aqlm_fit.h"
#include "target.h"

namespace quanto {

#if defined(__x86_64__) || defined(_M_X64)
namespace avx2 {
extern const AqlmFit aqlm_fit;
}
namespace avx512 {
extern const AqlmFit aqlm_fit;
}
// The levels above plain AVX-512 have more for 16-bit and 8-bit numbers; all of this is float32.
const AqlmFit& aqlm_fit_of(const Level& level) {
    return std::strcmp(level.name, "avx2") == 0 ? avx2::aqlm_fit : avx512::aqlm_fit;
}
#elif defined(QUANTO_ARM64)
namespace neon {
extern const AqlmFit aqlm_fit;
}
const AqlmFit& aqlm_fit_of(const Level&) { return neon::aqlm_fit; }
#else
const AqlmFit& aqlm_fit_of(const Level&) { std::abort(); }  // there is no level on other processors
#endif

// Every thread reads all codes and takes those of its own part of each codebook: a sum has one order, and no thread
// waits. (131,072 groups with two codes take 1 ms to read.)
void code_sums(const CodeSums& s) {
    parallel(s.threads, [&](int thread, int of) {
        const Range part = share(s.size, 1, thread, of);
        for (int64_t k = 0; k < s.count; k++) {
            for (int64_t i = 0; i < s.n; i++) {
                const int64_t code = s.codes[i * s.count + k];
                if (code < part.begin || code >= part.end) continue;
                const double weight = s.weights[i / s.per_weight];
                double* sum = s.sums + (k * s.size + code) * s.width;
                const float* value = s.values + i * s.width;
                for (int64_t j = 0; j < s.width; j++) sum[j] += weight * static_cast<double>(value[j]);
                s.totals[k * s.size + code] += weight;
            }
        }
    });
}

}  // namespace quanto
