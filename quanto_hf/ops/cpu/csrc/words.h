// Codes to numbers, four vectors of them at a time. Included inside the namespace of a level for x86.
//
// A unit is 4 * W columns of a plane (docs/format.md), a word of 4 bytes per lane. Its numbers come as the four vectors
// that cost the fewest operations, and x is brought into their order once per call. COUNT codes stand for numbers that
// are 1 apart. They stay where they are in the word: an AND and the conversion to float make code * 2^shift. The row of x
// is multiplied with 2^-shift beforehand, and the first number is added to the zero.

constexpr int64_t UNIT = 4 * W;

// BYTE8 and WORD8: signed bytes, one by one or by words.
enum Form { BYTE8, WORD8, HALF_E4M3, HALF_E5M2, LOOKED_UP, COUNT4, COUNT2 };

constexpr int codes_of(int form) {
    return form == BYTE8 || form == WORD8 ? INT8
           : form == HALF_E4M3            ? E4M3
           : form == HALF_E5M2            ? E5M2
           : form == COUNT2               ? TABLE2
                                          : TABLE4;
}
constexpr bool is_half(int form) { return form == HALF_E4M3 || form == HALF_E5M2; }
constexpr bool is_count(int form) { return form == COUNT4 || form == COUNT2; }

// Whether codes stand for numbers that are 1 apart.
inline bool evenly_spaced(const Weight& w) {
    for (int i = 1; i < 1 << bits_of(w.codes); i++)
        if (w.table[i] != w.table[0] + static_cast<float>(i)) return false;
    return true;
}

// All numbers of x are multiplied with 2^28, so that none gets smaller by the 2^-shift, and sums with the inverse.
constexpr float X_FACTOR = 1 << 28;

template <int FORM>
struct Units {
    static constexpr int CODES = codes_of(FORM), BITS = bits_of(CODES), PLANES = 8 / BITS;
    static constexpr bool COUNTS = is_count(FORM);
    // what a sum is multiplied with
    static constexpr float RESULT = (FORM == HALF_E4M3 ? 256.0f : FORM == WORD8 ? 1.0f / (1 << 24) : 1.0f) / X_FACTOR;

    WordTable table{};
    I seen = no_bits();
    explicit Units(const Weight& w) {
        if constexpr (FORM == LOOKED_UP) table = load_word_table(w.table);
    }

    // What number<PLANE, V> is multiplied with. The highest code of a word may reach the sign, and is moved down.
    static constexpr float power(int plane, int v) {
        return !COUNTS || 8 * v + (plane + 1) * BITS == 32 ? 1.0f : static_cast<float>(1 << (8 * v + plane * BITS));
    }

    template <int PLANE, int V>
    static F number(I words) {
        constexpr int AT = 8 * V + PLANE * BITS;
        if constexpr (FORM == WORD8) return to_float(words_and(words_left<24 - AT>(words), 0xFF000000));  // times 2^24
        else if constexpr (AT + BITS == 32) return to_float(words_right<AT>(words));
        else return to_float(words_and(words, ((1u << BITS) - 1) << AT));
    }
    template <int PLANE>
    void numbers(const uint8_t* codes, F* out) {
        if constexpr (FORM == BYTE8) {
            for (int v = 0; v < 4; v++) out[v] = to_float(load_signed(codes + v * W));
            return;
        }
        const I words = load_words(codes);
        if constexpr (FORM == HALF_E5M2) {
            e5m2_words(words, out);
        } else if constexpr (FORM == HALF_E4M3) {
            seen = e4m3_seen(seen, words);
            e4m3_words(words, out);
        } else if constexpr (FORM == LOOKED_UP) {
            lookup_words<PLANE>(table, words, out);
        } else {
            out[0] = number<PLANE, 0>(words), out[1] = number<PLANE, 1>(words);
            out[2] = number<PLANE, 2>(words), out[3] = number<PLANE, 3>(words);
        }
    }
    bool saw_nan() const {  // those of e5m2 are NaN as halves too
        if constexpr (FORM == HALF_E4M3) return e4m3_saw_nan(seen);
        else return false;
    }

    // The columns of a unit in the order of the numbers. Lanes 4 i to 4 i + 3 hold columns 16 i to 16 i + 15, but for halves
    // and BYTE8, whose columns are in their own order.
    template <int PLANE>
    static void order(const float* in, float* out) {
        if constexpr (FORM == BYTE8) {
            for (int v = 0; v < 4; v++) store(out + v * W, mul(load(in + v * W), splat(X_FACTOR)));
            return;
        }
        for (int i = 0; i < W / 4; i++) {
            __m128 v[4];
            if constexpr (is_half(FORM)) {
                for (int h = 0; h < 2; h++) {
                    const __m128 a = _mm_loadu_ps(in + 2 * W * h + 8 * i), b = _mm_loadu_ps(in + 2 * W * h + 8 * i + 4);
                    v[2 * h] = _mm_shuffle_ps(a, b, 0x88), v[2 * h + 1] = _mm_shuffle_ps(a, b, 0xDD);
                }
            } else {
                for (int j = 0; j < 4; j++) v[j] = _mm_loadu_ps(in + 16 * i + 4 * j);
                if constexpr (FORM != LOOKED_UP || !LOOKUP_IN_ORDER) _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
            }
            for (int j = 0; j < 4; j++) _mm_storeu_ps(out + j * W + 4 * i, _mm_mul_ps(v[j], _mm_set1_ps(X_FACTOR / power(PLANE, j))));
        }
    }
};

template <int PLANES, class Run>
inline void for_each_plane(const Run& run) {
    run(Slot<0>{});
    if constexpr (PLANES > 1) run(Slot<1>{});
    if constexpr (PLANES > 2) run(Slot<2>{}), run(Slot<3>{});
}
