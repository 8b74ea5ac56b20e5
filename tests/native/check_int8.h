// Products with x in int8: x is rounded here as it is promised, and multiplied in float64. Included in test_kernels.cpp.

// x in steps of absmax / 127 of each `group` columns, or of `given` where it is not 0; a step of 0 counts as 1.
std::vector<double> round_x(const std::vector<double>& x, int64_t m, int64_t k, int64_t group, float given) {
    std::vector<double> out(m * k);
    for (int64_t i = 0; i < m; i++)
        for (int64_t from = 0; from < k; from += group) {
            const int64_t to = std::min(from + group, k);
            float most = 0;
            for (int64_t j = from; j < to; j++) most = std::max(most, std::fabs(static_cast<float>(x[i * k + j])));
            const float step = given != 0.0f ? given : most / 127.0f == 0.0f ? 1.0f : most / 127.0f;
            for (int64_t j = from; j < to; j++) {
                const float number = std::nearbyint(static_cast<float>(x[i * k + j]) / step);
                out[i * k + j] = static_cast<double>(std::max(-127.0f, std::min(127.0f, number))) * step;
            }
        }
    return out;
}

// What the terms of a product are without the cancellation of number - zero: sums of |x| * (|number| + |zero|) * |scale|,
// and a kernel may count both of them from the middle of the codes.
std::vector<double> wide_magnitudes(const Example& e, const std::vector<double>& x, int64_t rows) {
    const Weight& w = e.w;
    std::vector<double> out(rows * w.n);
    for (int64_t i = 0; i < w.n; i++)
        for (int64_t j = 0; j < w.k; j++) {
            const int64_t g = i * w.groups + j / w.group;
            const double middle = 1 << (bits_of(w.codes) - 1), zero = w.zero ? std::fabs(read(w.zero, g, w.scale_type)) + 2 * middle : 0;
            const double size = (std::fabs(code_value(e, read_code(w, i, j))) + zero) * std::fabs(read(w.scale, g, w.scale_type));
            for (int64_t m = 0; m < rows; m++) out[m * w.n + i] += std::fabs(x[m * w.k + j]) * size;
        }
    return out;
}

// int4 and int2: symmetric from -8 or -2 on, with a zero from 0 on.
void space_evenly(Example& e) {
    if (e.w.codes != TABLE4 && e.w.codes != TABLE2) return;
    const int first = e.w.zero ? 0 : e.w.codes == TABLE4 ? -8 : -2;
    for (int i = 0; i < 16; i++) e.table.get<float>()[i] = static_cast<float>(i + first);
    compute_exact(e);
}

// Row 1 of x: NaN if `poisoned`, else zeros. The other rows have sizes from 1e-3 to 1e3, and an outlier each.
// `given`: the scale of all of x, or 0.
bool check_int8(const std::vector<const Level*>& levels, const Example& e, int x_type, const std::vector<int64_t>& m_values,
                bool few_threads, bool with_bias, bool poisoned, float given) {
    const int64_t n = e.w.n, k = e.w.k, most = *std::max_element(m_values.begin(), m_values.end());
    std::vector<double> x(most * k);
    for (int64_t i = 0; i < most; i++) {
        const double size = std::pow(10.0, static_cast<double>(i % 7) - 3);
        for (int64_t j = 0; j < k; j++) x[i * k + j] = i == 1 ? 0.0 : round_to(uniform(-1, 1) * size, x_type);
        if (i > 1) x[i * k + generator() % k] = round_to(20 * size, x_type);
    }
    const std::vector<double> rounded_x = round_x(x, most, k, e.w.codes == INT8 ? k : 32, given);
    const Reference r = multiply(e, rounded_x, most, 0);
    const std::vector<double> wide = wide_magnitudes(e, rounded_x, most);
    if (poisoned && most > 1) x[k + generator() % k] = std::nan("");
    Guarded bias(n * size_of(x_type));
    for (int64_t i = 0; i < n; i++) write(bias.get(), i, x_type, uniform(-1, 1));
    const double accuracy = 6e-8 * (8 + std::sqrt(static_cast<double>(k)));
    for (int64_t m : m_values) {
        Guarded input(m * k * size_of(x_type));
        for (int64_t i = 0; i < m * k; i++) write(input.get(), i, x_type, x[i]);
        for (const Level* level : levels) {
            const auto kernel = e.w.codes == INT8 ? level->linear_int8 : level->linear_int8_groups;
            if (!kernel) continue;
            Guarded first;
            for (int threads : thread_counts(m, few_threads)) {
                Guarded out(m * n * size_of(x_type));
                kernel({e.w, input.get(), with_bias ? bias.get() : nullptr, out.get(), m, x_type, threads, given != 0.0f ? &given : nullptr});
                checks++;
                const auto complain = [&](const char* what, int64_t i, int64_t j, double got, double wanted) {
                    return fail("%s int8 x, %s x=%s m=%lld bias=%d threads=%d: %s [%lld, %lld] %.9g, wanted %.9g", level->name,
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
                        const double got = read(out.get(), i * n + j, x_type), b = with_bias ? read(bias.get(), j, x_type) : 0;
                        if (poisoned && i == 1) {
                            if (!std::isnan(got)) return complain("NaN is lost", i, j, got, std::nan(""));
                            continue;
                        }
                        const double wanted = r.sum[i * n + j] + b;
                        const double slack = accuracy * (wide[i * n + j] + std::fabs(b)) + 1e-30;
                        const double low = round_to(wanted - slack, x_type), high = round_to(wanted + slack, x_type);
                        if (!(got >= low && got <= high)) return complain(given != 0.0f ? "with a given scale is" : "is", i, j, got, wanted);
                    }
                first = std::move(out);
            }
        }
    }
    return true;
}

void check_all_int8(const std::vector<const Level*>& levels, bool small) {
    int turn = 0;
    const std::vector<int64_t> rows_of_x = small ? std::vector<int64_t>{1, 2, 7, 9, 33} : GRID_ROWS;
    for (int codes : {INT8, TABLE4, TABLE2})
        for (int64_t group : {-1, 16, 32, 48, 64, 96, 128, 256})
            for (bool zero : {false, true})
                for (int64_t k : {1, 13, 33, 200, 256, 513, 640, 1000}) {
                    if (codes == INT8 && (group > 0 || zero)) continue;
                    turn++;
                    if (small && turn % 3 && codes != INT8) continue;
                    const int64_t rows[] = {1, 13, 45, 101, 200};
                    Example e = make(codes, rows[turn % (small ? 4 : 5)], k, group, zero, turn % 2 ? BF16 : F32, false);
                    space_evenly(e);
                    for (int x_type : {F32, BF16, F16}) {
                        if (small && x_type != BF16 && turn % 2) continue;
                        check_int8(levels, e, x_type, rows_of_x, small, turn % 2, turn % 5 == 0, 0.0f);
                        // of rows with sizes from 1e-3 to 1e3: some are 0, some whole, some cut
                        if (turn % 4 == 0 || codes == INT8) check_int8(levels, e, x_type, rows_of_x, small, turn % 2, turn % 5 == 0, 0.05f);
                    }
                }
}
