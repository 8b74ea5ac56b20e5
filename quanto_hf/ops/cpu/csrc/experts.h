// Rows of x times the weights of their own experts: a mixture-of-experts layer.
#pragma once

#include "common.h"

namespace quanto {

// `a` describes the whole call: m rows of x and of out, and the weight of expert 0, which has n rows. The weights, scales,
// zeros and biases of the other experts follow.
struct ExpertLinear {
    Linear a;
    const int64_t* ids;  // m of them, in any order
    int64_t experts;
};

// False: an id is not in [0, experts), and nothing but the ids has been read.
bool expert_linear(const Level& level, const ExpertLinear& e);

}  // namespace quanto
