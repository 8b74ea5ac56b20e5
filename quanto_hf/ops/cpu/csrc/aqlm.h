// Which kernel multiplies with additive codes. Included last inside a level's namespace; QUANTO_AQLM_BF16 says that
// aqlm_panels_bf16.h is there.

// A row of x costs its tables a pass over all codes, and gathers a multiplication with weights that are there already.
// 4096 x 4096, one thread of a Zen 4: 1x8 with 4 rows takes 2.5 and 4.4 ms, 2x8 with 2 rows 2.5 and 4.0, with 4 rows 5.6 and 5.5.
constexpr int64_t TABLE_BOOKS = 4;

inline void aqlm_linear(const Linear& a) {
    if ((a.m == 1 || a.m * a.w.aqlm->books <= TABLE_BOOKS) && may_use_tables(a)) return aqlm_tables(a);
    if (a.m <= GEMV_ROWS) return aqlm_gemv(a);
#if defined(QUANTO_AQLM_BF16)
    if (a.x_type == BF16) return gemm<AqlmBF16>(a);
#endif
    gemm<AqlmF32>(a);
}
