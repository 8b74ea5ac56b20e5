// Rows of x times the weights of their experts. Included by test_kernels.cpp inside its namespace.

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
        note(level.name, "expert_linear", CODE_NAMES[codes], zero ? "grouped-zero" : "grouped", x_type, m);
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
