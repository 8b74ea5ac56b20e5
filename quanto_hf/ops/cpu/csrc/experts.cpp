#include "experts.h"

namespace quanto {
namespace {

// Behind the slots of the kernels, which run while these are in use.
enum Slot { ORDER = 6, INPUT = 7, OUTPUT = 8 };

// Rows that are copied for one call of a kernel: as many as gemm.h multiplies with a panel of the weight at a time.
constexpr int64_t MOST_COPIED = 512;
// Threads are woken for copies above this size; one of them copies 64 KB in the 4 us that this takes.
constexpr int64_t PARALLEL_BYTES = 1 << 16;

const void* at(const void* p, int64_t bytes) { return p ? static_cast<const uint8_t*>(p) + bytes : nullptr; }

// Calls copy(i) for the rows [0, count) of `bytes` each.
template <class Copy>
void copy_rows(int64_t count, int64_t bytes, int threads, const Copy& copy) {
    if (!bytes) return;
    parallel(count * bytes > PARALLEL_BYTES ? threads : 1, [&](int thread, int of) {
        const Range part = share(count, 1, thread, of);
        for (int64_t i = part.begin; i < part.end; i++) copy(i);
    });
}

// The rows of x and out that `rows` names, in ascending order.
void one_expert(const Level& level, Linear call, const int64_t* rows, int64_t count) {
    const int64_t in_bytes = call.w.k * size_of(call.x_type), out_bytes = call.w.n * size_of(call.x_type);
    const uint8_t* x = static_cast<const uint8_t*>(call.x);
    uint8_t* out = static_cast<uint8_t*>(call.out);
    if (rows[count - 1] - rows[0] == count - 1) {  // side by side, as all are where the ids are sorted
        call.x = x + rows[0] * in_bytes, call.out = out + rows[0] * out_bytes, call.m = count;
        return level.linear(call);
    }
    for (int64_t done = 0; done < count; done += MOST_COPIED, rows += MOST_COPIED) {
        call.m = count - done < MOST_COPIED ? count - done : MOST_COPIED;
        uint8_t* input = static_cast<uint8_t*>(scratch(INPUT, call.m * in_bytes));
        uint8_t* output = static_cast<uint8_t*>(scratch(OUTPUT, call.m * out_bytes));
        copy_rows(call.m, in_bytes, call.threads,
                  [&](int64_t i) { std::memcpy(input + i * in_bytes, x + rows[i] * in_bytes, in_bytes); });
        call.x = input, call.out = output;
        level.linear(call);
        copy_rows(call.m, out_bytes, call.threads,
                  [&](int64_t i) { std::memcpy(out + rows[i] * out_bytes, output + i * out_bytes, out_bytes); });
    }
}

}  // namespace

bool expert_linear(const Level& level, const ExpertLinear& e) {
    const Linear& a = e.a;
    // rows of x by expert: counted, then put in order
    int64_t* ends = static_cast<int64_t*>(scratch(ORDER, (e.experts + 1 + a.m) * sizeof(int64_t)));
    int64_t* order = ends + e.experts + 1;
    for (int64_t i = 0; i <= e.experts; i++) ends[i] = 0;
    for (int64_t i = 0; i < a.m; i++) {
        const int64_t id = e.ids[i];
        if (id < 0 || id >= e.experts) return false;
        ends[id + 1]++;
    }
    for (int64_t i = 0; i < e.experts; i++) ends[i + 1] += ends[i];
    // ends[id] is where the rows of an expert begin, and after this loop where they end
    for (int64_t i = 0; i < a.m; i++) order[ends[e.ids[i]]++] = i;

    const int64_t scale_bytes = a.w.n * a.w.groups * size_of(a.w.scale_type);
    for (int64_t id = 0, begin = 0; id < e.experts; begin = ends[id++]) {
        if (ends[id] == begin) continue;
        Linear call = a;
        call.w.packed = a.w.packed + id * a.w.n * row_bytes(a.w.codes, a.w.k);
        call.w.scale = at(a.w.scale, id * scale_bytes);
        call.w.zero = at(a.w.zero, id * scale_bytes);
        call.bias = at(a.bias, id * a.w.n * size_of(a.x_type));
        one_expert(level, call, order + begin, ends[id] - begin);
    }
    return true;
}

}  // namespace quanto
