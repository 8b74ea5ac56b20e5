// Weights of additive codes: dequantized to the bit, and products within the rounding of their sums. Included by
// test_kernels.cpp inside its namespace.

struct AqlmExample {
    std::string name;
    Guarded codes, books, scales;
    Aqlm q;
    int64_t n, k;
    std::vector<float> dense;  // n rows of k, each sum rounded as the kernels do
    Weight weight() const {
        Weight w{};
        w.n = n, w.k = k, w.aqlm = &q;
        return w;
    }
};

AqlmExample make_aqlm(int64_t books, int bits, int64_t out_group, int64_t in_group, int64_t lines, int64_t groups, int type) {
    AqlmExample e;
    const int code_bytes = bits <= 8 ? 1 : bits <= 16 ? 2 : 4;
    const int64_t entries = int64_t{1} << bits, values = out_group * in_group;
    e.codes = Guarded(lines * groups * books * code_bytes);
    e.books = Guarded(books * entries * values * size_of(type));
    e.scales = Guarded(lines * size_of(type));
    for (size_t i = 0; i < e.codes.size(); i++) e.codes.get<uint8_t>()[i] = static_cast<uint8_t>(generator());
    for (int64_t i = 0; i < books * entries * values; i++) write(e.books.get(), i, type, uniform(-1, 1));
    for (int64_t i = 0; i < lines; i++) write(e.scales.get(), i, type, uniform(0.5, 2));
    e.q = {e.codes.get(), e.books.get(), e.scales.get(), books, out_group, in_group, bits, code_bytes, type, type};
    e.n = lines * out_group, e.k = groups * in_group;
    e.name = std::to_string(books) + "x" + std::to_string(bits) + " " + std::to_string(out_group) + "x" +
             std::to_string(in_group) + " n=" + std::to_string(e.n) + " k=" + std::to_string(e.k) + " " + FLOAT_NAMES[type];
    e.dense.resize(e.n * e.k);
    for (int64_t row = 0; row < e.n; row++)
        for (int64_t c = 0; c < e.k; c++) {
            float total = 0;
            for (int64_t b = 0; b < books; b++) {
                uint32_t code = 0;
                std::memcpy(&code, e.codes.get<uint8_t>() + ((row / out_group * groups + c / in_group) * books + b) * code_bytes, code_bytes);
                const int64_t at = (b * entries + (code & (entries - 1))) * values + row % out_group * in_group + c % in_group;
                const float entry = static_cast<float>(read(e.books.get(), at, type));
                total = b ? total + entry : entry;
            }
            e.dense[row * e.k + c] = total * static_cast<float>(read(e.scales.get(), row / out_group, type));
        }
    return e;
}

bool check_aqlm_dequantize(const Level& level, const AqlmExample& e, int out_type) {
    Guarded out(e.n * e.k * size_of(out_type));
    level.aqlm_dequantize(e.weight(), out_type, out.get(), 2);
    checks++;
    if (!out.intact()) return fail("%s aqlm_dequantize %s writes in front of out", level.name, e.name.c_str());
    for (int64_t i = 0; i < e.n * e.k; i++)
        if (read(out.get(), i, out_type) != round_to(e.dense[i], out_type))
            return fail("%s aqlm_dequantize %s to %s: [%lld] is %.9g, wanted %.9g", level.name, e.name.c_str(),
                        FLOAT_NAMES[out_type], static_cast<long long>(i), read(out.get(), i, out_type),
                        round_to(e.dense[i], out_type));
    return true;
}

bool check_aqlm_linear(const Level& level, const AqlmExample& e, int x_type, int64_t m) {
    Guarded x(m * e.k * size_of(x_type)), bias(e.n * size_of(x_type)), first;
    for (int64_t i = 0; i < m * e.k; i++) write(x.get(), i, x_type, uniform(-1, 1));
    for (int64_t i = 0; i < e.n; i++) write(bias.get(), i, x_type, uniform(-1, 1));
    // of the sum in float32, of the weight in bfloat16, of the result
    const double weight_slack = x_type == BF16 ? 0x1p-8 : 0x1p-19, out_slack = x_type == F32 ? 0x1p-22 : x_type == BF16 ? 0x1p-8 : 0x1p-10;
    for (int threads : {1, 3}) {
        Guarded out(m * e.n * size_of(x_type));
        Linear a;
        a.w = e.weight();
        a.x = x.get(), a.bias = m % 2 ? bias.get() : nullptr, a.out = out.get(), a.m = m, a.x_type = x_type, a.threads = threads;
        level.aqlm_linear(a);
        checks++;
        if (!out.intact()) return fail("%s aqlm_linear %s writes in front of out", level.name, e.name.c_str());
        if (threads > 1) return same_bits(out, first) || fail("%s aqlm_linear %s m=%lld differs from one thread", level.name,
                                                              e.name.c_str(), static_cast<long long>(m));
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < e.n; j++) {
                double wanted = m % 2 ? read(bias.get(), j, x_type) : 0, size = std::fabs(wanted);
                for (int64_t c = 0; c < e.k; c++) {
                    const double term = read(x.get(), i * e.k + c, x_type) * e.dense[j * e.k + c];
                    wanted += term, size += std::fabs(term);
                }
                const double got = read(out.get(), i * e.n + j, x_type);
                // sums of several entries may cancel, and tables round each entry's part
                const double slack = weight_slack * size * static_cast<double>(e.q.books) + out_slack * std::fabs(wanted);
                if (!(std::fabs(got - wanted) <= slack))
                    return fail("%s aqlm_linear %s x=%s m=%lld: [%lld, %lld] is %.9g, wanted %.9g", level.name, e.name.c_str(),
                                FLOAT_NAMES[x_type], static_cast<long long>(m), static_cast<long long>(i),
                                static_cast<long long>(j), got, wanted);
            }
        first = std::move(out);
    }
    return true;
}

void check_aqlm(const std::vector<const Level*>& levels, bool small) {
    struct Layout {
        int64_t books;
        int bits;
        int64_t out_group, in_group, lines, groups;
    };
    const Layout layouts[] = {{2, 8, 1, 8, 45, 67}, {1, 8, 1, 8, 13, 1}, {1, 16, 1, 8, 33, 65}, {1, 16, 1, 16, 1, 3},
                              {3, 5, 2, 16, 7, 9},  {8, 8, 8, 8, 3, 5},  {1, 12, 1, 24, 9, 22}, {1, 8, 1, 3, 5, 171},
                              {2, 1, 1, 8, 4, 2},   {2, 17, 1, 4, 3, 2},  {3, 8, 1, 8, 33, 5},   {9, 7, 1, 8, 5, 3},
                              {1, 6, 1, 8, 98, 63}, {2, 8, 1, 8, 17, 129}, {2, 9, 1, 8, 7, 66},  {8, 8, 1, 8, 9, 64}};
    int turn = 0;
    for (const Layout& l : layouts) {
        if (small && l.bits > 12 && l.in_group != 16) continue;
        const AqlmExample e = make_aqlm(l.books, l.bits, l.out_group, l.in_group, l.lines, l.groups, turn++ % 3);
        for (const Level* level : levels) {
            if (!level->aqlm_linear) continue;
            for (int type : {F32, BF16, F16}) {
                check_aqlm_dequantize(*level, e, type);
                for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64})
                    if (small ? m < 18 && (m % 2 || type == BF16) : m < 18 || e.n * e.k < 20000) check_aqlm_linear(*level, e, type, m);
            }
        }
    }
}
