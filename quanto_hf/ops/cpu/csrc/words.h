// Codes to numbers, four vectors of them from one load. Included inside the namespace of a level for x86.
//
// A unit is 4 * W columns of a plane (docs/format.md), a word of 4 bytes per lane. Its numbers come as the four vectors
// that cost the fewest operations, so x is brought into their order, `column_of`, once per call. COUNT codes stand for
// numbers that are 1 apart. They stay where they are in the word: an AND, and the conversion to float, make
// code * 2^shift. The row of x is multiplied with 2^-shift beforehand, and the first number is added to the zero.

constexpr int64_t UNIT = 4 * W;

enum Form { SIGNED8, HALF_E4M3, HALF_E5M2, LOOKED_UP, COUNT4, COUNT2 };

constexpr int codes_of(int form) {
    return form == SIGNED8 ? INT8 : form == HALF_E4M3 ? E4M3 : form == HALF_E5M2 ? E5M2 : form == COUNT2 ? TABLE2 : TABLE4;
}
constexpr bool is_half(int form) { return form == HALF_E4M3 || form == HALF_E5M2; }
constexpr bool is_count(int form) { return form == COUNT4 || form == COUNT2; }

// Whether codes stand for numbers that are 1 apart.
inline bool evenly_spaced(const Weight& w) {
    for (int i = 1; i < 1 << bits_of(w.codes); i++)
        if (w.table[i] != w.table[0] + static_cast<float>(i)) return false;
    return true;
}

// All numbers of x are multiplied with 2^X_POWER, so that none gets smaller by the 2^-shift, and sums with the inverse.
constexpr int X_POWER = 28;
constexpr float X_FACTOR = 1 << X_POWER;

template <int FORM>
struct Units {
    static constexpr int CODES = codes_of(FORM), BITS = bits_of(CODES), PLANES = 8 / BITS;
    static constexpr bool COUNTS = is_count(FORM);
    static constexpr float RESULT = (FORM == HALF_E4M3 ? 256.0f : 1.0f) / X_FACTOR;  // what a sum is multiplied with

    Table table{};
    I seen = no_bits();
    explicit Units(const Weight& w) {
        if constexpr (FORM == LOOKED_UP) table = load_table(w.table);
    }

    // The column within the unit of a lane of vector v.
    static constexpr int column_of(int v, int lane) { return is_half(FORM) ? v / 2 * 2 * W + 2 * lane + v % 2 : 4 * lane + v; }
    // The highest code of a word may reach the sign, and is moved down.
    static constexpr int shift_of(int plane, int v) { return !COUNTS || 8 * v + (plane + 1) * BITS == 32 ? 0 : 8 * v + plane * BITS; }

    template <int PLANE, int V>
    F number(I words) const {
        constexpr int AT = 8 * V + PLANE * BITS;
        if constexpr (FORM == SIGNED8) return to_float(signed_byte<V>(words));
        else if constexpr (FORM == LOOKED_UP) return lookup_word<AT>(table, words);
        else if constexpr (AT + BITS == 32) return to_float(words_right<AT>(words));
        else return to_float(words_and(words, ((1u << BITS) - 1) << AT));
    }
    template <int PLANE>
    void numbers(const uint8_t* codes, F* out) {
        const I words = load_words(codes);
        if constexpr (FORM == HALF_E5M2) return e5m2_words(words, out);
        if constexpr (FORM == HALF_E4M3) {
            seen = e4m3_seen(seen, words);
            return e4m3_words(words, out);
        }
        if constexpr (!is_half(FORM)) {
            out[0] = number<PLANE, 0>(words), out[1] = number<PLANE, 1>(words);
            out[2] = number<PLANE, 2>(words), out[3] = number<PLANE, 3>(words);
        }
    }
    bool saw_nan() const {  // those of e5m2 are NaN as halves too
        if constexpr (FORM == HALF_E4M3) return e4m3_saw_nan(seen);
        else return false;
    }
};
