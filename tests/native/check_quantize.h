// The quantizer: scale and zero of the whole range to the bit, codes next to the values for any scale and zero, and
// fits that end no worse than the range. Included by test_kernels.cpp inside its namespace.

struct QuantizeCase {
    int codes;
    bool lookup;  // nf4 and fp4: codes of 4 bits through the tables of csrc/grid.h
    int fit;
    bool zero;
    int in_type;
    int64_t n, k, stride, group;
    int scale_type;
};

// 16 numbers, close together in the middle as those of nf4, and for each of the 65536 cells of values its code.
struct Lookup {
    float numbers[16], cells_per_unit = 65535 / 2.0f;
    std::vector<int> code = std::vector<int>(65536);
    Guarded table = Guarded(129 * sizeof(float));
    Lookup() {
        for (int i = 0; i < 16; i++) numbers[i] = static_cast<float>((i - 7.5) / 7.5 * std::fabs(i - 7.5) / 7.5);
        for (int cell = 0; cell < 65536; cell++) {
            const double u = -1 + cell / 32767.5;
            for (int i = 1; i < 16; i++)
                if (std::fabs(u - numbers[i]) < std::fabs(u - numbers[code[cell]])) code[cell] = i;
        }
        float* t = table.get<float>();
        for (int stretch = 0; stretch < 16; stretch++) {
            t[stretch] = t[16 + stretch] = std::numeric_limits<float>::infinity();
            int found = 0;
            for (int cell = stretch * 4096; cell < (stretch + 1) * 4096; cell++) {
                if (cell % 4096 && code[cell] == code[cell - 1]) continue;
                if (cell % 4096) t[16 * found++ + stretch] = static_cast<float>(cell);
                for (int i = found; i < 3; i++) t[32 + 16 * i + stretch] = numbers[code[cell]], t[80 + 16 * i + stretch] = static_cast<float>(code[cell]);
            }
        }
        t[128] = cells_per_unit;
    }
    int of(float u) const {
        return code[static_cast<int>(std::nearbyint((std::min(std::max(u, -1.0f), 1.0f) + 1.0f) * cells_per_unit))];
    }
};

float lowest_of(const QuantizeCase& c) {
    if (c.lookup) return -1;
    return c.codes == INT8 ? (c.zero ? -128 : -127) : c.codes == E4M3 ? -448 : c.codes == E5M2 ? -57344 : c.codes == TABLE4 ? -8 : -2;
}
float highest_of(const QuantizeCase& c) {
    if (c.lookup) return 1;
    return c.codes == INT8 ? 127 : c.codes == E4M3 ? 448 : c.codes == E5M2 ? 57344 : c.codes == TABLE4 ? 7 : 1;
}

// The number of the grid next to u.
double nearest(const QuantizeCase& c, const Lookup& lookup, float u) {
    if (c.lookup) return lookup.numbers[lookup.of(u)];
    const float cut = std::min(std::max(u, lowest_of(c)), highest_of(c));
    if (c.codes == E4M3) return rounded(cut, 3, -6, 448);
    if (c.codes == E5M2) return rounded(cut, 2, -14, 57344);
    return std::nearbyint(cut);
}

// quanto_hf/fit/ranges.py, in float32.
struct ScaleAndZero {
    float scale, zero;
};
ScaleAndZero whole_range(const QuantizeCase& c, float low, float high) {
    const float lowest = lowest_of(c), highest = highest_of(c);
    const auto stored = [&](float v) { return static_cast<float>(round_to(v, c.scale_type)); };
    const auto stored_scale = [&](float v) { return stored(v) == 0 ? 1.0f : stored(v); };
    if (c.zero) {
        if (low == high) return {stored_scale(std::fabs(low)), low < 0 ? 1.0f : 0.0f};
        const float scale = stored_scale(high / highest - low / highest);
        return {scale, stored(highest / 2 - (high / 2 + low / 2) / scale)};
    }
    if (-lowest > highest) return {stored_scale(-low >= high ? low / lowest : high / lowest), 0};
    return {stored_scale(std::max(-low, high) * static_cast<float>(1.0 / static_cast<double>(highest))), 0};
}

