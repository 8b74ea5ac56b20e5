// Prefetching of codes. Included inside the namespace of a level for x86.

// Asks for the codes of the next R rows, in the order of their addresses, while R rows are read side by side. Reading
// several rows at a time confuses the prefetchers of the processor: 24 GB/s without this, 36 with it (Zen 4, 2 threads;
// into the second-level cache, since the first is full of x).
struct Ahead {
    const uint8_t* at;
    int64_t lines, skip, left;
    Ahead(const uint8_t* packed, int64_t row_bytes, int64_t next_row, int64_t b0, int64_t b1)
        : at(packed + next_row * row_bytes + b0 * 64), lines(b1 - b0), skip(row_bytes - lines * 64), left(lines) {}
    void step() {
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
        at += 64;
        if (--left == 0) at += skip, left = lines;
    }
};

// Asks for the scales and zeros of n rows from `row` on. Nothing is read behind the last row: a prefetch never faults.
inline void scales_ahead(const Weight& w, int64_t row, int64_t n) {
    const int64_t bytes = w.groups * size_of(w.scale_type);
    const char *scales = static_cast<const char*>(w.scale) + row * bytes, *zeros = static_cast<const char*>(w.zero);
    for (int64_t i = 0; i < n * bytes; i += 64) {
        _mm_prefetch(scales + i, _MM_HINT_T1);
        if (zeros) _mm_prefetch(zeros + row * bytes + i, _MM_HINT_T1);
    }
}
