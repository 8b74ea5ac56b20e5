// Dequantizing to the bit, and products within the rounding of their sums. Included by test_kernels.cpp inside its
// namespace.

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

// One thread first, then others: all, or one other number that depends on m.
std::vector<int> thread_counts(int64_t m, bool few) {
    if (!few) return {1, 2, 3, 8};
    return {1, m % 3 == 0 ? 8 : m % 3 == 1 ? 2 : 3};
}

// Every product of `rows` rows of x with the weight in float64, and the sum of the magnitudes.
struct Reference {
    std::vector<double> sum, magnitude;
};
// The weight is float32 but for the first columns, which are rounded to bfloat16.
Reference multiply(const Example& e, const std::vector<double>& x, int64_t rows, int64_t rounded_columns) {
    const int64_t n = e.w.n, k = e.w.k;
    Reference r;
    r.sum.assign(rows * n, 0), r.magnitude.assign(rows * n, 0);
    std::vector<double> column(n);
    for (int64_t j = 0; j < k; j++) {
        for (int64_t i = 0; i < n; i++) {
            const double v = e.exact[i * k + j];
            column[i] = j < rounded_columns ? round_to(v, BF16) : v;
        }
        for (int64_t m = 0; m < rows; m++) {
            const double v = x[m * k + j];
            double *sum = &r.sum[m * n], *magnitude = &r.magnitude[m * n];
            for (int64_t i = 0; i < n; i++) sum[i] += v * column[i], magnitude[i] += std::fabs(v * column[i]);
        }
    }
    return r;
}

// For each number of rows in `m_values`. Poisoned: row 1 of x and row 1 of the scales are NaN, and must not reach any
// other result.
bool check_linear(const std::vector<const Level*>& levels, Example& e, int x_type, const std::vector<int64_t>& m_values,
                  bool few_threads, bool with_bias, bool poisoned) {
    const int64_t n = e.w.n, k = e.w.k, most = *std::max_element(m_values.begin(), m_values.end());
    std::vector<double> x(most * k);
    for (double& v : x) v = round_to(uniform(-1, 1), x_type);
    std::vector<Reference> references;
    references.push_back(multiply(e, x, most, 0));
    if (x_type == BF16) {
        // a level may round weights to bfloat16, as the torch reference does: all, or those in whole blocks
        const int64_t block = 64 * 8 / bits_of(e.w.codes);
        references.push_back(multiply(e, x, most, k));
        if (k % block && k > block && block > 64) references.push_back(multiply(e, x, most, k / block * block));
    }
    Guarded bias(n * size_of(x_type));
    for (int64_t i = 0; i < n; i++) write(bias.get(), i, x_type, uniform(-1, 1));
    if (poisoned) {
        const double nan = std::nan("");
        if (n > 1)
            for (int64_t g = 0; g < e.w.groups; g++) write(e.scale.get(), e.w.groups + g, e.w.scale_type, nan);
        for (int64_t j = 0; j < k && most > 1; j++) x[k + j] = nan;
    }
    // sums in float32, in any order
    const double accuracy = 6e-8 * (4 + std::sqrt(static_cast<double>(k)));
    for (int64_t m : m_values) {
        Guarded input(m * k * size_of(x_type));
        for (int64_t i = 0; i < m * k; i++) write(input.get(), i, x_type, x[i]);
        for (const Level* level : levels) {
            Guarded first;
            for (int threads : thread_counts(m, few_threads)) {
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
