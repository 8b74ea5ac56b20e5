// Whether the scale of a row of the weight may multiply sums in place of weights. Included inside the namespace of a
// level with bfloat16 products, behind its largest_magnitude() and is_finite().

constexpr uint32_t WILD = 0x6C80, FAINT = 0x2180;  // 2^90 and 2^-60 as bfloat16

// Whether no product of a row of x with the numbers of the codes, or sum of them, can leave the range of float32 on the
// way, where the scale would have brought it back: codes stay below 2^16, and rows below 2^22 columns. Infinity times a
// code, less infinity times a zero, would be NaN where the weight itself gives infinity. A row that is tiny throughout
// would vanish before a large scale.
inline bool is_tame(const uint16_t* x, int64_t k) {
    const uint32_t most = largest_magnitude(x, k);
    return most < WILD && (most >= FAINT || most == 0);
}

// Every row of x is tame, and every scale finite.
inline bool may_scale_late(const Linear& a) {
    std::atomic<bool> good{true};
    with_type(a.w.scale_type, [&](auto tag) {
        for (int64_t i = 0; i < a.w.n; i += W)
            if (!is_finite(loadn_as<decltype(tag)::type>(a.w.scale, i, a.w.n - i))) good = false;
    });
    if (!good) return false;
    parallel(a.m > GEMV_ROWS ? a.threads : 1, [&](int thread, int of) {
        const Range part = share(a.m, 1, thread, of);
        for (int64_t m = part.begin; m < part.end; m++)
            if (!is_tame(static_cast<const uint16_t*>(a.x) + m * a.w.k, a.w.k)) good = false;
    });
    return good;
}
