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

}  // namespace
