// Which kernel multiplies with additive codes. Included last inside a level's namespace; QUANTO_AQLM_BF16 says that
// aqlm_panels_bf16.h is there.

constexpr int64_t TABLE_ROWS = 4;

inline void aqlm_linear(const Linear& a) {
    if (a.m <= TABLE_ROWS && may_use_tables(a)) return aqlm_tables(a);
    if (a.m <= GEMV_ROWS) return aqlm_gemv(a);
#if defined(QUANTO_AQLM_BF16)
    if (a.x_type == BF16) return gemm<AqlmBF16>(a);
#endif
    gemm<AqlmF32>(a);
}
