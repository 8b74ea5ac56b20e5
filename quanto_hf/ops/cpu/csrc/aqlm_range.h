// When the scale of a row may multiply a sum of products in place of the weights. Included inside a level's namespace,
// behind decode.h.

// The largest magnitude of `count` numbers, infinity if one is not finite.
inline float largest_magnitude_of(const void* p, int type, int64_t count) {
    F most[2] = {splat(0.0f), splat(0.0f)}, wild[2] = {splat(0.0f), splat(0.0f)};
    with_type(type, [&](auto tag) {
        const auto look = [&](F v, int u) {
            most[u] = max(masked(v, 0x7FFFFFFF), most[u]);
            wild[u] = fma(v, splat(0.0f), wild[u]);  // NaN from the first number on that is not finite
        };
        int64_t i = 0;
        for (; i + 2 * W <= count; i += 2 * W)
            for (int u = 0; u < 2; u++) look(loadn_as<decltype(tag)::type>(p, i + u * W, W), u);
        for (; i < count; i += W) look(loadn_as<decltype(tag)::type>(p, i, count - i < W ? count - i : W), 0);
    });
    float lanes[W], found = 0.0f;
    store(lanes, max(most[0], most[1]));
    for (float lane : lanes) found = lane > found ? lane : found;
    return sum(add(wild[0], wild[1])) == 0.0f ? found : std::numeric_limits<float>::infinity();
}

// Whether numbers, of which this is the largest, are all below 2^high, and not all below 2^low unless they are 0.
inline bool is_within(float largest, int low, int high) {
    return largest < std::ldexp(1.0f, high) && (largest == 0.0f || largest >= std::ldexp(1.0f, low));
}

// Whether no number can leave the range of float32 on the way, where the scale would have brought it back; see late.h.
inline bool scale_may_come_late(const Linear& a) {
    const Aqlm& q = *a.w.aqlm;
    if (!is_within(largest_magnitude_of(q.scales, q.scale_type, a.w.n / q.out_group), -126, 127)) return false;
    constexpr int64_t PART = 4096;  // entries
    const int64_t values = (q.books << q.bits) * q.out_group * q.in_group, parts = (values + PART - 1) / PART;
    std::atomic<bool> good{true}, empty{true}, seen{false};
    // 1x16 has half a million values: 0.06 ms on one thread of a Zen 4
    parallel(parts > 16 || a.m > GEMV_ROWS ? a.threads : 1, [&](int thread, int of) {
        const Range mine = share(parts, 1, thread, of), rows = share(a.m, 1, thread, of);
        for (int64_t at = mine.begin * PART; at < mine.end * PART && at < values; at += PART) {
            const float largest = largest_magnitude_of(static_cast<const uint8_t*>(q.codebooks) + at * size_of(q.book_type),
                                                       q.book_type, values - at < PART ? values - at : PART);
            if (!is_within(largest, -149, 30)) good = false;
            if (largest > 0.0f) empty = false;
            if (largest >= 0x1p-40f) seen = true;
        }
        for (int64_t m = rows.begin; m < rows.end; m++)
            if (!is_within(largest_magnitude_of(static_cast<const uint8_t*>(a.x) + m * a.w.k * size_of(a.x_type), a.x_type, a.w.k), -40, 60))
                good = false;
    });
    return good && (seen || empty);
}
