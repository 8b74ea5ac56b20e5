// Which kernel serves int8 times int8: few rows or many. Panels: LanePanels (gemm_int8_neon.h), or PairPanels
// (neon_pairs.h) where there is FEAT_I8MM. Included last inside the namespaces of levels with FEAT_DotProd.

template <class Panels>
inline void linear_int8(const Linear& a) {
    if (a.m == 0) return;
    const int64_t ld = round_up(a.w.k, 16);
    int8_t* x = static_cast<int8_t*>(scratch(0, a.m * ld));
    float* x_scales = static_cast<float*>(scratch(1, a.m * sizeof(float)));
    parallel(a.m > GEMV_ROWS ? a.threads : 1, [&](int thread, int of) {
        const Range part = share(a.m, 1, thread, of);
        for (int64_t m = part.begin; m < part.end; m++)
            with_type(a.x_type, [&](auto type) {
                x_scales[m] = round_row<decltype(type)::type>(a.x, m * a.w.k, a.w.k, a.x_scale, x + m * ld);
            });
    });
    if (a.m > GEMV_ROWS) return gemm_int8<Panels>(a, x, ld, x_scales);
    parallel(a.threads, [&](int thread, int of) {
        const Range part = share(a.w.n, 32, thread, of);
        const auto run = [&](auto count) {
            constexpr int M = decltype(count)::slot, R = M <= 4 ? 4 : 2;
            int64_t row = part.begin;
            for (; row + R <= part.end; row += R) few_rows<M, R>(a, x, ld, x_scales, row);
            for (; row < part.end; row++) few_rows<M, 1>(a, x, ld, x_scales, row);
        };
        with_rows(a.m, run);
    });
}
