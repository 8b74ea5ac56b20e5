// Numbers at the edge of float32: a result is NaN, infinite or finite as that of float64, and a scale of any size
// brings an input of the inverse size back. Included by test_kernels.cpp inside its namespace.

struct Extreme {
    const char* name;
    double x[3], scale[4];  // factors of the rows of x, and of the scales of the rows of the weight, in turn
};
const double INFINITE = std::numeric_limits<double>::infinity();
const Extreme EXTREMES[] = {
    {"huge x", {0x1p120, 0x1p120, 0x1p120}, {0x1p-120, 0x1p-120, 0x1p-120, 0x1p-120}},
    {"one row of huge x", {1, 0x1p120, 1}, {0x1p-120, 0x1p-120, 0x1p-120, 0x1p-120}},
    {"tiny x", {0x1p-122, 0x1p-122, 0x1p-122}, {0x1p110, 0x1p110, 0x1p110, 0x1p110}},
    {"subnormal x", {0x1p-130, 1, 0x1p-130}, {1, 1, 0x1p100, 1}},
    {"subnormal scales", {1, 0x1p100, 1}, {0x1p-135, 1, 0x1p-130, 0x1p-140}},
    {"an infinite scale", {1, 1, 1}, {1, INFINITE, 1, 1}},
    {"a scale of minus infinity", {1, 0x1p100, 1}, {1, 1, 1, -INFINITE}},
    {"a scale that is NaN", {1, 1, 1}, {1, 1, std::nan(""), 1}},
    {"infinite x", {1, INFINITE, 1}, {1, 0, 1, 1}},
    {"x that is NaN", {1, 1, std::nan("")}, {1, 0, 1, 1}},
};

// Whether a level gives the results of `e` for the first m rows of x.
bool check_extreme(const Level& level, const Example& e, const char* name, const std::vector<double>& x, int x_type, int64_t m) {
    const int64_t n = e.w.n, k = e.w.k;
    Guarded input(m * k * size_of(x_type)), out(m * n * size_of(x_type));
    for (int64_t i = 0; i < m * k; i++) write(input.get(), i, x_type, x[i]);
    level.linear({e.w, input.get(), nullptr, out.get(), m, x_type, 2});
    checks++;
    // bfloat16 rounds the weight and the result, by 2^-8 of each at most
    const double accuracy = x_type == BF16 ? 0x1p-7 : 6e-8 * (4 + std::sqrt(static_cast<double>(k)));
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            // The bfloat16 products of a processor take what is below the smallest normal number for zero.
            const double tiny = x_type == BF16 ? 0x1p-126 : 0x1p-149;
            double sum = 0, size = 0, lost = 2 * static_cast<double>(k) * tiny;
            for (int64_t c = 0; c < k; c++) {
                const double a = x[i * k + c], b = e.exact[j * k + c], product = std::fabs(a * b);
                sum += a * b, size += product;
                if (std::fabs(a) < tiny || std::fabs(b) < tiny) lost += product;
            }
            const double got = read(out.get(), i * n + j, x_type);
            const bool good = std::isnan(sum)   ? std::isnan(got)
                              : std::isinf(sum) ? got == sum
                                                : std::isfinite(got) && std::fabs(got - sum) <= accuracy * size + lost;
            if (!good)
                return fail("%s linear %s x=%s m=%lld, %s: [%lld, %lld] %.9g, wanted %.9g", level.name, e.name.c_str(),
                            FLOAT_NAMES[x_type], static_cast<long long>(m), name, static_cast<long long>(i),
                            static_cast<long long>(j), got, sum);
        }
    return true;
}

void check_extremes(const std::vector<const Level*>& levels) {
    for (int codes : {INT8, E4M3, E5M2, TABLE4})
        for (int64_t group : {-1, 32})
            for (int64_t k : {1, 13, 200})
                for (const Extreme& extreme : EXTREMES) {
                    Example e = make(codes, 13, k, group, false, F32, false);
                    for (int64_t i = 0; i < e.w.n * e.w.groups; i++) {
                        const double scale = read(e.scale.get(), i, F32) * extreme.scale[i / e.w.groups % 4];
                        write(e.scale.get(), i, F32, scale);
                    }
                    compute_exact(e);
                    for (int x_type : {F32, BF16}) {
                        std::vector<double> x(33 * k);
                        for (int64_t i = 0; i < 33 * k; i++)
                            x[i] = round_to(uniform(0.1, 1) * (generator() & 1 ? 1 : -1) * extreme.x[i / k % 3], x_type);
                        for (const Level* level : levels)
                            for (int64_t m : {1, 2, 7, 9, 33}) check_extreme(*level, e, extreme.name, x, x_type, m);
                    }
                }
}
