// The functions behind those of module.cpp, for the test program (tests/native): it checks the kernels of a module that
// is built, and need not compile them again, which takes minutes.
#pragma once

#include "aqlm_fit.h"
#include "dispatch.h"
#include "experts.h"

namespace quanto {
struct EntryPoints {
    uint64_t sources;  // the start of the SHA-256 of csrc (setup.py): only the same sources have the same structures
    int (*available_levels)(const Level** out);
    bool (*expert_linear)(const Level&, const ExpertLinear&);
    const AqlmFit& (*aqlm_fit_of)(const Level&);
    void (*code_sums)(const CodeSums&);
};
}  // namespace quanto
