// The loops that make additive codebooks: equal to the last bit to the same written plainly, at every level, for any
// number of threads. Included by test_kernels.cpp inside its namespace.

struct Books {
    Guarded memory;
    Codebooks b;
    const float* vector(int64_t k, int64_t c) const { return b.values + (k * b.size + c) * b.width; }
};

Guarded random_floats(int64_t count, double size) {
    Guarded g(count * sizeof(float));
    for (int64_t i = 0; i < count; i++) g.get<float>()[i] = static_cast<float>(uniform(-size, size));
    return g;
}
Guarded copy_of(const Guarded& from) {
    Guarded g(from.size());
    std::memcpy(g.get(), from.get(), from.size());
    return g;
}
Books make_books(int64_t count, int64_t size, int64_t width) {
    Books books = {random_floats(count * size * width, 1), {}};
    if (size > 2) {  // two equal vectors: the first of them is taken
        float* v = books.memory.get<float>();
        std::memcpy(v + (size - 1) * width, v + width, width * sizeof(float));
    }
    books.b = {books.memory.get<float>(), count, size, width};
    return books;
}
Guarded random_codes(int64_t groups, const Codebooks& b) {
    Guarded g(groups * b.count * sizeof(int32_t));
    for (int64_t i = 0; i < groups * b.count; i++) g.get<int32_t>()[i] = static_cast<int32_t>(generator() % b.size);
    return g;
}

// What the vectors of `codes` leave of a target, squared, in float32 and in order.
float square_of_rest(const Codebooks& b, const float* target, const int32_t* codes) {
    float sum = 0;
    for (int64_t i = 0; i < b.width; i++) {
        float r = target[i];
        for (int64_t k = 0; k < b.count; k++) r -= b.values[(k * b.size + codes[k]) * b.width + i];
        sum += r * r;
    }
    return sum;
}

// Beam search for one group: all sums of a kept set and a vector are compared, the best are kept, the first of equal ones.
void plain_search(const Codebooks& b, const float* target, int beam, int32_t* codes) {
    struct Set {
        float distance;
        std::vector<float> rest;
        std::vector<int32_t> codes;
    };
    std::vector<Set> kept = {{0, std::vector<float>(target, target + b.width), {}}};
    for (int64_t k = 0; k < b.count; k++) {
        std::vector<Set> found;
        const size_t limit = k + 1 < b.count ? beam : 1;
        for (int64_t block = 0; block < b.size; block += 1024)
            for (const Set& set : kept) {
                float square = 0;
                for (float r : set.rest) square += r * r;
                for (int64_t c = block; c < std::min<int64_t>(block + 1024, b.size); c++) {
                    const float* v = b.values + (k * b.size + c) * b.width;
                    float distance = 0;
                    for (int64_t i = 0; i < b.width; i++) distance += v[i] * v[i];
                    distance *= 0.5f;
                    for (int64_t i = 0; i < b.width; i++) distance = std::fmaf(-set.rest[i], v[i], distance);
                    distance += 0.5f * square;
                    if (std::isnan(distance) || (found.size() == limit && !(distance < found.back().distance))) continue;
                    Set next = {distance, set.rest, set.codes};
                    for (int64_t i = 0; i < b.width; i++) next.rest[i] -= v[i];
                    next.codes.push_back(static_cast<int32_t>(c));
                    const auto behind = [](float d, const Set& s) { return d < s.distance; };
                    found.insert(std::upper_bound(found.begin(), found.end(), distance, behind), std::move(next));
                    if (found.size() > limit) found.pop_back();
                }
            }
        if (found.empty()) return;  // not numbers: the codes stay
        kept = std::move(found);
    }
    if (square_of_rest(b, target, kept[0].codes.data()) < square_of_rest(b, target, codes))
        std::copy(kept[0].codes.begin(), kept[0].codes.end(), codes);
}

bool check_search(const std::vector<const Level*>& levels, int64_t n, int64_t count, int64_t size, int64_t width, int beam, bool odd) {
    const Books books = make_books(count, size, width);
    const Guarded targets = random_floats(n * width, static_cast<double>(count)), codes = random_codes(n, books.b);
    if (odd) {  // targets that are no numbers, infinite, and exactly met by their codes
        targets.get<float>()[0] = std::nanf("");
        if (n > 1) targets.get<float>()[width] = std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < width && n > 2; i++) {
            targets.get<float>()[2 * width + i] = 0;
            for (int64_t k = 0; k < count; k++)
                targets.get<float>()[2 * width + i] += books.vector(k, codes.get<int32_t>()[2 * count + k])[i];
        }
    }
    const Guarded wanted = copy_of(codes);
    for (int64_t i = 0; i < n; i++)
        plain_search(books.b, targets.get<float>() + i * width, beam, wanted.get<int32_t>() + i * count);
    for (const Level* level : levels)
        for (int threads : {1, 2, 3, 8}) {
            const Guarded found = copy_of(codes);
            note(level->name, "aqlm_search", width == 8 ? "width8" : "other", "search", F32, 0);
            aqlm_fit_of(*level).search({targets.get<float>(), found.get<int32_t>(), books.b, n, beam, threads});
            checks++;
            if (!found.intact()) return fail("%s aqlm_search writes in front of the codes", level->name);
            if (!same_bits(found, wanted))
                return fail("%s aqlm_search n=%lld %lldx%lld of %lld, beam %d, %d threads: not the codes of a plain search",
                            level->name, static_cast<long long>(n), static_cast<long long>(count),
                            static_cast<long long>(size), static_cast<long long>(width), beam, threads);
        }
    return true;
}

