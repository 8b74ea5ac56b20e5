// The kernels of a module that is built, in the place of compiled ones: tests/native/built.py brings the address of its
// functions. Included at the end of test_kernels.cpp.
#include "../../quanto_hf/ops/cpu/csrc/entry_points.h"

namespace {
const EntryPoints* built = nullptr;
}

namespace quanto {
int available_levels(const Level** out) { return built->available_levels(out); }
bool expert_linear(const Level& level, const ExpertLinear& e) { return built->expert_linear(level, e); }
const AqlmFit& aqlm_fit_of(const Level& level) { return built->aqlm_fit_of(level); }
void code_sums(const CodeSums& s) { built->code_sums(s); }
}  // namespace quanto

extern "C" __attribute__((visibility("default"))) int check_module(const EntryPoints* module, int count, char** arguments) {
    if (module->sources != QUANTO_SOURCES) {
        std::printf("FAILED: the module was built from other sources than csrc has now; build it again\n");
        std::fflush(stdout);
        return 1;
    }
    built = module;
    return check_kernels(count, arguments);
}
