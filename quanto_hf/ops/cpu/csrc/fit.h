// Scale and zero of groups of values, as quanto_hf/fit defines them. Included inside a level's namespace.
//
// Values lie in memory as vectors of one number of W groups each (a lane is a group, nothing is summed across lanes), or
// as the numbers of one long group (ACROSS). The fits are the same code for both.

// Lanes that count: all of them, or those where `ones` is 1. (Functions, not lambdas: GCC forgets the instructions that
// a template may use in a lambda without captures.)
struct KeepAll {
    F operator()(F v) const { return v; }
};
struct KeepSome {
    F ones;
    F operator()(F v) const { return mul(v, ones); }
};

template <bool ACROSS>
struct Values {
    const float* at;
    int64_t count;  // numbers of a group; ACROSS: zeros fill up the last vector
    // step(i, vector, keep): keep(x) is x with 0 in the lanes that hold no number
    template <class Step>
    void each(const Step& step) const {
        const int64_t full = ACROSS ? count / W : count;
        for (int64_t i = 0; i < full; i++) step(i, load(at + i * W), KeepAll{});
        if (!ACROSS || full * W == count) return;
        float ones[W];
        for (int i = 0; i < W; i++) ones[i] = full * W + i < count ? 1.0f : 0.0f;
        step(full, load(at + full * W), KeepSome{load(ones)});
    }
    F total(F v) const { return ACROSS ? splat(sum(v)) : v; }
    F number() const { return splat(static_cast<float>(count)); }
};

struct Limits {
    F low, high;
};
inline Limits limits(const Values<false>& values) {
    Limits l = {load(values.at), load(values.at)};
    for (int64_t i = 1; i < values.count; i++) {
        const F v = load(values.at + i * W);
        l = {min(l.low, v), max(l.high, v)};
    }
    return l;
}
inline Limits limits(const Values<true>& values) {
    Limits l = {splat(values.at[0]), splat(values.at[0])};
    int64_t i = 0;
    for (; i + W <= values.count; i += W) {
        const F v = load(values.at + i);
        l = {min(l.low, v), max(l.high, v)};
    }
    float low[W], high[W];
    store(low, l.low), store(high, l.high);
    for (int j = 1; j < W; j++) {
        low[0] = low[j] < low[0] ? low[j] : low[0];
        high[0] = high[j] > high[0] ? high[j] : high[0];
    }
    for (; i < values.count; i++) {
        low[0] = values.at[i] < low[0] ? values.at[i] : low[0];
        high[0] = values.at[i] > high[0] ? values.at[i] : high[0];
    }
    return {splat(low[0]), splat(high[0])};
}

struct ScaleZero {
    F scale, zero;
};

template <class V, class G>
struct Fitter {
    const Quantize& q;
    const V& values;
    const G& grid;
    const bool shifted_grid = G::HAS_ZERO && q.zero;
    const float lowest = static_cast<float>(q.numbers[0]), highest = static_cast<float>(q.numbers[1]);

    F stored(F v) const { return q.scale_type == BF16 ? round_bf16(v) : v; }
    F stored_scale(F v) const {
        const F s = stored(v);
        return select_less(splat(0.0f), magnitude(s), s, splat(1.0f));
    }
    F units(F v, const ScaleZero& s) const { return add(div(v, s.scale), s.zero); }

    // The range, shrunk by `ratio`, on the grid.
    ScaleZero of_range(const Limits& l, double ratio) const {
        const F share = splat(static_cast<float>(ratio)), top = splat(highest), nothing = splat(0.0f);
        const F negated = sub(nothing, l.low);
        if (!shifted_grid) {
            if (-lowest <= highest)
                return {stored_scale(mul(max(negated, l.high), splat(static_cast<float>(ratio / q.numbers[1])))), nothing};
            const F long_side = select_less(negated, l.high, div(l.high, splat(lowest)), div(l.low, splat(lowest)));
            return {stored_scale(mul(long_side, share)), nothing};
        }
        const F width = mul(sub(div(l.high, top), div(l.low, top)), share), half = splat(0.5f);
        const F scale = stored_scale(select_less(l.low, l.high, width, magnitude(l.low)));
        const F middle = div(add(mul(l.high, half), mul(l.low, half)), scale);
        const F constant = select_less(l.low, nothing, splat(1.0f), nothing);
        return {scale, stored(select_less(l.low, l.high, sub(splat(highest / 2), middle), constant))};
    }

    // The norm of the error of each group.
    F error(const ScaleZero& s) const {
        F squares = splat(0.0f);
        values.each([&](int64_t, F v, const auto& keep) {
            const F u = units(v, s), off = keep(sub(u, grid.nearest(u)));
            squares = fma(off, off, squares);
        });
        return mul(root(values.total(squares)), magnitude(s.scale));
    }