// The metric of each column group is any lower triangle here, `to` and `follow` any matrices: what they mean is for
// quanto_hf/fit/aqlm and its tests.
struct SweepCase {
    int64_t rows, columns, out_group, in_group, count, size;
    int beam;
    bool compensates;  // a weight is given
};

void plain_sweep(const AqlmSweep& a) {
    const int64_t in = a.in_group, k = a.columns * in, width = a.books.width;
    std::vector<float> values(a.books.count * a.books.size * width);
    for (int64_t column = 0; column < a.columns; column++) {
        const float *lower = a.lower + column * in * in, *to = a.to + column * in * in;
        for (size_t v = 0; v < values.size(); v += in)
            for (int64_t j = 0; j < in; j++) {
                values[v + j] = 0;
                for (int64_t i = j; i < in; i++) values[v + j] += a.books.values[v + i] * lower[i * in + j];
            }
        const Codebooks metric = {values.data(), a.books.count, a.books.size, width};
        for (int64_t g = 0; g < a.rows; g++) {
            int32_t* codes = a.codes + (g * a.columns + column) * a.books.count;
            const std::vector<int32_t> before(codes, codes + a.books.count);
            std::vector<float> target(width, 0.0f);
            for (int64_t c = 0; c < a.books.count && !a.weight; c++)
                for (int64_t i = 0; i < width; i++) target[i] += values[(c * a.books.size + codes[c]) * width + i];
            for (int64_t o = 0; o < a.out_group; o++)
                for (int64_t i = 0; i < in; i++)
                    for (int64_t j = 0; j < in; j++)
                        target[o * in + j] += a.state[(g * a.out_group + o) * k + column * in + i] * to[i * in + j];
            plain_search(metric, target.data(), a.beam, codes);
            if (!a.weight && std::equal(before.begin(), before.end(), codes)) continue;
            for (int64_t o = 0; o < a.out_group; o++) {
                const int64_t row = (g * a.out_group + o) * k;
                std::vector<float> moved(in);
                for (int64_t i = 0; i < in; i++) {
                    moved[i] = a.weight ? a.weight[row + column * in + i] : 0.0f;
                    for (int64_t c = 0; c < a.books.count; c++) {
                        const float* book = a.books.values + c * a.books.size * width + o * in + i;
                        moved[i] += (a.weight ? 0.0f : book[before[c] * width]) - book[codes[c] * width];
                    }
                }
                for (int64_t j = (column + 1) * in; j < k; j++)
                    for (int64_t i = 0; i < in; i++)
                        a.state[row + j] = std::fmaf(moved[i], a.follow[(column * in + i) * k + j], a.state[row + j]);
            }
        }
    }
}

bool check_sweep(const std::vector<const Level*>& levels, const SweepCase& s) {
    const int64_t k = s.columns * s.in_group, n = s.rows * s.out_group, blocks = s.columns * s.in_group * s.in_group;
    const Books books = make_books(s.count, s.size, s.out_group * s.in_group);
    const Guarded weight = random_floats(n * k, 2), follow = random_floats(k * k, 0.3), lower = random_floats(blocks, 1),
                  to = random_floats(blocks, 1), state = random_floats(n * k, 2),
                  codes = random_codes(s.rows * s.columns, books.b);
    AqlmSweep call = {nullptr, s.compensates ? weight.get<float>() : nullptr, follow.get<float>(), lower.get<float>(), to.get<float>(),
                      nullptr, books.b, s.rows, s.columns, s.out_group, s.in_group, s.beam, 1};
    const Guarded wanted = copy_of(codes), wanted_state = copy_of(state);
    call.codes = wanted.get<int32_t>(), call.state = wanted_state.get<float>();
    plain_sweep(call);
    for (const Level* level : levels)
        for (int threads : {1, 2, 3, 8}) {
            const Guarded found = copy_of(codes), left = copy_of(state);
            call.codes = found.get<int32_t>(), call.state = left.get<float>(), call.threads = threads;
            note(level->name, "aqlm_sweep", books.b.width == 8 ? "width8" : "other", s.compensates ? "weight" : "codes", F32, 0);
            aqlm_fit_of(*level).sweep(call);
            checks++;
            if (!found.intact() || !left.intact()) return fail("%s aqlm_sweep writes in front of codes or state", level->name);
            if (!same_bits(found, wanted) || !same_bits(left, wanted_state))
                return fail("%s aqlm_sweep of %lld x %lld groups of %lld x %lld, %d threads: not the %s of a plain one", level->name,
                            static_cast<long long>(s.rows), static_cast<long long>(s.columns), static_cast<long long>(s.out_group),
                            static_cast<long long>(s.in_group), threads, same_bits(found, wanted) ? "state" : "codes");
        }
    return true;
}

