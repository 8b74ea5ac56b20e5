// x in int8 for int8_groups.h: each X_GROUP columns of a row share a scale, absmax / 127, unless one is given for all. Included inside the namespace
// of a level for x86.

constexpr int64_t X_GROUP = 32;

// Rounded rows of x, and what the kernels need to know of them. A unit is the columns that share a scale of x and a
// scale of the weight: 32, or 16 where the groups of the weight cut those of x.
struct RoundedX {
    int64_t ld, units;  // dwords, and units, of a row
    int32_t* q;         // [m][ld]: four columns each; zeros behind the last column
    float* scales;      // [m][units], divided by `powers`
    int32_t* starts;    // [m][units]: -middle * (sum of q)
    float* shifts;      // [m][groups of the weight]: -(sum of x as it is rounded) / powers; null if there are no zeros
    float* powers;      // [m]: 2^e of the largest value, or NaN for a row with NaN, or with infinity and its own scales
};

// The power of two below `largest`, in the range where its inverse is one too. With x divided by it, no sum of a group
// leaves float32 on its way to a scale of the weight that would have brought it back.
inline float power_below(float largest) {
    uint32_t bits;
    std::memcpy(&bits, &largest, 4);
    bits = (bits & 0x7F800000) < 0x00800000 ? 0x00800000 : (bits & 0x7F800000) > 0x7E800000 ? 0x7E800000 : bits & 0x7F800000;
    std::memcpy(&largest, &bits, 4);
    return largest;
}

template <int TYPE>
inline void round_row(const Linear& a, int64_t m, int64_t unit, int32_t middle, const RoundedX& x) {
    const int64_t k = a.w.k;
    uint8_t* q = reinterpret_cast<uint8_t*>(x.q + m * x.ld);
    float *scales = x.scales + m * x.units, row_most = 0.0f;
    int32_t* starts = x.starts + m * x.units;
    F poison = splat(0.0f);
    for (int64_t i = 0, u = 0; i < k; i += X_GROUP) {
        constexpr int PARTS = X_GROUP / W;
        F v[PARTS], most = splat(0.0f);
        for (int p = 0; p < PARTS; p++) {
            const int64_t left = k - i - p * W;
            v[p] = loadn_as<TYPE>(a.x, m * k + i + p * W, left < 0 ? 0 : left < W ? left : W);
            most = max(most, masked(v[p], 0x7FFFFFFF));
        }
        const float absmax = largest(most), scale = usable_scale(a.x_scale ? *a.x_scale : absmax / 127.0f);
        row_most = std::max(row_most, a.x_scale ? 127.0f * std::fabs(scale) : absmax);
        F sums[2] = {splat(0.0f), splat(0.0f)};  // of the two halves of the group
        for (int p = 0; p < PARTS; p++) {
            // min and max give their second operand if one is NaN
            const F cut = max(splat(-127.0f), min(splat(127.0f), div(v[p], splat(scale))));
            poison = fma(cut, splat(0.0f), poison);
            const F number = round_even(max(cut, splat(-127.0f)));  // no NaN in the sums
            storen_bytes(q + i + p * W, to_int(number), W);
            sums[p * 2 / PARTS] = add(sums[p * 2 / PARTS], number);
        }
        if (unit == X_GROUP) sums[0] = add(sums[0], sums[1]);
        for (int64_t from = i, half = 0; from < i + X_GROUP && from < k; from += unit, half++, u++) {
            scales[u] = scale;
            starts[u] = -middle * static_cast<int32_t>(sum(sums[half]));
        }
    }
    const int64_t done = round_up(k, X_GROUP);
    std::memset(q + done, 0, x.ld * 4 - done);
    const float check = sum(poison), power = power_below(row_most), inverse = 1.0f / power;
    x.powers[m] = check == 0.0f ? power : check;
    for (int64_t u = 0; u < x.units; u++) scales[u] *= inverse;
    if (!x.shifts) return;
    const int64_t per_group = a.w.groups == 1 ? x.units : a.w.group / unit;
    for (int64_t g = 0, u = 0; g < a.w.groups; g++) {
        float total = 0.0f;
        for (const int64_t end = u + per_group < x.units ? u + per_group : x.units; u < end; u++)
            total += scales[u] * static_cast<float>(starts[u] / middle);
        x.shifts[m * a.w.groups + g] = total;
    }
}
