// One call at least of every kernel, number type, dtype and number of rows of x, with shapes, groups and dtypes of scales
// drawn anew for each. tests/ops/cpu/test_native_program.py says what is covered. Included by test_kernels.cpp inside
// its namespace.

const std::vector<int64_t> SAMPLE_ROWS = {1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 64, 127, 512};

// Many rows meet narrow weights, so that the reference in float64 stays cheap.
int64_t sample_n(int64_t m) { return m >= 64 ? any_of<int64_t>({5, 13, 45}) : any_of<int64_t>({1, 13, 45, 101}); }

void sample_linear(const std::vector<const Level*>& levels) {
    for (int codes : {INT8, E4M3, E5M2, TABLE4, TABLE2})
        for (bool zero : {false, true})
            for (bool grouped : {false, true})
                for (int type : {F32, BF16, F16})
                    for (int64_t m : SAMPLE_ROWS) {
                        const int64_t k = grouped ? any_of<int64_t>({200, 513, 640}) : any_of<int64_t>({1, 13, 200, 512, 1000});
                        const int64_t group = grouped ? any_of<int64_t>({7, 16, 32, 64, 96}) : -1, n = sample_n(m);
                        Example e = make(codes, n, k, group, zero, any_of({F32, BF16, F16}), false);
                        check_linear(levels, e, type, {m}, true, generator() % 2, generator() % 4 == 0);
                        if (m > 2) continue;
                        const int64_t picked[] = {n - 1, 0, static_cast<int64_t>(generator() % n)};
                        const Guarded rows(sizeof picked);
                        std::memcpy(rows.get(), picked, sizeof picked);
                        compute_exact(e);  // a poisoned one
                        for (const Level* level : levels) check_dequantize(*level, e, type, m == 1 ? rows.get<int64_t>() : nullptr, m == 1 ? 3 : n);
                    }
}

void sample_int8(const std::vector<const Level*>& levels) {
    for (int codes : {INT8, TABLE4, TABLE2})
        for (bool zero : {false, true})
            for (float given : {0.0f, 0.05f})
                for (int type : {F32, BF16, F16})
                    for (int64_t m : SAMPLE_ROWS) {
                        if (codes == INT8 && zero) continue;
                        const int64_t group = codes == INT8 ? -1 : any_of<int64_t>({-1, 16, 32, 48, 64, 96, 128, 256});
                        Example e = make(codes, sample_n(m), any_of<int64_t>({1, 13, 33, 200, 256, 513}), group, zero, any_of({F32, BF16}), false);
                        space_evenly(e);
                        check_int8(levels, e, type, {m}, true, generator() % 2, generator() % 4 == 0, given);
                    }
}

void sample_aqlm(const std::vector<const Level*>& levels) {
    for (int stored : {F32, BF16, F16})
        for (int64_t m : SAMPLE_ROWS) {
            const int64_t lines = any_of<int64_t>({1, 5, 13, 33}), groups = any_of<int64_t>({1, 2, 9, 33});
            const AqlmExample e = any_of({0, 1}) ? make_aqlm(any_of<int64_t>({1, 2}), any_of({5, 8}), 1, 8, lines, groups, stored)
                                                 : make_aqlm(any_of<int64_t>({1, 3}), any_of({1, 9}), any_of<int64_t>({1, 2}),
                                                             any_of<int64_t>({3, 8, 16}), lines, groups, stored);
            for (const Level* level : levels)
                for (int type : {F32, BF16, F16}) {
                    if (level->aqlm_linear) check_aqlm_linear(*level, e, type, m);
                    if (level->aqlm_dequantize && m == 1) check_aqlm_dequantize(*level, e, type);
                }
        }
}

void check_sample(const std::vector<const Level*>& levels) {
    sample_linear(levels);
    sample_int8(levels);
    sample_aqlm(levels);
    for (const Level* level : levels)
        for (int codes : {INT8, E4M3, E5M2, TABLE4, TABLE2})
            for (bool zero : {false, true})
                for (int type : {F32, BF16, F16})
                    for (int64_t m : {1, 7, 60})
                        check_experts(*level, codes, any_of<int64_t>({1, 5}), any_of<int64_t>({13, 45}), any_of<int64_t>({70, 200}),
                                      m, type, zero, generator() % 2);
}
