// Which kernel serves a call, for the levels with bfloat16 products. Included last inside their namespaces.

inline void linear(const Linear& a) {
    if (a.m == 0) return;
    if (a.x_type == BF16) {
        const bool blocks = has_blocks(a.w) && (bits_of(a.w.codes) < 8 || may_scale_late(a));
        if (a.m <= GEMV_ROWS) return blocks ? gemv_bf16(a) : gemv(a);
        return blocks ? gemm<DotBF16<true>>(a) : gemm<DotBF16<false>>(a);
    }
    a.m <= GEMV_ROWS ? gemv(a) : gemm<DotF32>(a);
}
