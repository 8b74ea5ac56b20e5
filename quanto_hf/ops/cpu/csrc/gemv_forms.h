// Which of the kernels of gemv_blocks.h takes a call. Included inside the namespace of a level for x86.

// Numbers whose products and sums stay in the range of float32 before the scale brings them back, as NaN does not.
inline bool is_tame(const float* x, int64_t count) {
    const F limit = splat(1.0995116e12f);  // 2^40; the numbers of the kernels reach 2^31, x is multiplied with 2^28
    F wild = splat(0.0f);
    const auto look = [&](F v) { wild = select_less(masked(v, 0x7FFFFFFF), limit, wild, splat(1.0f)); };
    int64_t i = 0;
    for (; i + W <= count; i += W) look(load(x + i));
    if (i < count) look(loadn(x + i, count - i));
    return sum(wild) == 0.0f;
}

template <class Form, class Seg, int M>
inline void gemv_chunks(const Linear& a, const float* natural) {
    constexpr int64_t BLOCK = 64 * Form::PLANES, MOST = X_BYTES / (BLOCK * M * sizeof(float));
    const Weight& w = a.w;
    const int64_t blocks = w.k / BLOCK, columns = blocks * BLOCK, behind = w.k - columns;
    parallel(a.threads, [&](int thread, int of) {
        // each thread has its own: the caches pass a line that another core wrote no faster than it is made again
        OrderedX x;
        x.blocks = blocks, x.chunk = blocks < MOST ? blocks : MOST, x.natural = natural;
        x.x = static_cast<float*>(scratch(1, columns * M * sizeof(float)));
        x.sums = static_cast<float*>(scratch(3, columns * M / Seg::COLUMNS * W * sizeof(float)));
        x.rest = static_cast<float*>(scratch(2, behind * M * sizeof(float)));
        for (int64_t i = 0; i < behind * M; i++)
            x.rest[i] = i < behind * a.m ? natural[i / behind * w.k + columns + i % behind] : 0.0f;
        order_x<Form, Seg, M>(x, w.k, a.m);
        gemv_block_rows<Form, Seg, M>(a, x, share(w.n, 32, thread, of));
    });
}

template <class Form, class Seg>
inline void gemv_rows_of_x(const Linear& a, const float* natural) {
    static_assert(GEMV_ROWS <= 8, "rows of x are handled at once");
    if (a.m == 1) gemv_chunks<Form, Seg, 1>(a, natural);
    else if (a.m == 2) gemv_chunks<Form, Seg, 2>(a, natural);
    else if (a.m <= 4) gemv_chunks<Form, Seg, 4>(a, natural);
    else gemv_chunks<Form, Seg, 8>(a, natural);
}

// False if these kernels do not take the call.
template <int FORM>
inline bool gemv_form(const Linear& a) {
    using Form = Units<FORM>;
    const Weight& w = a.w;
    if ((w.zero && !Form::COUNTS) || w.k < 64 * Form::PLANES) return false;
    const bool whole = w.groups == 1 || w.group % 64 == 0;
    if (!whole && (w.group % 16 != 0 || is_half(FORM))) return false;
    const float* natural = x_as_float(a, 0);
    if (!is_tame(natural, a.m * w.k)) return false;
    if (whole) return gemv_rows_of_x<Form, Segment<64 / UNIT, false>>(a, natural), true;
    if constexpr (!is_half(FORM)) {
        if constexpr (UNIT == 32)
            if (w.group % 32 == 0) return gemv_rows_of_x<Form, Segment<1, false>>(a, natural), true;
        // lanes need columns that BYTE8 does not give them; the words of WORD8 take two operations more
        gemv_rows_of_x<Units<FORM == BYTE8 ? WORD8 : FORM>, Segment<1, true>>(a, natural);
    }
    return true;
}

inline bool gemv_blocks(const Linear& a) {
    switch (a.w.codes) {
        case INT8: return gemv_form<BYTE8>(a);
        case E4M3: return gemv_form<HALF_E4M3>(a);
        case E5M2: return gemv_form<HALF_E5M2>(a);
        case TABLE4: return evenly_spaced(a.w) ? gemv_form<COUNT4>(a) : gemv_form<LOOKED_UP>(a);
        default: return evenly_spaced(a.w) && gemv_form<COUNT2>(a);
    }
}
