// Which kernel multiplies with additive codes. Included last inside a level's namespace; QUANTO_AQLM_BF16 says that
// aqlm_panels_bf16.h is there.

// A row of x costs its tables a pass over all codes, and the other ways a multiplication with weights that are there already.
// 4096 x 4096, one thread of a Zen 4, float32 x: 1x8 with 4 rows takes 2.4 by tables and 2.8 ms, 2x8 with 2 rows 2.6 and
// 3.5, with 3 rows 3.8 and 3.7. With bfloat16 x one row takes 0.65 and 0.62 (1x8) or 1.31 and 1.39 (2x8), and tables are
// the more exact; two rows 1.28 and 0.66, or 2.6 and 1.6.
constexpr int64_t TABLE_BOOKS = 4;

inline void aqlm_linear(const Linear& a) {
    const Aqlm& q = *a.w.aqlm;
#if defined(QUANTO_AQLM_BF16)
    if (a.m > 1 && aqlm_eights(a)) return;
#endif
    if (q.bits <= 8 && (a.m == 1 || a.m * q.books <= TABLE_BOOKS) && scale_may_come_late(a)) return aqlm_tables(a);
#if defined(QUANTO_AQLM_BF16)
    if (a.m == 1 && aqlm_eights(a)) return;
#endif
    Linear prepared = a;
    const Aqlm floats = q.bits <= 8 ? with_books(q, F32, 4, a.threads) : q;  // small codebooks are not converted at each entry
    prepared.w.aqlm = &floats;
    if (a.m <= GEMV_ROWS) return aqlm_rows<FloatPiece>(prepared);
#if defined(QUANTO_AQLM_BF16)
    // where has_eights() is true, numbers are so large or small that weights might vanish as bfloat16 factors
    if (a.x_type == BF16 && !has_eights(q)) return gemm<AqlmBF16>(prepared);
#endif
    gemm<AqlmF32>(prepared);
}
