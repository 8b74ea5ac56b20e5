// Checks the native kernels without Python: every level of this processor against a plain reference in float64.
//
//   test_kernels [--small] [level ...]     --small: fewer and smaller shapes, for emulators and sanitizers
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
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../quanto_hf/ops/cpu/csrc/dispatch.h"
#include "../../quanto_hf/ops/cpu/csrc/experts.h"

using namespace quanto;

namespace {

const char* const CODE_NAMES[] = {"int8", "e4m3", "e5m2", "table4", "table2"};
const char* const FLOAT_NAMES[] = {"f32", "bf16", "f16"};
const int64_t M_VALUES[] = {1, 2, 7, 8, 9, 16, 17, 33};
constexpr int64_t M_MAX = 33;

std::mt19937 generator(1);
int failures = 0;
long checks = 0;

double uniform(double low, double high) {  // std::uniform_real_distribution differs between libraries
    return low + (high - low) * (generator() / 4294967296.0);
}

// ---- memory ------------------------------------------------------------------------------------------------------

// Bytes that end where a protected page begins; what lies before them is filled, and may be checked.
class Guarded {
public:
    Guarded() = default;
    explicit Guarded(size_t bytes) : size_(bytes) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        open_ = (bytes / page + 1) * page;
        void* p = mmap(nullptr, open_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + open_, page, PROT_NONE) != 0) {
            std::perror("guarded memory");
            std::exit(2);
        }
        map_ = static_cast<uint8_t*>(p), mapped_ = open_ + page;
        std::memset(map_, FILL, open_);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept { *this = std::move(other); }
    Guarded& operator=(Guarded&& other) noexcept {
        std::swap(map_, other.map_), std::swap(mapped_, other.mapped_);
        std::swap(open_, other.open_), std::swap(size_, other.size_);
        return *this;
    }
    ~Guarded() {
        if (map_) munmap(map_, mapped_);
    }
    template <class T = void>
    T* get() const {
        return reinterpret_cast<T*>(map_ + open_ - size_);
    }
    size_t size() const { return size_; }
    bool intact() const {  // nothing has been written in front of it
        return std::all_of(map_, map_ + open_ - size_, [](uint8_t b) { return b == FILL; });
    }

private:
    static constexpr uint8_t FILL = 0xFF;  // a NaN in every type of float
    uint8_t* map_ = nullptr;
    size_t mapped_ = 0, open_ = 0, size_ = 0;
};

// ---- numbers, written plainly ------------------------------------------------------------------------------------

