// Which kernel serves a call, for the levels with AVX-512 BF16. Included last inside their namespaces.

inline void linear(const Linear& a) {
    const bool blocks = has_blocks(a.w);
    if (a.x_type == BF16) {
        if (a.m <= GEMV_ROWS) return blocks ? gemv_bf16(a) : gemv(a);
        return blocks ? gemm<DotBF16<true>>(a) : gemm<DotBF16<false>>(a);
    }
    a.m <= GEMV_ROWS ? gemv(a) : gemm<DotF32>(a);
}
