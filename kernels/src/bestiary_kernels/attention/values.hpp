// The weighted sums of V for one tile: values as they lie, or rows of floats that they were widened to.
#pragma once

#include "softmax.hpp"

namespace {

// Rows and vectors of sums that stay in registers: there are 32 vector registers on AVX-512, 16 elsewhere.
constexpr int VALUE_ROWS = 4, VALUE_VECTORS = W == 16 ? 4 : 2;

// How values become floats, a `step` of numbers at a time. Those of bfloat16 come as words of two: one operation takes
// the even ones out of W words, and one the odd. That leaves the sums of a step out of order until the end.
template <class T> struct Values {
    static constexpr int step = W;
    static void take(const T* from, int n, Floats* to) { to[0] = n < W ? load_part(from, n) : load(from); }
    static void put_in_order(float*, int64_t) {}
};

template <> struct Values<bf16> {
    static constexpr int step = 2 * W;
    static Words words(const bf16* from, int n) {
        if (n >= step) return read_as<Words>(from);
#if defined(__AVX512BW__)
        return (Words)_mm512_maskz_loadu_epi16((1u << n) - 1, from);
#else
        bf16 whole[step] = {};
        memcpy(whole, from, size_t(n) * sizeof(bf16));
        return read_as<Words>(whole);
#endif
    }
    static void take(const bf16* from, int n, Floats* to) {
        const Words both = words(from, n);
        to[0] = (Floats)(both << 16);
        to[1] = (Floats)(both & 0xffff0000u);
    }
    static void put_in_order(float* sums, int64_t padded) {
        const Ints low = (lanes() >> 1) + (lanes() & 1) * W, high = low + W / 2;
        for (; padded > 0; padded -= step, sums += step) {
            const Floats even = load(sums), odd = load(sums + W);
            store(sums, __builtin_shuffle(even, odd, low));
            store(sums + W, __builtin_shuffle(even, odd, high));
        }
    }
};

template <class T> int64_t padded_sums(int64_t width) {
    return (width + Values<T>::step - 1) / Values<T>::step * Values<T>::step;
}

// to[token][padded] of a chunk, as floats.
template <class T> void widen_all(const T* const* v_rows, int64_t width, int64_t padded, float* to) {
    constexpr int step = Values<T>::step;
    for (int t = 0; t < CHUNK; ++t)
        for (int64_t d = 0; d < padded; d += step, to += step) {
            Floats v[step / W];
            Values<T>::take(v_rows[t] + d, int(smaller<int64_t>(width - d, step)), v);
            for (int i = 0; i < step / W; ++i) store(to + i * W, v[i]);
        }
}

// One block of sums, whose values have n numbers left.
template <class T, int rows, int vectors, bool asks>
void weigh_block(const float* weights, const T* const* v_rows, Ahead<T>& to_come, int64_t d, int n, int tokens,
                 float* sums, int64_t padded) {
    constexpr int step = Values<T>::step;
    Floats held[rows][vectors];
    Ahead<T> ahead = to_come;
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < vectors; ++c) held[r][c] = load(sums + r * padded + d + c * W);
    for (int t = 0; t < tokens; ++t) {
        Floats v[vectors];
        if (asks) ahead.keep_up_with(d, vectors * W);
#pragma GCC unroll 4
        for (int c = 0; c < vectors * W; c += step) Values<T>::take(v_rows[t] + d + c, n - c, v + c / W);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < vectors; ++c) held[r][c] += v[c] * weights[r * CHUNK + t];
    }
    if (asks) to_come = ahead;
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < vectors; ++c) store(sums + r * padded + d + c * W, held[r][c]);
}