bool check_quantize(const std::vector<const Level*>& levels, const QuantizeCase& c) {
    static const Lookup lookup;
    const int64_t group = c.group ? c.group : c.k, groups = (c.k + group - 1) / group;
    const Guarded in(((c.n - 1) * c.stride + c.k) * size_of(c.in_type));
    for (int64_t i = 0; i < c.n; i++) {  // ordinary, one-sided, small, constant and empty rows
        const double constant = uniform(-1, 1);
        for (int64_t j = 0; j < c.k; j++) {
            const double v = i % 8 == 5 ? 0 : i % 8 == 3 ? constant : i % 8 == 1 ? uniform(0.5, 2) : i % 8 == 6 ? -uniform(0, 1) : uniform(-1, 1);
            write(in.get(), i * c.stride + j, c.in_type, i % 8 == 2 ? v * 0x1p-10 : v);
        }
    }
    std::vector<double> wanted_numbers = {lowest_of(c), highest_of(c)};
    if (c.fit == MSE) wanted_numbers.insert(wanted_numbers.end(), {0, 3, 0.8, 1});
    if (c.fit == HQQ) wanted_numbers.insert(wanted_numbers.end(), {0.7, 10, 1.01, 20});
    const Guarded numbers(wanted_numbers.size() * sizeof(double));
    std::memcpy(numbers.get(), wanted_numbers.data(), numbers.size());
    const char* const fits[] = {"range", "mse", "hqq"};
    double ends = 0, starts = 0;  // the errors of the fit and of the range
    for (const Level* level : levels) {
        if (!level->quantize) continue;
        Guarded first[3];
        for (int threads : {1, 2, 3, 8}) {
            Guarded out[] = {Guarded(c.n * row_bytes(c.codes, c.k)), Guarded(c.n * groups * size_of(c.scale_type)),
                             Guarded(c.zero ? c.n * groups * size_of(c.scale_type) : 0)};
            Quantize q = {in.get(), out[0].get<uint8_t>(), out[1].get(), c.zero ? out[2].get() : nullptr,
                          c.lookup ? lookup.table.get<float>() : nullptr, numbers.get<double>(),
                          static_cast<int64_t>(wanted_numbers.size()), c.n, c.k, c.stride, c.group, c.in_type, c.scale_type,
                          c.codes, c.fit, threads};
            const auto complain = [&](const char* what, int64_t i, int64_t j, double got, double wanted) {
                return fail("%s quantize %s%s %s n=%lld k=%lld group=%lld zero=%d of %s, scale=%s threads=%d: %s [%lld, %lld] %.9g, wanted %.9g",
                            level->name, CODE_NAMES[c.codes], c.lookup ? " lookup" : "", fits[c.fit], static_cast<long long>(c.n),
                            static_cast<long long>(c.k), static_cast<long long>(c.group), c.zero, FLOAT_NAMES[c.in_type],
                            FLOAT_NAMES[c.scale_type], threads, what, static_cast<long long>(i), static_cast<long long>(j), got, wanted);
            };
            checks++;
            if (!level->quantize(q)) return complain("is not finite", 0, 0, 0, 0);
            for (const Guarded& g : out)
                if (!g.intact()) return complain("writes in front of a result", 0, 0, 0, 0);
            if (threads > 1) {
                for (int i = 0; i < 3; i++)
                    if (!same_bits(out[i], first[i])) return complain("differs from one thread", i, 0, 0, 0);
                continue;
            }
            Example e;
            e.w = {out[0].get<uint8_t>(), out[1].get(), q.zero, nullptr, c.n, c.k, group, groups, c.codes, c.scale_type};
            for (int64_t i = 0; i < c.n; i++)
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t from = g * group, to = std::min(from + group, c.k);
                    float low = std::numeric_limits<float>::infinity(), high = -low;
                    for (int64_t j = from; j < to; j++) {
                        const float v = static_cast<float>(read(in.get(), i * c.stride + j, c.in_type));
                        low = std::min(low, v), high = std::max(high, v);
                    }
                    const ScaleAndZero range = whole_range(c, low, high);
                    const ScaleAndZero found = {static_cast<float>(read(q.scale, i * groups + g, c.scale_type)),
                                                c.zero ? static_cast<float>(read(q.zero, i * groups + g, c.scale_type)) : 0.0f};
                    if (c.fit != MSE && found.scale != range.scale) return complain("scale", i, g, found.scale, range.scale);
                    if (c.fit == RANGE && found.zero != range.zero) return complain("zero", i, g, found.zero, range.zero);
                    double end = 0, start = 0;
                    for (int64_t j = from; j < to; j++) {
                        const float v = static_cast<float>(read(in.get(), i * c.stride + j, c.in_type));
                        const float u = c.zero ? v / found.scale + found.zero : v / found.scale;
                        const int code = read_code(e.w, i, j);
                        const double number = c.lookup ? lookup.numbers[code] : c.codes == TABLE4 || c.codes == TABLE2 ? code + lowest_of(c) : code_value(e, code);
                        if (number != nearest(c, lookup, u)) return complain("code", i, j, number, nearest(c, lookup, u));
                        const float whole = c.zero ? v / range.scale + range.zero : v / range.scale;
                        const double a = std::fabs((u - number) * found.scale), b = std::fabs((whole - nearest(c, lookup, whole)) * range.scale);
                        end += c.fit == MSE ? a * a : a, start += c.fit == MSE ? b * b : b;
                    }
                    if (c.fit != RANGE && !(end <= start * (1 + 1e-4) + 1e-12)) return complain("error", i, g, end, start);
                    ends += end, starts += start;
                }
            for (int i = 0; i < 3; i++) first[i] = std::move(out[i]);
        }
        // one number that is none: found, whoever meets it
        for (double bad : {std::nan(""), -std::numeric_limits<double>::infinity()}) {
            const int64_t at = (c.n - 1) * c.stride + generator() % c.k;
            const double before = read(in.get(), at, c.in_type);
            write(in.get(), at, c.in_type, bad);
            Guarded packed(first[0].size()), scale(first[1].size()), zero(first[2].size());
            checks++;
            if (level->quantize({in.get(), packed.get<uint8_t>(), scale.get(), c.zero ? zero.get() : nullptr,
                                 c.lookup ? lookup.table.get<float>() : nullptr, numbers.get<double>(),
                                 static_cast<int64_t>(wanted_numbers.size()), c.n, c.k, c.stride, c.group, c.in_type, c.scale_type, c.codes, c.fit, 2}))
                return fail("%s quantize: a value that is not finite is not reported", level->name);
            write(in.get(), at, c.in_type, before);
        }
    }
    // fewer are met by any range
    if (c.fit != RANGE && bits_of(c.codes) < 8 && c.n * c.k > 1000 && !(ends < starts))
        return fail("quantize %s %s: the search finds nothing, %.9g of %.9g", CODE_NAMES[c.codes], fits[c.fit], ends, starts);
    return true;
}

void check_all_quantize(const std::vector<const Level*>& levels) {
    struct Kind {
        int codes;
        bool lookup, zero;
    };
    const Kind kinds[] = {{INT8, false, false}, {E4M3, false, false}, {E5M2, false, false}, {TABLE4, false, false}, {TABLE4, false, true},
                          {TABLE2, false, false}, {TABLE2, false, true}, {TABLE4, true, false}, {INT8, false, true}};
    for (const Kind& kind : kinds)
        for (int fit : {RANGE, MSE, HQQ}) {
            if (fit == HQQ && !kind.zero) continue;
            for (int in_type : {F32, BF16, F16})
                for (int64_t n : {1, 37})
                    for (int64_t k : {1, 77, 560}) {
                        const int64_t group = any_of<int64_t>({0, 16, 64, 256});
                        check_quantize(levels, {kind.codes, kind.lookup, fit, kind.zero, in_type, n, k, k + any_of<int64_t>({0, 5}),
                                                group, any_of({F32, BF16})});
                    }
        }
}