bool check_product(const std::vector<const Level*>& levels, int64_t m, int64_t n, int64_t k, int64_t stride) {
    const Guarded a = random_floats(m * k, 1), b = random_floats(k ? (k - 1) * stride + n : 0, 1), wanted(m * n * sizeof(float));
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t c = 0; c < k; c++) sum = std::fmaf(a.get<float>()[i * k + c], b.get<float>()[c * stride + j], sum);
            wanted.get<float>()[i * n + j] = sum;
        }
    for (const Level* level : levels)
        for (int threads : {1, 2, 3, 8}) {
            const Guarded out(m * n * sizeof(float));
            note(level->name, "product", "f32", "product", F32, 0);
            aqlm_fit_of(*level).product({a.get<float>(), b.get<float>(), out.get<float>(), m, n, k, stride, threads});
            checks++;
            if (!out.intact() || !same_bits(out, wanted))
                return fail("%s product of %lld x %lld x %lld, %d threads: not the sums in order", level->name, static_cast<long long>(m),
                            static_cast<long long>(k), static_cast<long long>(n), threads);
        }
    return true;
}

// No level compiles it.
bool check_code_sums(int64_t n, int64_t per_weight, int64_t count, int64_t size, int64_t width) {
    const Books books = make_books(count, size, width);
    const Guarded values = random_floats(n * width, 1), weights = random_floats(n / per_weight, 2), codes = random_codes(n, books.b);
    std::vector<double> sums(count * size * width), totals(count * size);
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < count; k++) {
            const int64_t at = k * size + codes.get<int32_t>()[i * count + k];
            const double weight = weights.get<float>()[i / per_weight];
            for (int64_t j = 0; j < width; j++) sums[at * width + j] += weight * static_cast<double>(values.get<float>()[i * width + j]);
            totals[at] += weight;
        }
    for (int threads : {1, 2, 3, 8}) {
        const Guarded got(sums.size() * 8), got_totals(totals.size() * 8);
        std::memset(got.get(), 0, got.size()), std::memset(got_totals.get(), 0, got_totals.size());
        note("every", "code_sums", "f32", "sums", F32, 0);
        code_sums({values.get<float>(), weights.get<float>(), codes.get<int32_t>(), got.get<double>(), got_totals.get<double>(), n,
                   per_weight, count, size, width, threads});
        checks++;
        if (!got.intact() || !got_totals.intact() || std::memcmp(got.get(), sums.data(), got.size()) ||
            std::memcmp(got_totals.get(), totals.data(), got_totals.size()))
            return fail("code_sums of %lld groups, %d threads: not the sums in order", static_cast<long long>(n), threads);
    }
    return true;
}

void check_aqlm_fit(const std::vector<const Level*>& levels) {
    // A loop that is new in AqlmFit has no name here, and the compiler says so.
    const auto& [search, sweep, product] = aqlm_fit_of(*levels[0]);
    if (!search || !sweep || !product) fail("a loop of AqlmFit is missing");
    // one group and one vector; more vectors than a beam, than a block of codes; sets that are all kept
    for (bool odd : {false, true}) {
        check_search(levels, 1, 1, 1, 8, 1, odd);
        check_search(levels, 37, 2, 45, 8, 8, odd);
        check_search(levels, 5, 3, 13, 8, 64, odd);
        check_search(levels, 9, 2, 1100, 8, 4, odd);
        check_search(levels, 17, 4, 33, 6, 17, odd);
        check_search(levels, 3, 2, 256, 24, 1, odd);
    }
    for (bool compensates : {false, true}) {
        check_sweep(levels, {1, 1, 1, 8, 1, 3, 1, compensates});
        check_sweep(levels, {70, 5, 1, 8, 2, 33, 4, compensates});
        check_sweep(levels, {5, 7, 2, 4, 2, 16, 8, compensates});
        check_sweep(levels, {34, 3, 3, 5, 3, 9, 2, compensates});
    }
    for (int64_t m : {1, 4, 13, 31})
        for (int64_t n : {1, 16, 33, 70})
            for (int64_t k : {1, 13, 300}) check_product(levels, m, n, k, n + (m % 2 ? 0 : 3));
    check_code_sums(1, 1, 1, 1, 8);
    check_code_sums(60, 5, 2, 13, 8);
    check_code_sums(91, 1, 3, 2, 5);
}
