// Which levels this binary holds and this processor can run, best first.
#pragma once

#include "common.h"

namespace quanto {
constexpr int MAX_LEVELS = 8;
// Fills `out` and returns how many there are; 0 on a processor without AVX2 or NEON.
int available_levels(const Level** out);
}  // namespace quanto
