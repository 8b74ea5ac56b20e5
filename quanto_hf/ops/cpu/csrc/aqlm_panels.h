// Many rows of x and a weight of additive codes: panels for gemm.h. Included inside a level's namespace, behind aqlm_decode.h.

struct AqlmF32 : DotF32 {
    static void panel(const Weight& w, const Tables&, int64_t row, int64_t rows, int64_t from, int64_t to, float* out) {
        with_aqlm(*w.aqlm, [&](auto book, auto code) {
            for (int64_t r = 0; r < rows; r++) {
                ask_for_codes(w, row + r + AQLM_AHEAD, from, to);
                for_each_chunk<decltype(book)::type, decltype(code)>(
                    w, row + r, from, to, [&](const float* values, int64_t column, int64_t count) {
                        std::memcpy(out + r * CHUNK + column - from, values, count * sizeof(float));
                    });
            }
        });
    }
};
