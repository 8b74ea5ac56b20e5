// Levels whose kernels note what they are called with before they run: what is covered is what was called, and nobody
// has to remember it. Included by test_kernels.cpp inside its namespace.

template <size_t I>
struct Noted {
    static inline const Level* real = nullptr;

    static const char* stored(const Weight& w) {
        if (w.aqlm) return FLOAT_NAMES[w.aqlm->book_type];
        return w.zero ? w.group < w.k ? "grouped-zero" : "rows-zero" : w.group < w.k ? "grouped" : "rows";
    }
    static const char* codes(const Weight& w) { return w.aqlm ? "aqlm" : CODE_NAMES[w.codes]; }

    static void linear(const Linear& a) {
        note(real->name, "linear", codes(a.w), stored(a.w), a.x_type, a.m);
        real->linear(a);
    }
    static void dequantize(const Weight& w, int out_type, void* out, const int64_t* rows, int64_t count, int threads) {
        note(real->name, rows ? "dequantize_rows" : "dequantize", codes(w), stored(w), out_type, 0);
        real->dequantize(w, out_type, out, rows, count, threads);
    }
    static bool quantize(const Quantize& q) {
        const char* const fits[][2] = {{"range", "range-zero"}, {"mse", "mse-zero"}, {"hqq", "hqq-zero"}};
        note(real->name, "quantize", q.table ? "lookup" : CODE_NAMES[q.codes], fits[q.fit][q.zero != nullptr], q.in_type, 0);
        return real->quantize(q);
    }
    static void linear_int8(const Linear& a) {
        note(real->name, "linear_int8", codes(a.w), a.x_scale ? "static" : "dynamic", a.x_type, a.m);
        real->linear_int8(a);
    }
    static void linear_int8_groups(const Linear& a) {
        const char* const variants[][2] = {{"dynamic", "static"}, {"dynamic-zero", "static-zero"}};
        note(real->name, "linear_int8_groups", codes(a.w), variants[a.w.zero != nullptr][a.x_scale != nullptr], a.x_type, a.m);
        real->linear_int8_groups(a);
    }
    static void aqlm_linear(const Linear& a) {
        note(real->name, "aqlm_linear", codes(a.w), stored(a.w), a.x_type, a.m);
        real->aqlm_linear(a);
    }
    static void aqlm_dequantize(const Weight& w, int out_type, void* out, int threads) {
        note(real->name, "aqlm_dequantize", codes(w), stored(w), out_type, 0);
        real->aqlm_dequantize(w, out_type, out, threads);
    }

    static Level level(const Level& of) {
        // A kernel that is new in Level has no name here, and the compiler says so.
        const auto& [name, has_linear, has_dequantize, has_quantize, has_int8, has_groups, has_aqlm, has_aqlm_dequantize] = of;
        real = &of;
        return {name,
                has_linear ? linear : nullptr,
                has_dequantize ? dequantize : nullptr,
                has_quantize ? quantize : nullptr,
                has_int8 ? linear_int8 : nullptr,
                has_groups ? linear_int8_groups : nullptr,
                has_aqlm ? aqlm_linear : nullptr,
                has_aqlm_dequantize ? aqlm_dequantize : nullptr};
    }
};

template <size_t... I>
std::vector<Level> noted(const std::vector<const Level*>& levels, std::index_sequence<I...>) {
    std::vector<Level> out;
    ((I < levels.size() ? out.push_back(Noted<I>::level(*levels[I])) : void()), ...);
    return out;
}
