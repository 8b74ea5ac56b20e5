// Sums of four products of bytes per lane by vpdpbusd: the codes unsigned, x signed. Included after int8.h.

struct ByteDot {
    using Sum = Ints;
    static Sum begin(int32_t start) { return (Ints)_mm512_set1_epi32(start); }
    static Sum step(Sum acc, I codes, int32_t x) { return dot_bytes(acc, codes, _mm512_set1_epi32(x)); }
    static F end(Sum acc, int32_t) { return to_float((I)acc); }
};