template <class T, int rows, bool asks>
void weigh_rows(const float* weights, const T* const* v_rows, Ahead<T>& ahead, int tokens, float* sums,
                int64_t width, int64_t padded) {
    constexpr int step = Values<T>::step, most = VALUE_VECTORS * W;
    int64_t d = 0;
    for (; d + most <= width; d += most)
        weigh_block<T, rows, VALUE_VECTORS, asks>(weights, v_rows, ahead, d, most, tokens, sums, padded);
    for (; d + step <= width; d += step)
        weigh_block<T, rows, step / W, asks>(weights, v_rows, ahead, d, step, tokens, sums, padded);
    if (d < width)
        weigh_block<T, rows, step / W, asks>(weights, v_rows, ahead, d, int(width - d), tokens, sums, padded);
}

// sums[row][padded] += weights[row][token] * v_rows[token][width]; where it asks, for what is ahead.
template <class T, bool asks>
void weigh_tile(int rows, const float* weights, const T* const* v_rows, Ahead<T>& ahead, int tokens, float* sums,
                int64_t width, int64_t padded) {
    for (bool first = asks; rows >= VALUE_ROWS; rows -= VALUE_ROWS, first = false) {
        if (first)
            weigh_rows<T, VALUE_ROWS, asks>(weights, v_rows, ahead, tokens, sums, width, padded);
        else
            weigh_rows<T, VALUE_ROWS, false>(weights, v_rows, ahead, tokens, sums, width, padded);
        weights += VALUE_ROWS * CHUNK;
        sums += VALUE_ROWS * padded;
    }
    switch (rows) {
        case 3: return weigh_rows<T, 3, asks>(weights, v_rows, ahead, tokens, sums, width, padded);
        case 2: return weigh_rows<T, 2, asks>(weights, v_rows, ahead, tokens, sums, width, padded);
        case 1: return weigh_rows<T, 1, asks>(weights, v_rows, ahead, tokens, sums, width, padded);
    }
}

// Rows meet the values of two keys at once, where the machine multiplies pairs: weights are rounded to bfloat16 first, as
// torch and FlashAttention do it. For many rows the pairs are joined once, for few as they are met: a row comes out the
// same to the bit, whatever its company, unless many are met on tiles, where few meet floats (`FewWeights`).
template <class T> struct Pairs {
    static void weigh_few(int, const float*, const T* const*, Ahead<T>&, int, float*, int64_t, int64_t) {}
    static void join_all(const T* const*, int64_t, int64_t, float*) {}
    static void weigh(int, float*, const float*, int, float*, int64_t) {}
};