float float_of(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
uint32_t bits_of_float(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

// A float of `exponent` and `mantissa` bits with the usual bias; the highest exponent is inf and nan.
double from_bits(uint32_t bits, int exponent, int mantissa) {
    const uint32_t fraction = bits & ((1u << mantissa) - 1), e = (bits >> mantissa) & ((1u << exponent) - 1);
    const double sign = (bits >> (mantissa + exponent)) & 1 ? -1.0 : 1.0;
    const int bias = (1 << (exponent - 1)) - 1;
    if (e == (1u << exponent) - 1) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    if (e == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
    return sign * std::ldexp(fraction + (1u << mantissa), static_cast<int>(e) - bias - mantissa);
}
double half_of(uint16_t bits) { return from_bits(bits, 5, 10); }
double bf16_of(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// The float that is nearest, ties to even, among those with `mantissa` bits and exponents from `lowest` on. A sum with a
// number whose last bit has that weight is rounded there.
double rounded(double v, int mantissa, int lowest, double largest) {
    if (!std::isfinite(v)) return v;
    uint64_t bits;
    std::memcpy(&bits, &v, 8);
    const int exponent = std::max(static_cast<int>(bits >> 52 & 0x7FF) - 1023, lowest) - mantissa;
    bits = static_cast<uint64_t>(exponent + 52 + 1023) << 52;
    double magic;
    std::memcpy(&magic, &bits, 8);
    magic *= 1.5;
    const double r = (v + magic) - magic;
    return std::fabs(r) > largest ? std::copysign(std::numeric_limits<double>::infinity(), v) : std::copysign(r, v);
}
double round_to(double v, int type) {
    if (type == BF16) return rounded(v, 7, -126, 3.3895313892515355e38);
    if (type == F16) return rounded(v, 10, -14, 65504.0);
    return static_cast<float>(v);
}

double read(const void* p, int64_t i, int type) {
    if (type == F32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    return type == BF16 ? bf16_of(h) : half_of(h);
}
void write(void* p, int64_t i, int type, double v) {
    if (type == F32) {
        static_cast<float*>(p)[i] = static_cast<float>(v);
        return;
    }
    v = round_to(v, type);
    uint16_t h;
    if (type == BF16) {
        h = std::isnan(v) ? 0x7FC0 : static_cast<uint16_t>(bits_of_float(static_cast<float>(v)) >> 16);
    } else if (!std::isfinite(v)) {
        h = std::isnan(v) ? 0x7E00 : v < 0 ? 0xFC00 : 0x7C00;
    } else {
        const double a = std::fabs(v);
        int e = 0;
        if (a != 0) std::frexp(a, &e), e--;
        uint32_t bits = 0;
        if (a != 0 && e < -14) bits = static_cast<uint32_t>(std::ldexp(a, 24));
        else if (a != 0) bits = static_cast<uint32_t>(e + 15) << 10 | (static_cast<uint32_t>(std::ldexp(a, 10 - e)) & 0x3FF);
        h = static_cast<uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0));
    }
    static_cast<uint16_t*>(p)[i] = h;
}

// ---- a weight ----------------------------------------------------------------------------------------------------

struct Example {
    Guarded packed, scale, zero, table;
    Weight w;
    std::vector<float> exact;  // n x k, in float32 as docs/format.md has it
    std::string name;
};

double code_value(const Example& e, int code) {
    switch (e.w.codes) {
        case INT8: return static_cast<int8_t>(code);
        case E4M3: return (code & 0x7F) == 0x7F ? std::nan("") : (code & 0x78) == 0x78
                       ? (code & 0x80 ? -1 : 1) * std::ldexp(8 + (code & 7), 5)
                       : from_bits(code, 4, 3);
        case E5M2: return from_bits(code, 5, 2);
        default: return e.table.get<float>()[code];
    }
}

// Where docs/format.md puts code j of a row.
int read_code(const Example& e, int64_t row, int64_t j) {
    const int bits = bits_of(e.w.codes);
    const uint8_t* bytes = e.packed.get<uint8_t>() + row * row_bytes(e.w.codes, e.w.k);
    if (bits == 8) return bytes[j];
    const int64_t block = 64 * 8 / bits, base = j / block * block;
    const int64_t codes = std::min(block, e.w.k - base), m = (codes * bits + 7) / 8;
    return bytes[base * bits / 8 + (j - base) % m] >> ((j - base) / m * bits) & ((1 << bits) - 1);
}

void compute_exact(Example& e) {
    const Weight& w = e.w;
    e.exact.resize(w.n * w.k);
    for (int64_t i = 0; i < w.n; i++)
        for (int64_t j = 0; j < w.k; j++) {
            const int64_t g = i * w.groups + j / w.group;
            const float value = static_cast<float>(code_value(e, read_code(e, i, j)));
            const float shifted = value - (w.zero ? static_cast<float>(read(w.zero, g, w.scale_type)) : 0.0f);
            e.exact[i * w.k + j] = shifted * static_cast<float>(read(w.scale, g, w.scale_type));
        }
}

// `all_codes`: NaN and infinities of the float8 types too.
Example make(int codes, int64_t n, int64_t k, int64_t group, bool zero, int scale_type, bool all_codes) {
    Example e;
    Weight& w = e.w;
    w.codes = codes, w.n = n, w.k = k, w.scale_type = scale_type;
    w.group = group <= 0 || group > k ? std::max<int64_t>(k, 1) : group;
    w.groups = std::max<int64_t>((k + w.group - 1) / w.group, 1);
    e.packed = Guarded(n * row_bytes(codes, k));
    for (size_t i = 0; i < e.packed.size(); i++) {
        int code = generator() & 0xFF;
        if (!all_codes && codes == E4M3 && (code & 0x7F) == 0x7F) code ^= 1;
        if (!all_codes && codes == E5M2 && (code & 0x7C) == 0x7C) code ^= 0x40;
        e.packed.get<uint8_t>()[i] = static_cast<uint8_t>(code);
    }
    const double largest = codes == INT8 ? 128 : codes == E4M3 ? 448 : codes == E5M2 ? 57344 : 8;
    e.scale = Guarded(n * w.groups * size_of(scale_type));
    for (int64_t i = 0; i < n * w.groups; i++)
        write(e.scale.get(), i, scale_type, uniform(0.25, 1) / largest * (generator() & 1 ? 1 : -1));
    if (zero) {
        e.zero = Guarded(n * w.groups * size_of(scale_type));
        for (int64_t i = 0; i < n * w.groups; i++) write(e.zero.get(), i, scale_type, uniform(-0.5, 0.5) * largest);
    }
    if (bits_of(codes) < 8) {
        e.table = Guarded(16 * sizeof(float));
        for (int i = 0; i < 16; i++)
            e.table.get<float>()[i] = codes == TABLE4 ? static_cast<float>(round_to(uniform(-8, 8), BF16)) : i - 2.0f;
    }
    w.packed = e.packed.get<uint8_t>(), w.scale = e.scale.get();
    w.zero = zero ? e.zero.get() : nullptr;
    w.table = bits_of(codes) < 8 ? e.table.get<float>() : nullptr;
    compute_exact(e);
    char text[200];
    std::snprintf(text, sizeof text, "%s n=%lld k=%lld group=%lld scale=%s%s", CODE_NAMES[codes], static_cast<long long>(n),
                  static_cast<long long>(k), static_cast<long long>(group), FLOAT_NAMES[scale_type], zero ? " zero" : "");
    e.name = text;
    return e;
}

// ---- checks ------------------------------------------------------------------------------------------------------

bool fail(const char* format, ...) {
    if (++failures <= 20) {
        va_list arguments;
        va_start(arguments, format);
        std::fputs("FAILED: ", stdout);
        std::vprintf(format, arguments);
        std::fputs("\n", stdout);
        std::fflush(stdout);
        va_end(arguments);
    }
    return false;
}

bool same_bits(const Guarded& a, const Guarded& b) { return a.size() == b.size() && !std::memcmp(a.get(), b.get(), a.size()); }

bool check_dequantize(const Level& level, const Example& e, int out_type, const int64_t* rows, int64_t count) {
    const Weight& w = e.w;
    Guarded first;
    for (int threads : {1, 2, 3, 8}) {
        Guarded out(count * w.k * size_of(out_type));
        level.dequantize(w, out_type, out.get(), rows, count, threads);
        checks++;
        if (!out.intact()) return fail("%s dequantize %s: writes in front of out", level.name, e.name.c_str());
        if (threads > 1) {
            if (!same_bits(out, first)) return fail("%s dequantize %s: %d threads differ", level.name, e.name.c_str(), threads);
            continue;
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < w.k; j++) {
                const double wanted = round_to(e.exact[(rows ? rows[i] : i) * w.k + j], out_type);
                const double got = read(out.get(), i * w.k + j, out_type);
                if (std::isnan(wanted) ? !std::isnan(got) : got != wanted)
                    return fail("%s dequantize %s to %s [%lld, %lld]: %.9g instead of %.9g", level.name, e.name.c_str(),
                                FLOAT_NAMES[out_type], static_cast<long long>(i), static_cast<long long>(j), got, wanted);
            }
        first = std::move(out);
    }
    return true;
}

// Every product of M_MAX rows of x with the weight in float64, and the sum of the magnitudes.
struct Reference {
    std::vector<double> sum, magnitude;
};
// `from`: columns from here on keep their float32 weight, those before are rounded to bfloat16.
Reference multiply(const Example& e, const std::vector<double>& x, int64_t rounded_columns) {
    const int64_t n = e.w.n, k = e.w.k;
    Reference r;
    r.sum.assign(M_MAX * n, 0), r.magnitude.assign(M_MAX * n, 0);
    std::vector<double> column(n);
    for (int64_t j = 0; j < k; j++) {
        for (int64_t i = 0; i < n; i++) {
            const double v = e.exact[i * k + j];
            column[i] = j < rounded_columns ? round_to(v, BF16) : v;
        }
        for (int64_t m = 0; m < M_MAX; m++) {
            const double v = x[m * k + j];
            double *sum = &r.sum[m * n], *magnitude = &r.magnitude[m * n];
            for (int64_t i = 0; i < n; i++) sum[i] += v * column[i], magnitude[i] += std::fabs(v * column[i]);
        }
    }
    return r;
}

// Poisoned: row 1 of x and row 1 of the scales are NaN, and must not reach any other result.
bool check_linear(const std::vector<const Level*>& levels, Example& e, int x_type, bool small, bool with_bias, bool poisoned) {
    const int64_t n = e.w.n, k = e.w.k;
    std::vector<double> x(M_MAX * k);
    for (double& v : x) v = round_to(uniform(-1, 1), x_type);
    std::vector<Reference> references;
    references.push_back(multiply(e, x, 0));
    if (x_type == BF16) {
        // a level may round weights to bfloat16, as the torch reference does: all, or those in whole blocks
        const int64_t block = 64 * 8 / bits_of(e.w.codes);
        references.push_back(multiply(e, x, k));
        if (k % block && k > block && block > 64) references.push_back(multiply(e, x, k / block * block));
    }
    Guarded bias(n * size_of(x_type));
    for (int64_t i = 0; i < n; i++) write(bias.get(), i, x_type, uniform(-1, 1));
    if (poisoned) {
        const double nan = std::nan("");
        if (n > 1)
            for (int64_t g = 0; g < e.w.groups; g++) write(e.scale.get(), e.w.groups + g, e.w.scale_type, nan);
        for (int64_t j = 0; j < k; j++) x[k + j] = nan;
    }
    // sums in float32, in any order
    const double accuracy = 6e-8 * (4 + std::sqrt(static_cast<double>(k)));
    for (int64_t m : M_VALUES) {
        if (small && m != 1 && m != 7 && m != 9 && m != 33) continue;
        Guarded input(m * k * size_of(x_type));
        for (int64_t i = 0; i < m * k; i++) write(input.get(), i, x_type, x[i]);
        for (const Level* level : levels) {
            Guarded first;
            for (int threads : {1, 2, 3, 8}) {
                if (small && threads > 1 && threads != (m == 9 ? 8 : m == 1 ? 2 : 3)) continue;
                Guarded out(m * n * size_of(x_type));
                const Linear call = {e.w, input.get(), with_bias ? bias.get() : nullptr, out.get(), m, x_type, threads};
                level->linear(call);
                checks++;
                const auto complain = [&](const char* what, int64_t i, int64_t j, double got, double wanted) {
                    return fail("%s linear %s x=%s m=%lld bias=%d threads=%d: %s [%lld, %lld] %.9g, wanted %.9g", level->name,
                                e.name.c_str(), FLOAT_NAMES[x_type], static_cast<long long>(m), with_bias, threads, what,
                                static_cast<long long>(i), static_cast<long long>(j), got, wanted);
                };
                if (!out.intact()) return complain("writes in front of out", 0, 0, 0, 0);
                if (threads > 1) {
                    if (!same_bits(out, first)) return complain("differs from one thread", 0, 0, 0, 0);
                    continue;
                }
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < n; j++) {
                        const double got = read(out.get(), i * n + j, x_type);
                        if (poisoned && k > 0 && (i == 1 || j == 1)) {
                            if (!std::isnan(got)) return complain("NaN is lost", i, j, got, std::nan(""));
                            continue;
                        }
                        bool good = false;
                        for (const Reference& r : references) {
                            const double b = with_bias ? read(bias.get(), j, x_type) : 0;
                            const double wanted = r.sum[i * n + j] + b;
                            const double slack = accuracy * (r.magnitude[i * n + j] + std::fabs(b)) + 1e-30;
                            const double low = round_to(wanted - slack, x_type), high = round_to(wanted + slack, x_type);
                            good = good || (got >= low && got <= high);
                        }
                        if (!good) return complain("is", i, j, got, references[0].sum[i * n + j]);
                    }
                first = std::move(out);
            }
        }
    }
    return true;
}

// Each row has the bits that the level's linear gives for the rows of its expert; an id that does not exist is found
// before anything is written. The weights of `experts` experts are the rows of one example.
bool check_experts(const Level& level, int codes, int64_t experts, int64_t n, int64_t k, int64_t m, int x_type, bool zero,
                   bool sorted) {
    Example e = make(codes, experts * n, k, 32, zero, BF16, false);
    Guarded x(m * k * size_of(x_type)), bias(experts * n * size_of(x_type)), ids(m * sizeof(int64_t));
    for (int64_t i = 0; i < m * k; i++) write(x.get(), i, x_type, uniform(-1, 1));
    for (int64_t i = 0; i < experts * n; i++) write(bias.get(), i, x_type, uniform(-1, 1));
    std::vector<int64_t> chosen(m);
    for (int64_t& id : chosen) id = generator() % experts;
    std::replace(chosen.begin(), chosen.end(), experts / 2, experts - 1);  // one without rows, unless it is the only one
    if (sorted) std::sort(chosen.begin(), chosen.end());
    std::copy(chosen.begin(), chosen.end(), ids.get<int64_t>());
    const int64_t in_bytes = k * size_of(x_type), out_bytes = n * size_of(x_type);
    Weight w = e.w;
    w.n = n;
    std::vector<uint8_t> wanted(m * out_bytes);
    for (int64_t id = 0; id < experts; id++) {
        std::vector<int64_t> rows;
        for (int64_t i = 0; i < m; i++)
            if (chosen[i] == id) rows.push_back(i);
        if (rows.empty()) continue;
        const int64_t count = static_cast<int64_t>(rows.size());
        Guarded input(count * in_bytes), output(count * out_bytes);
        for (int64_t i = 0; i < count; i++)
            std::memcpy(input.get<uint8_t>() + i * in_bytes, x.get<uint8_t>() + rows[i] * in_bytes, in_bytes);
        Linear alone = {w, input.get(), bias.get<uint8_t>() + id * out_bytes, output.get(), count, x_type, 1};
        alone.w.packed += id * n * row_bytes(codes, k);
        alone.w.scale = static_cast<const uint16_t*>(w.scale) + id * n * w.groups;
        if (zero) alone.w.zero = static_cast<const uint16_t*>(w.zero) + id * n * w.groups;
        level.linear(alone);
        for (int64_t i = 0; i < count; i++)
            std::memcpy(wanted.data() + rows[i] * out_bytes, output.get<uint8_t>() + i * out_bytes, out_bytes);
    }
    for (int threads : {1, 2, 3, 8}) {
        Guarded out(m * out_bytes);
        const ExpertLinear call = {{w, x.get(), bias.get(), out.get(), m, x_type, threads}, ids.get<int64_t>(), experts};
        checks++;
        if (!expert_linear(level, call)) return fail("%s experts %s: an id was refused", level.name, e.name.c_str());
        if (!out.intact() || std::memcmp(out.get(), wanted.data(), wanted.size()))
            return fail("%s experts %s x=%s experts=%lld m=%lld sorted=%d threads=%d: not those of linear", level.name,
                        e.name.c_str(), FLOAT_NAMES[x_type], static_cast<long long>(experts), static_cast<long long>(m),
                        sorted, threads);
    }
    for (const int64_t wrong : {int64_t(-1), experts, std::numeric_limits<int64_t>::min()}) {
        Guarded out(m * out_bytes);
        ids.get<int64_t>()[m - 1] = wrong;
        // the fill of `out` is what its bytes were, and null would be read
        const ExpertLinear call = {{w, nullptr, nullptr, out.get(), m, x_type, 2}, ids.get<int64_t>(), experts};
        checks++;
        const uint8_t* bytes = out.get<uint8_t>();
        if (expert_linear(level, call) || !std::all_of(bytes, bytes + out.size(), [](uint8_t b) { return b == 0xFF; }))
            return fail("%s experts: the id %lld of %lld is not refused", level.name, static_cast<long long>(wrong),
                        static_cast<long long>(experts));
    }
    return true;
}

#include "int8_checks.h"
#include "check_extremes.h"
#include "check_int8_rows.h"
#include "check_aqlm.h"

}  // namespace

int main(int count, char** arguments) {
    bool small = false;
    std::vector<std::string> wanted;
    for (int i = 1; i < count; i++) {
        if (std::string(arguments[i]) == "--small") small = true;
        else wanted.push_back(arguments[i]);
    }
    const Level* offered[MAX_LEVELS];
    const int offers = available_levels(offered);
    std::vector<const Level*> levels;
    for (int i = 0; i < offers; i++)
        if (wanted.empty() || std::count(wanted.begin(), wanted.end(), offered[i]->name)) levels.push_back(offered[i]);
    if (levels.empty() || (!wanted.empty() && levels.size() != wanted.size())) {
        std::printf("FAILED: this processor does not offer all the levels that were asked for, or none at all\n");
        return 1;
    }
    std::printf("levels:");
    for (int i = 0; i < offers; i++) std::printf(" %s", offered[i]->name);
    std::printf("\n");
    std::fflush(stdout);

    const int64_t GROUPS[] = {-1, 32, 64, 96, 16, 7};
    const int64_t K_VALUES[] = {1, 13, 200, 512, 640, 1000};
    const int64_t N_VALUES[] = {1, 13, 200, 512, 640, 1000}, N_SMALL[] = {1, 13, 45, 101};
    int turn = 0;
    for (int codes : {INT8, E4M3, E5M2, TABLE4, TABLE2})
        for (int64_t group : GROUPS)
            for (bool zero : {false, true})
                for (int64_t k : K_VALUES) {
                    turn++;
                    if (small && (turn + group + 1) % 3 == 0) continue;  // every k and every group stays
                    // Wide shapes in turn, so that every width meets every kind of weight, and few are both wide and long.
                    const int64_t n = small ? N_SMALL[turn % 4] : k >= 512 && turn % 7 ? N_SMALL[turn % 4] : N_VALUES[turn % 6];
                    Example e = make(codes, n, k, group, zero, turn % 4 == 3 ? F16 : turn % 2 ? BF16 : F32, false);
                    std::vector<int64_t> picked;
                    for (int i = 0; i < 5; i++) picked.push_back(generator() % n);
                    Guarded rows(picked.size() * sizeof(int64_t));
                    std::memcpy(rows.get(), picked.data(), rows.size());
                    for (const Level* level : levels)
                        for (int out_type : {F32, BF16, F16}) {
                            check_dequantize(*level, e, out_type, rows.get<int64_t>(), static_cast<int64_t>(picked.size()));
                            if (n <= 200) check_dequantize(*level, e, out_type, nullptr, n);
                        }
                    for (int x_type : {F32, BF16, F16}) {
                        if (small && x_type != BF16 && turn % 2) continue;
                        check_linear(levels, e, x_type, small, turn % 2, false);
                    }
                    if (k == 200 || k == 13)
                        for (int x_type : {F32, BF16, F16}) {
                            Example other = make(codes, n, k, group, zero, F32, false);
                            check_linear(levels, other, x_type, true, turn % 2, true);
                        }
                }
    check_all_int8(levels, small);
    for (int codes : {INT8, E4M3, E5M2}) {  // each of the 256 codes, NaN and infinities among them
        Example e = make(codes, 64, 333, -1, false, F32, true);
        for (const Level* level : levels)
            for (int out_type : {F32, BF16, F16}) check_dequantize(*level, e, out_type, nullptr, 64);
    }
    for (const Level* level : levels)
        for (int x_type : {F32, BF16, F16})
            for (int codes : {INT8, TABLE4})
                for (int64_t m : {1, 7, 60, 1300})  // the last one: more rows of an expert than are copied at a time
                    for (bool sorted : {false, true}) {
                        if (small && m > 100 && (x_type != BF16 || codes == INT8)) continue;
                        check_experts(*level, codes, m > 100 ? 2 : 5, 45, 200, m, x_type, codes == TABLE4, sorted);
                        check_experts(*level, codes, 1, 13, 70, m, x_type, codes == TABLE4, sorted);
                    }
    for (int64_t k : {0, 5})  // nothing to do
        for (int64_t m : {0, 3, 12})
            for (int64_t n : {0, 5})
                for (int codes : {INT8, TABLE4})
                    for (int x_type : {F32, BF16}) {
                        Example e = make(codes, n, k, -1, false, F32, false);
                        Guarded x(m * k * size_of(x_type)), out(m * n * size_of(x_type));
                        for (int64_t i = 0; i < m * k; i++) write(x.get(), i, x_type, 0);
                        for (const Level* level : levels) {
                            level->linear({e.w, x.get(), nullptr, out.get(), m, x_type, 2});
                            checks++;
                            for (int64_t i = 0; i < m * n; i++)
                                if (read(out.get(), i, x_type) != 0) {
                                    fail("%s linear %s m=%lld: an empty sum is not 0", level->name, e.name.c_str(),
                                         static_cast<long long>(m));
                                    break;
                                }
                        }
                    }
    check_extremes(levels);
    check_int8_rows(levels, small);
    check_aqlm(levels, small);
    std::printf("%ld calls, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
