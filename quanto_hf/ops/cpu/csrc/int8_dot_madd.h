// The same without VNNI: vpmaddubsw adds pairs of products in 16 bits. It saturates for large bytes, but codes are below
// 16 and x is within 127, so that a pair is within 3810, and the 8 pairs that a unit adds up are within 30480.

struct ByteDot {
    using Sum = I;
    static I begin(int32_t) { return same_words(0); }
    static I step(I acc, I codes, int32_t x) { return add_pairs(acc, products_in_pairs(codes, same_words(x))); }
    static F end(I acc, int32_t start) { return to_float(words_of_pairs(acc, same_words(start))); }
};

// One row of x goes the way of eight.
inline bool few_rows(const Linear&, const RoundedX&, int64_t, int, float) { return false; }