    // Keeps the better of two.
    void improve(ScaleZero& best, F& best_error, const ScaleZero& s) const {
        const F e = error(s);
        best.scale = select_less(e, best_error, s.scale, best.scale);
        best.zero = select_less(e, best_error, s.zero, best.zero);
        best_error = select_less(e, best_error, e, best_error);
    }

    // One round of least squares for the codes that `s` gives.
    ScaleZero regress(const ScaleZero& s, F mean_value) const {
        F squares = splat(0.0f), products = squares, numbers = squares;
        values.each([&](int64_t, F v, const auto& keep) {
            const F number = keep(grid.nearest(units(v, s)));
            squares = fma(number, number, squares);
            products = fma(number, v, products);
            if (shifted_grid) numbers = add(numbers, number);
        });
        const F nothing = splat(0.0f), count = values.number();
        squares = values.total(squares), products = values.total(products);
        if (!shifted_grid) return {select_less(nothing, squares, div(products, squares), s.scale), nothing};
        const F mean = div(values.total(numbers), count);
        const F variance = sub(div(squares, count), mul(mean, mean));
        const F slope = div(sub(div(products, count), mul(mean, mean_value)), variance);
        const F usable = select_less(nothing, slope, slope, s.scale);
        const F scale = select_less(splat(0.5f / static_cast<float>(values.count)), variance, usable, s.scale);
        return {scale, sub(mean, div(mean_value, scale))};
    }

    ScaleZero mse() const {
        const Limits l = limits(values);
        ScaleZero best = of_range(l, q.numbers[4]);
        F best_error = error(best);
        for (int64_t i = 5; i < q.number_count; i++) improve(best, best_error, of_range(l, q.numbers[i]));
        F mean = splat(0.0f), squares = splat(0.0f);
        values.each([&](int64_t, F v, const auto&) { mean = add(mean, v), squares = fma(v, v, squares); });
        mean = div(values.total(mean), values.number());
        ScaleZero s = best;
        for (int i = 0; i < static_cast<int>(q.numbers[3]); i++) s = regress(s, mean);
        improve(best, best_error, {stored_scale(s.scale), stored(s.zero)});
        if (q.numbers[2] == 0) return best;
        const F size = root(values.total(squares)), one = splat(1.0f);
        F share = div(best_error, max(size, splat(std::numeric_limits<float>::min())));
        share = min(mul(share, share), splat(0.5f));
        const F gain = div(mul(splat(static_cast<float>(q.numbers[2])), share), sub(one, share));
        return {stored_scale(mul(best.scale, add(one, gain))), best.zero};
    }

    // `scaled`: room for as many numbers as there are values.
    ScaleZero hqq(float* scaled) const {
        const ScaleZero start = of_range(limits(values), 1.0);
        // residuals that do not shrink to 0 only occur with larger scales
        const F scale = start.scale, nothing = splat(0.0f), inverse = div(splat(1.0f), max(scale, splat(1e-30f)));
        values.each([&](int64_t i, F v, const auto&) { store(scaled + i * W, div(v, scale)); });
        const double p = q.numbers[2];
        double beta = q.numbers[3];
        F zero = start.zero, best_zero = zero, best_error = splat(std::numeric_limits<float>::infinity());
        for (int i = 0; i < static_cast<int>(q.numbers[5]); i++, beta *= q.numbers[4]) {
            // What is smaller than this shrinks to 0: for the usual weights, of size 0.02, that is everything.
            const F threshold = splat(static_cast<float>(0.999 * std::pow(beta, -1 / (2 - p))));
            const F weight = splat(static_cast<float>(1 / beta));
            F error = nothing, moved = nothing;
            bool sparse = false;
            values.each([&](int64_t at, F v, const auto& keep) {
                const F u = load(scaled + at * W), number = grid.nearest(add(u, zero));
                const F residual = sub(v, mul(sub(number, zero), scale)), size = magnitude(residual);
                error = add(error, keep(size));
                F rest = u;
                if (any_less(threshold, size)) {
                    const F power = power_of(max(size, splat(1e-12f)), static_cast<float>(p - 1));
                    const F kept = max(sub(size, mul(power, weight)), nothing);
                    rest = sub(u, mul(select_less(residual, nothing, sub(nothing, kept), kept), inverse));
                    sparse = true;
                }
                moved = add(moved, keep(sub(number, rest)));
            });
            error = values.total(error);
            best_zero = select_less(error, best_error, zero, best_zero);
            best_error = select_less(error, best_error, error, best_error);
            const F next = stored(div(values.total(moved), values.number()));
            if (!sparse && !any_less(next, zero) && !any_less(zero, next)) break;  // it would stay there
            zero = next;
        }
        return {scale, best_zero};
    }

    ScaleZero operator()(float* scaled) const {
        if (q.fit == MSE) return mse();
        if constexpr (G::HAS_ZERO) {
            if (q.fit == HQQ) return hqq(scaled);
        }
        return of_range(limits(values), 1.0);
    }
};
