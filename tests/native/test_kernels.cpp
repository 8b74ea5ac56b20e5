// Checks the native kernels without Python: every level of this processor against a plain reference in float64.
//
//   test_kernels [--sample | --small] [--calls] [--seed=N] [level ...]
//
//   --sample   each kernel, number type, dtype and number of rows of x once, with shapes drawn by the seed
//   --small    besides, fewer and smaller shapes of the grid, for emulators and sanitizers; else all of it
//   --calls    print each kind of call that was made
//
// Everything that a kernel reads or writes ends at a page that may not be touched, so that one byte too far is a crash.
// Exit code 0: all checks hold. Else the first failures are printed.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../quanto_hf/ops/cpu/csrc/aqlm_fit.h"
#include "../../quanto_hf/ops/cpu/csrc/dispatch.h"
#include "../../quanto_hf/ops/cpu/csrc/experts.h"

using namespace quanto;

namespace {

const std::vector<int64_t> GRID_ROWS = {1, 2, 7, 8, 9, 16, 17, 33};

#include "report.h"
#include "guarded.h"
#include "numbers.h"
#include "example.h"
#include "noted_levels.h"
#include "check_linear.h"
#include "check_experts.h"
#include "check_grid.h"
#include "check_int8.h"
#include "check_extremes.h"
#include "check_int8_rows.h"
#include "check_aqlm.h"
#include "check_aqlm_fit.h"
#include "check_quantize.h"
#include "check_sample.h"

int check_kernels(int count, char** arguments) {
    bool sample = false, small = false, print_calls = false;
    std::vector<std::string> wanted;
    for (int i = 1; i < count; i++) {
        const std::string argument = arguments[i];
        if (argument == "--sample") sample = true;
        else if (argument == "--small") small = true;
        else if (argument == "--calls") print_calls = true;
        else if (argument.rfind("--seed=", 0) == 0) generator.seed(static_cast<uint32_t>(std::atoll(arguments[i] + 7)));
        else wanted.push_back(argument);
    }
    const Level* offered[MAX_LEVELS];
    const int offers = available_levels(offered);
    std::vector<const Level*> chosen, levels;
    for (int i = 0; i < offers; i++)
        if (wanted.empty() || std::count(wanted.begin(), wanted.end(), offered[i]->name)) chosen.push_back(offered[i]);
    if (chosen.empty() || (!wanted.empty() && chosen.size() != wanted.size())) {
        std::printf("FAILED: this processor does not offer all the levels that were asked for, or none at all\n");
        return 1;
    }
    std::printf("levels:");
    for (int i = 0; i < offers; i++) std::printf(" %s", offered[i]->name);
    std::printf("\n");
    std::fflush(stdout);
    const std::vector<Level> noting = noted(chosen, std::make_index_sequence<MAX_LEVELS>());
    for (const Level& level : noting) levels.push_back(&level);

    check_sample(levels);
    check_all_quantize(levels);
    check_aqlm_fit(levels);
    check_empty(levels);
    check_extremes(levels);
    if (!sample) {
        check_all_linear(levels, small);
        check_all_int8(levels, small);
        check_all_experts(levels, small);
        check_int8_rows(levels, small);
        check_aqlm(levels, small);
    }
    if (print_calls)
        for (const std::string& call : calls) std::printf("call: %s\n", call.c_str());
    std::printf("%ld calls, %d failures\n", checks, failures);
    std::fflush(stdout);
    return failures ? 1 : 0;
}

}  // namespace

#if defined(QUANTO_SOURCES)
#include "built_module.h"
#else
int main(int count, char** arguments) { return check_kernels(count, arguments); }
#endif