#if defined(__AVX512BF16__)
template <> struct Pairs<bf16> {
    static constexpr int rows_held = 6;  // with four vectors of sums each and what they meet: 29 registers

    // Number by number the values of two keys, the first one's above, in the order of `Values`: a step of them.
    static void join(const bf16* first, const bf16* second, int n, Floats* to) {
        const Words a = Values<bf16>::words(first, n), b = Values<bf16>::words(second, n);
        to[0] = (Floats)((b & 0xffffu) | (a << 16));
        to[1] = (Floats)((b >> 16) | (a & 0xffff0000u));
    }
    // to[pair][padded] of a chunk.
    static void join_all(const bf16* const* v_rows, int64_t width, int64_t padded, float* to) {
        constexpr int step = Values<bf16>::step;
        for (int t = 0; t < CHUNK; t += 2)
            for (int64_t d = 0; d < padded; d += step, to += step) {
                Floats both[2];
                join(v_rows[t] + d, v_rows[t + 1] + d, int(smaller<int64_t>(width - d, step)), both);
                store(to, both[0]);
                store(to + W, both[1]);
            }
    }
    template <int rows, int vectors>
    static void block(const float* weights, const float* values, int pairs, float* sums, int64_t padded) {
        Floats held[rows][vectors];
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < vectors; ++c) held[r][c] = load(sums + r * padded + c * W);
        for (int p = 0; p < pairs; ++p, values += padded) {
            Floats v[vectors];
#pragma GCC unroll 4
            for (int c = 0; c < vectors; ++c) v[c] = load(values + c * W);
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < vectors; ++c)
                    held[r][c] = Dot<bf16>::multiply_add(v[c], weights[r * CHUNK + p], held[r][c]);
        }
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < vectors; ++c) store(sums + r * padded + c * W, held[r][c]);
    }
    // Values as they lie, of which n numbers are left, or `vectors` whole ones.
    template <int rows, int vectors, bool whole>
    static void block_few(const float* weights, const bf16* const* v_rows, Ahead<bf16>& to_come, int64_t d, int n,
                          int tokens, float* sums, int64_t padded) {
        constexpr int step = Values<bf16>::step;
        Floats held[rows][vectors];
        Ahead<bf16> ahead = to_come;
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < vectors; ++c) held[r][c] = load(sums + r * padded + c * W);
        for (int t = 0; t < tokens; t += 2) {
            Floats v[vectors];
            ahead.keep_up_with(d, vectors * W);
#pragma GCC unroll 2
            for (int c = 0; c < vectors * W; c += step)
                join(v_rows[t] + d + c, v_rows[t + 1] + d + c, whole ? step : n - c, v + c / W);
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < vectors; ++c)
                    held[r][c] = Dot<bf16>::multiply_add(v[c], weights[r * CHUNK + t / 2], held[r][c]);
            ahead.keep_up_with(d, vectors * W);
        }
        to_come = ahead;
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < vectors; ++c) store(sums + r * padded + c * W, held[r][c]);
    }
    // As `weigh`, straight from where the values lie; asks for what is ahead.
    static void weigh_few(int rows, const float* weights, const bf16* const* v_rows, Ahead<bf16>& ahead, int tokens,
                          float* sums, int64_t width, int64_t padded) {
        Ahead<bf16> nothing, *asking = &ahead;
        for (; rows > 0; rows -= rows_held, weights += rows_held * CHUNK, sums += rows_held * padded, asking = &nothing)
            with_known(smaller(rows, rows_held), [&](auto known) {
                constexpr int count = decltype(known)::rows;
                int64_t d = 0;
                for (; d + 4 * W <= width; d += 4 * W)
                    block_few<count, 4, true>(weights, v_rows, *asking, d, 0, tokens, sums + d, padded);
                for (; d + 2 * W <= width; d += 2 * W)
                    block_few<count, 2, true>(weights, v_rows, *asking, d, 0, tokens, sums + d, padded);
                if (d < width)
                    block_few<count, 2, false>(weights, v_rows, *asking, d, int(width - d), tokens, sums + d, padded);
            });
    }
    // sums[row][padded] += weights[row][token] * values[token][padded], of rounded weights and joined values.
#if defined(__AMX_BF16__)
    // Tokens that are none weigh nothing, and rows that are none are written beside the others.
    static void weigh(int rows, float* weights, const float* values, int, float* sums, int64_t padded) {
        const int64_t bytes = padded * int64_t(sizeof(float));
        for (int row = 0; row < rows; row += tiles::ROWS) {
            const auto over = [&](auto columns, int64_t d) {
                tiles::multiply<decltype(columns)::rows>({(const char*)(weights + row * CHUNK), CHUNK * sizeof(float),
                                                          (const char*)(values + d), bytes,
                                                          (char*)(sums + row * padded + d), bytes},
                                                         CHUNK / 2, false, [](int64_t) {});
            };
            int64_t d = 0;
            for (; d + 4 * W <= padded; d += 4 * W) over(Known<4>{}, d);
            if (d < padded) over(Known<2>{}, d);
        }
    }
#else
    static void weigh(int rows, float* weights, const float* values, int tokens, float* sums, int64_t padded) {
        const int pairs = (tokens + 1) / 2;
        for (; rows > 0; rows -= rows_held, weights += rows_held * CHUNK, sums += rows_held * padded)
            with_known(smaller(rows, rows_held), [&](auto known) {
                constexpr int count = decltype(known)::rows;
                int64_t d = 0;
                for (; d + 4 * W <= padded; d += 4 * W) block<count, 4>(weights, values + d, pairs, sums + d, padded);
                if (d < padded) block<count, 2>(weights, values + d, pairs, sums + d, padded);
            });
    }
#endif
};
#endif

}  // namespace
