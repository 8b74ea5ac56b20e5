// Every kind of weight with every group, zero and length of a row, and widths in turn. Included by test_kernels.cpp
// inside its namespace.

void check_all_linear(const std::vector<const Level*>& levels, bool small) {
    const std::vector<int64_t> rows_of_x = small ? std::vector<int64_t>{1, 7, 9, 33} : GRID_ROWS;
    const int64_t GROUPS[] = {-1, 32, 64, 96, 16, 7};
    const int64_t K_VALUES[] = {1, 13, 200, 512, 640, 1000};
    const int64_t N_VALUES[] = {1, 13, 200, 512, 640, 1000}, N_SMALL[] = {1, 13, 45, 101};
    int turn = 0;
    for (int codes : {INT8, E4M3, E5M2, TABLE4, TABLE2})
        for (int64_t group : GROUPS)
            for (bool zero : {false, true})
                for (int64_t k : K_VALUES) {
                    turn++;
                    if (small && (turn + group + 1) % 3 == 0) continue;  // every k and every group stays
                    // Wide shapes in turn, so that every width meets every kind of weight, and few are both wide and long.
                    const int64_t n = small ? N_SMALL[turn % 4] : k >= 512 && turn % 7 ? N_SMALL[turn % 4] : N_VALUES[turn % 6];
                    Example e = make(codes, n, k, group, zero, turn % 4 == 3 ? F16 : turn % 2 ? BF16 : F32, false);
                    std::vector<int64_t> picked;
                    for (int i = 0; i < 5; i++) picked.push_back(generator() % n);
                    Guarded rows(picked.size() * sizeof(int64_t));
                    std::memcpy(rows.get(), picked.data(), rows.size());
                    for (const Level* level : levels)
                        for (int out_type : {F32, BF16, F16}) {
                            check_dequantize(*level, e, out_type, rows.get<int64_t>(), static_cast<int64_t>(picked.size()));
                            if (n <= 200) check_dequantize(*level, e, out_type, nullptr, n);
                        }
                    for (int x_type : {F32, BF16, F16}) {
                        if (small && x_type != BF16 && turn % 2) continue;
                        check_linear(levels, e, x_type, rows_of_x, small, turn % 2, false);
                    }
                    if (k == 200 || k == 13)
                        for (int x_type : {F32, BF16, F16}) {
                            Example other = make(codes, n, k, group, zero, F32, false);
                            check_linear(levels, other, x_type, {1, 7, 9, 33}, true, turn % 2, true);
                        }
                }
    for (int codes : {INT8, E4M3, E5M2}) {  // each of the 256 codes, NaN and infinities among them
        Example e = make(codes, 64, 333, -1, false, F32, true);
        for (const Level* level : levels)
            for (int out_type : {F32, BF16, F16}) check_dequantize(*level, e, out_type, nullptr, 64);
    }
}

void check_all_experts(const std::vector<const Level*>& levels, bool small) {
    for (const Level* level : levels)
        for (int x_type : {F32, BF16, F16})
            for (int codes : {INT8, TABLE4})
                for (int64_t m : {1, 7, 60, 1300})  // the last one: more rows of an expert than are copied at a time
                    for (bool sorted : {false, true}) {
                        if (small && m > 100 && (x_type != BF16 || codes == INT8)) continue;
                        check_experts(*level, codes, m > 100 ? 2 : 5, 45, 200, m, x_type, codes == TABLE4, sorted);
                        check_experts(*level, codes, 1, 13, 70, m, x_type, codes == TABLE4, sorted);
                    }
}

// Sums of nothing, and nothing to do.
void check_empty(const std::vector<const Level*>& levels) {
    for (int64_t k : {0, 5})
        for (int64_t m : {0, 3, 12})
            for (int64_t n : {0, 5})
                for (int codes : {INT8, TABLE4})
                    for (int x_type : {F32, BF16}) {
                        Example e = make(codes, n, k, -1, false, F32, false);
                        Guarded x(m * k * size_of(x_type)), out(m * n * size_of(x_type));
                        for (int64_t i = 0; i < m * k; i++) write(x.get(), i, x_type, 0);
                        for (const Level* level : levels) {
                            level->linear({e.w, x.get(), nullptr, out.get(), m, x_type, 2});
                            checks++;
                            for (int64_t i = 0; i < m * n; i++)
                                if (read(out.get(), i, x_type) != 0) {
                                    fail("%s linear %s m=%lld: an empty sum is not 0", level->name, e.name.c_str(),
                                         static_cast<long long>(m));
                                    break;
                                }
                        }
                    }
}
