// Beam search over additive codebooks. Included inside a level's namespace.
//
// A lane is a code: the squared distances of a residual to W vectors of a codebook are one chain of products per value,
// in the same order at every level, so that all levels find the same codes.

// Groups that are searched side by side, so that a part of a codebook is read once for all of them.
constexpr int64_t SEARCHED = 16;
constexpr int64_t CODE_BLOCK = 1024;  // codes of a part: 32 KB at 8 values

struct Candidate {
    float distance;
    int32_t parent, code;
};

// The best few, best first. The first of equal ones stays in front.
struct Best {
    Candidate at[MAX_BEAM];
    int size, limit;
    void clear(int n) { size = 0, limit = n; }
    float worst() const { return size < limit ? std::numeric_limits<float>::infinity() : at[size - 1].distance; }
    void insert(float distance, int parent, int64_t code) {
        int i = size < limit ? size++ : limit - 1;
        for (; i > 0 && distance < at[i - 1].distance; i--) at[i] = at[i - 1];
        at[i] = {distance, parent, static_cast<int32_t>(code)};
    }
};

// Codebooks turned around, so that a lane is a vector: for each one `width` rows of `padded` values, then a row of half the
// squared lengths (infinite for lanes without a vector).
struct Turned {
    const Codebooks books;
    const int64_t padded = round_up(books.size, W), each = (books.width + 1) * padded;
    float* data;
    static int64_t floats(const Codebooks& b) { return b.count * (b.width + 1) * round_up(b.size, W); }
    Turned(const Codebooks& b, float* memory) : books(b), data(memory) {}
    const float* book(int64_t k) const { return data + k * each; }
    void fill(const float* values) {
        for (int64_t k = 0; k < books.count; k++) {
            float* out = data + k * each;
            float* half = out + books.width * padded;
            for (int64_t c = 0; c < padded; c++) half[c] = c < books.size ? 0.0f : std::numeric_limits<float>::infinity();
            for (int64_t i = 0; i < books.width; i++) {
                for (int64_t c = 0; c < books.size; c++) {
                    const float v = values[(k * books.size + c) * books.width + i];
                    out[i * padded + c] = v;
                    half[c] += v * v;
                }
                for (int64_t c = books.size; c < padded; c++) out[i * padded + c] = 0.0f;
            }
            for (int64_t c = 0; c < books.size; c++) half[c] *= 0.5f;
        }
    }
};

// The distances of a residual to the codes [begin, end) of a turned codebook, less what is the same for all of them, and
// the smallest of each lane.
template <int WIDTH>
inline F distances(const float* turned, int64_t padded, int64_t width, const float* negative, int64_t begin, int64_t end, float* out) {
    const int64_t values = WIDTH ? WIDTH : width;
    const float* half = turned + values * padded;
    F low = splat(std::numeric_limits<float>::infinity());
    int64_t c = begin;
    for (; c + 4 * W <= end; c += 4 * W) {
        F a = load(half + c), b = load(half + c + W), d = load(half + c + 2 * W), e = load(half + c + 3 * W);
        for (int64_t i = 0; i < values; i++) {
            const F r = splat(negative[i]);
            const float* row = turned + i * padded + c;
            a = fma(r, load(row), a), b = fma(r, load(row + W), b);
            d = fma(r, load(row + 2 * W), d), e = fma(r, load(row + 3 * W), e);
        }
        store(out + c - begin, a), store(out + c - begin + W, b);
        store(out + c - begin + 2 * W, d), store(out + c - begin + 3 * W, e);
        low = min(low, min(min(a, b), min(d, e)));
    }
    for (; c < end; c += W) {
        F a = load(half + c);
        for (int64_t i = 0; i < values; i++) a = fma(splat(negative[i]), load(turned + i * padded + c), a);
        store(out + c - begin, a);
        low = min(low, a);
    }
    return low;
}

inline float smallest(F v) {
    float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i + half] < lanes[i] ? lanes[i + half] : lanes[i];
    return lanes[0];
}

// An upper bound of the `wanted` smallest distances: as many lanes hold one that is not above it.
inline float bound(F low, int wanted) {
    if (wanted > W) return std::numeric_limits<float>::infinity();
    float lanes[W];
    store(lanes, low);
    float highest = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < W; i++) {
        int below = 0;
        for (int j = 0; j < W; j++) below += lanes[j] < lanes[i];
        if (below < wanted && lanes[i] > highest) highest = lanes[i];
    }
    return highest;
}

// Puts those of `count` distances that are among the best where they belong.
inline void collect(const float* distance, int64_t count, F low, float offset, int parent, int64_t first, Best& best) {
    const F shift = splat(offset);
    low = add(low, shift);
    if (!any_less(low, splat(best.worst()))) return;
    // nothing above `limit` can stay
    float limit = best.worst();
    if (best.limit == 1) limit = smallest(low);
    else if (best.size < best.limit) limit = bound(low, best.limit - best.size);
    // a little above it, because lanes are compared by "less"
    const F above = splat(limit + std::fabs(limit) * 1e-6f + std::numeric_limits<float>::min());
    for (int64_t c = 0; c < count; c += W) {
        const F d = add(load(distance + c), shift);
        if (!any_less(d, above)) continue;
        float lanes[W];
        store(lanes, d);
        for (int i = 0; i < W; i++)
            if (lanes[i] <= limit && lanes[i] < best.worst()) best.insert(lanes[i], parent, first + c + i);
    }
}

