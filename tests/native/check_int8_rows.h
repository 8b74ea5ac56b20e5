// int8 weights times int8 activations with a scale per row: exact but for three roundings, whatever the sizes of the
// rows of x. Included by test_kernels.cpp inside its namespace.

// A row of x as integers of -127 to 127, and their step.
struct Rounded {
    std::vector<int> numbers;
    float step;
};
Rounded round_row(const double* x, int64_t k) {
    Rounded r = {std::vector<int>(k), 1};
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < k; i++) {
        finite = finite && std::isfinite(x[i]);
        most = std::max(most, static_cast<float>(std::fabs(x[i])));
    }
    if (!finite) r.step = static_cast<float>(std::nan(""));
    else if (most != 0) r.step = most / 127;
    for (int64_t i = 0; i < k && finite; i++) {
        const float v = static_cast<float>(x[i]) / r.step;
        r.numbers[i] = static_cast<int>(std::nearbyint(std::min(std::max(v, -127.0f), 127.0f)));
    }
    return r;
}

bool check_rows_call(const Level& level, const Example& e, const std::vector<double>& x, const std::vector<Rounded>& rows,
                     const Guarded* bias, int x_type, int64_t m, bool small) {
    const int64_t n = e.w.n, k = e.w.k;
    Guarded input(m * k * size_of(x_type)), first;
    for (int64_t i = 0; i < m * k; i++) write(input.get(), i, x_type, x[i]);
    for (int threads : {1, 2, 3, 8}) {
        if (small && threads > 1 && threads != 3) continue;
        Guarded out(m * n * size_of(x_type));
        level.linear_int8({e.w, input.get(), bias ? bias->get() : nullptr, out.get(), m, x_type, threads});
        checks++;
        const auto complain = [&](const char* what, int64_t i, int64_t j, double got, double wanted) {
            return fail("%s linear_int8 %s x=%s m=%lld bias=%d threads=%d: %s [%lld, %lld] %.9g, wanted %.9g", level.name,
                        e.name.c_str(), FLOAT_NAMES[x_type], static_cast<long long>(m), bias != nullptr, threads, what,
                        static_cast<long long>(i), static_cast<long long>(j), got, wanted);
        };
        if (!out.intact()) return complain("writes in front of out", 0, 0, 0, 0);
        if (threads > 1) {
            if (!same_bits(out, first)) return complain("differs from one thread", 0, 0, 0, 0);
            continue;
        }
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                int32_t total = 0;
                for (int64_t c = 0; c < k; c++) total += static_cast<int8_t>(e.w.packed[j * k + c]) * rows[i].numbers[c];
                double wanted = static_cast<double>(rows[i].step) * read(e.w.scale, j, e.w.scale_type) * total, b = 0;
                if (bias) b = read(bias->get(), j, x_type);
                // the total, each scale and the bias make a rounding; the last bit of a float32 is 2^-149 at least
                const double slack = 0x1p-22 * (std::fabs(wanted) + std::fabs(b)) + 0x1p-147;
                const double got = read(out.get(), i * n + j, x_type);
                wanted += b;
                const double low = round_to(wanted - slack, x_type), high = round_to(wanted + slack, x_type);
                if (std::isnan(wanted) ? !std::isnan(got) : !(got >= low && got <= high))
                    return complain("is", i, j, got, wanted);
            }
        first = std::move(out);
    }
    return true;
}

// x: `ordinary`, or with rows of zeros, huge and subnormal numbers, NaN and infinity among them.
void check_rows_example(const std::vector<const Level*>& levels, const Example& e, int x_type, bool ordinary,
                        const std::vector<int64_t>& m_values, bool small) {
    const int64_t most = *std::max_element(m_values.begin(), m_values.end()), k = e.w.k;
    const double sizes[] = {1, 0, x_type == F16 ? 60000 : 0x1p100, x_type == F16 ? 0x1p-20 : 0x1p-130, 0x1p-6};
    std::vector<double> x(most * k);
    std::vector<Rounded> rows;
    for (int64_t i = 0; i < most; i++) {
        for (int64_t c = 0; c < k; c++)
            x[i * k + c] = round_to(uniform(-1, 1) * (ordinary ? 1 : sizes[i % 5]), x_type);
        if (!ordinary && i % 7 == 3) x[i * k + k / 2] = std::nan("");
        if (!ordinary && i % 7 == 5) x[i * k + k - 1] = -std::numeric_limits<double>::infinity();
        rows.push_back(round_row(&x[i * k], k));
    }
    Guarded bias(e.w.n * size_of(x_type));
    for (int64_t i = 0; i < e.w.n; i++) write(bias.get(), i, x_type, uniform(-1, 1));
    for (const Level* level : levels)
        for (int64_t m : m_values) check_rows_call(*level, e, x, rows, m % 2 ? &bias : nullptr, x_type, m, small);
}

void check_int8_rows(const std::vector<const Level*>& all, bool small) {
    std::vector<const Level*> levels;
    for (const Level* level : all)
        if (level->linear_int8) levels.push_back(level);
    if (levels.empty()) return;
    const std::vector<int64_t> m_values = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33};
    const int64_t N_VALUES[] = {1, 13, 45, 101};
    int turn = 0;
    for (int64_t k : {1, 13, 16, 64, 200, 513, 1000, 2049})
        for (int x_type : {F32, BF16, F16})
            for (bool ordinary : {true, false}) {
                turn++;
                if (small && k > 1000 && x_type != BF16) continue;
                const int scale_type = turn % 3 == 0 ? F16 : turn % 3 == 1 ? F32 : BF16;
                const Example e = make(INT8, N_VALUES[turn % 4], k, -1, false, scale_type, true);
                check_rows_example(levels, e, x_type, ordinary, m_values, small);
            }
    // more rows of x than are multiplied at a time (512)
    check_rows_example(levels, make(INT8, 101, 70, -1, false, F32, true), BF16, true, {600}, small);
    // the largest sums that there are: 65536 * 127 * -128
    Example e = make(INT8, 3, 65536, -1, false, F32, true);
    std::memset(e.packed.get(), 0x80, e.packed.size());
    std::vector<double> x(9 * e.w.k, 1);
    const std::vector<Rounded> rows(9, round_row(x.data(), e.w.k));
    for (const Level* level : levels)
        for (int64_t m : {1, 9}) check_rows_call(*level, e, x, rows, nullptr, F32, m, small);
}
