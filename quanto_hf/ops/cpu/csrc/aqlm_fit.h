// Making additive codebooks (quanto_hf/fit/aqlm): the loops that take the time, each once per level of instructions.
#pragma once

#include "common.h"

namespace quanto {

// K codebooks of `size` vectors of `width` values.
struct Codebooks {
    const float* values;
    int64_t count, size, width;
};

// Better codes for groups: see quanto_hf/fit/aqlm/search.py.
struct AqlmSearch {
    const float* targets;  // n rows of width
    int32_t* codes;        // n rows of count
    Codebooks books;
    int64_t n;
    int beam, threads;
};

// The same for the column groups one after another, each followed by what its error does to those to its right: see
// quanto_hf/fit/aqlm/sweep.py. `rows` groups of out_group rows each; `columns` groups of in_group columns.
struct AqlmSweep {
    float* state;         // rows * out_group rows of columns * in_group; overwritten
    const float* weight;  // the same, or null: codes are moved from where they are
    const float* follow;  // columns * in_group, square
    const float* lower;   // per column group, in_group square: the codebooks in its metric
    const float* to;      // the same: the state in its metric
    int32_t* codes;       // rows * columns rows of count
    Codebooks books;      // width: out_group * in_group
    int64_t rows, columns, out_group, in_group;
    int beam, threads;
};

// out = a b, for a of m rows of k and b of k rows of n. Each number is summed in the order of k, whatever the threads.
struct Product {
    const float* a;
    const float* b;  // rows `stride` apart
    float* out;
    int64_t m, n, k, stride;
    int threads;
};

// sums[k, c] += weight * value and weights[k, c] += weight over the groups whose code of codebook k is c, in the order
// of the groups. `per_weight` groups in a row share a weight.
struct CodeSums {
    const float* values;   // n rows of width
    const float* weights;  // n / per_weight
    const int32_t* codes;  // n rows of count
    double* sums;          // count * size rows of width, zeros
    double* totals;        // count * size, zeros
    int64_t n, per_weight, count, size, width;
    int threads;
};

constexpr int MAX_BEAM = 64;

struct AqlmFit {
    void (*search)(const AqlmSearch&);
    void (*sweep)(const AqlmSweep&);
    void (*product)(const Product&);
};

// The loops for a level of instructions.
const AqlmFit& aqlm_fit_of(const Level& level);
void code_sums(const CodeSums&);

}  // namespace quanto