// What a thread holds of the groups that it searches.
struct Searcher {
    const Turned& turned;
    const float* values;  // the codebooks as they are
    const int beam;
    const int64_t count = turned.books.count, width = turned.books.width;
    float* rest;  // SEARCHED * beam: what the vectors of the kept sets leave of the targets
    float* next_rest;
    float* negative;
    int32_t* kept;  // and their codes
    int32_t* next_kept;
    float distance[CODE_BLOCK];
    int sets[SEARCHED];
    Best best[SEARCHED];

    static size_t bytes(const Codebooks& b, int beam) { return SEARCHED * beam * (3 * b.width + 2 * b.count) * 4; }
    Searcher(const Turned& t, const float* v, int beam_, void* memory) : turned(t), values(v), beam(beam_) {
        rest = static_cast<float*>(memory);
        next_rest = rest + SEARCHED * beam * width;
        negative = next_rest + SEARCHED * beam * width;
        kept = reinterpret_cast<int32_t*>(negative + SEARCHED * beam * width);
        next_kept = kept + SEARCHED * beam * count;
    }
    const float* vector(int64_t k, int64_t c) const { return values + (k * turned.books.size + c) * width; }

    // targets[g] and codes[g] of up to SEARCHED groups
    template <int WIDTH>
    void run(const float* const* targets, int32_t* const* codes, int64_t groups) {
        for (int64_t g = 0; g < groups; g++) {
            std::memcpy(rest + g * beam * width, targets[g], width * sizeof(float));
            sets[g] = 1;
        }
        for (int64_t k = 0; k < count; k++) step<WIDTH>(k, groups);
        for (int64_t g = 0; g < groups; g++) {
            const int32_t* found = kept + g * beam * count;
            if (square(targets[g], found) < square(targets[g], codes[g])) std::memcpy(codes[g], found, count * sizeof(int32_t));
        }
    }

    float square(const float* target, const int32_t* codes) const {
        float sum = 0;
        for (int64_t i = 0; i < width; i++) {
            float r = target[i];
            for (int64_t k = 0; k < count; k++) r -= vector(k, codes[k])[i];
            sum += r * r;
        }
        return sum;
    }

    // One more code for each kept set.
    template <int WIDTH>
    void step(int64_t k, int64_t groups) {
        float offset[SEARCHED * MAX_BEAM];
        for (int64_t g = 0; g < groups; g++) {
            best[g].clear(k + 1 < count ? beam : 1);
            for (int64_t s = g * beam; s < g * beam + sets[g]; s++) {
                float square = 0;
                for (int64_t i = 0; i < width; i++) {
                    const float r = rest[s * width + i];
                    negative[s * width + i] = -r;
                    square += r * r;
                }
                offset[s] = 0.5f * square;
            }
        }
        const float* book = turned.book(k);
        for (int64_t begin = 0; begin < turned.padded; begin += CODE_BLOCK) {
            const int64_t end = begin + CODE_BLOCK < turned.padded ? begin + CODE_BLOCK : turned.padded;
            for (int64_t g = 0; g < groups; g++) {
                for (int s = 0; s < sets[g]; s++) {
                    const int64_t at = g * beam + s;
                    const F low = distances<WIDTH>(book, turned.padded, width, negative + at * width, begin, end, distance);
                    collect(distance, end - begin, low, offset[at], s, begin, best[g]);
                }
            }
        }
        for (int64_t g = 0; g < groups; g++) {
            // distances that are not numbers leave nothing; the first vector is as good as any then
            if (best[g].size == 0) best[g].insert(0, 0, 0);
            sets[g] = best[g].size;
            for (int s = 0; s < sets[g]; s++) {
                const Candidate& found = best[g].at[s];
                const int64_t from = g * beam + found.parent, to = g * beam + s;
                const float* v = vector(k, found.code);
                for (int64_t i = 0; i < width; i++) next_rest[to * width + i] = rest[from * width + i] - v[i];
                for (int64_t j = 0; j < k; j++) next_kept[to * count + j] = kept[from * count + j];
                next_kept[to * count + k] = found.code;
            }
        }
        float* const r = rest;
        rest = next_rest, next_rest = r;
        int32_t* const c = kept;
        kept = next_kept, next_kept = c;
    }
};

template <class Task>
inline void with_width(int64_t width, const Task& task) {
    if (width == 8) task(std::integral_constant<int, 8>());
    else task(std::integral_constant<int, 0>());
}

inline void aqlm_search(const AqlmSearch& a) {
    // turned once, by the thread that calls; the others read it
    Turned turned(a.books, static_cast<float*>(scratch(0, Turned::floats(a.books) * sizeof(float))));
    turned.fill(a.books.values);
    parallel(a.threads, [&](int thread, int of) {
        Searcher searcher(turned, a.books.values, a.beam, scratch(1, Searcher::bytes(a.books, a.beam)));
        const Range part = share(a.n, SEARCHED, thread, of);
        for (int64_t begin = part.begin; begin < part.end; begin += SEARCHED) {
            const int64_t groups = part.end - begin < SEARCHED ? part.end - begin : SEARCHED;
            const float* targets[SEARCHED];
            int32_t* codes[SEARCHED];
            for (int64_t g = 0; g < groups; g++) {
                targets[g] = a.targets + (begin + g) * a.books.width;
                codes[g] = a.codes + (begin + g) * a.books.count;
            }
            with_width(a.books.width, [&](auto w) { searcher.run<decltype(w)::value>(targets, codes, groups); });
        }
    });
}
