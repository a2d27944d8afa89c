// From scores to weights: cap, biases, hidden keys and the running softmax of one row.
#pragma once

#include "scores.hpp"

namespace {

// A row's running softmax: the largest score so far, and per lane the sum of the weights relative to it.
struct Running {
    Floats total;
    float largest;
};

// tanh; near 0, where a quotient of exponentials would lose digits, our own least-squares fit of tanh(x) / x in x^2
// (relative error 2e-8 for |x| <= 1/2).
inline Floats tanh_of(Floats x) {
    const Floats square = x * x, size = x < 0.0f ? -x : x;
    Floats p = square * 1.721996e-2f - 5.303469e-2f;
    p = p * square + 1.3325712e-1f;
    p = p * square - 3.3333136e-1f;
    const Floats near = x + x * square * p, far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
    return size > 0.5f ? (x < 0.0f ? -far : far) : near;
}

// Softly holds scores between -cap and cap.
SEPARATE void cap_scores(float* scores, int count, float cap) {
    const float share_of = 1.0f / cap;
    for (int t = 0; t < count; t += W) store(scores + t, cap * tanh_of(load(scores + t) * share_of));
}

// One number of a table of either type.
inline float number_of(const void* table, int64_t at, bool is_bf16) {
    return is_bf16 ? to_float(((const bf16*)table)[at]) : ((const float*)table)[at];
}

// A head's ALiBi slope; its products with places are rounded as torch rounds them in the slopes' own type.
struct Slope {
    float value = 0;
    bool is_bf16 = false;

    Slope() = default;
    Slope(const void* slopes, int64_t head, bool is_bf16)
        : value(number_of(slopes, head, is_bf16)), is_bf16(is_bf16) {}

    static Floats rounded(Floats x) {
        bf16 halves[W];
        store(halves, x);
        return load(halves);
    }
    // No inlining, nor a sum in the same loop: fused with it, the product would not be rounded at all.
    SEPARATE void biases(int64_t first, int count, float* to) const {
        for (int t = 0; t < count; t += W) {
            const Floats places = __builtin_convertvector(lanes() + int32_t(first + t), Floats);
            store(to + t, is_bf16 ? rounded(value * rounded(places)) : value * places);
        }
    }
};

// Leaves nothing of the scores before `begin` and from `end` on.
SEPARATE void hide(float* scores, int begin, int end) {
    for (int t = 0; t < CHUNK; t += W) {
        const Ints place = lanes() + t;
        store(scores + t, (place >= begin) & (place < end) ? load(scores + t) : splat(-__builtin_inff()));
    }
}

// Turns a chunk of scores, of which those from `begin` to before `end` are seen, into weights and rescales what earlier
// chunks left. A row that has seen no key keeps its largest at -inf; measuring from 0 then keeps -inf - -inf out of the
// exponent.
SEPARATE void soften(float* scores, int begin, int end, Running& row, float* sums, int64_t width) {
    const float nothing = -__builtin_inff();
    if (begin >= end) {
        memset(scores, 0, CHUNK * sizeof(float));
        return;
    }
    if (begin > 0 || end < CHUNK) hide(scores, begin, end);
    Floats top = load(scores);
#pragma GCC unroll 4
    for (int t = W; t < CHUNK; t += W) top = larger(load(scores + t), top);
    const float chunk_top = largest_of(top);
    if (chunk_top > row.largest) {
        const Floats shrink = exp_of(splat(row.largest - chunk_top));
        for (int64_t d = 0; d < width; d += W) store(sums + d, load(sums + d) * shrink);
        row.total *= shrink;
        row.largest = chunk_top;
    }
    const float base = row.largest == nothing ? 0.0f : row.largest;
    Floats total = row.total;
#pragma GCC unroll 4
    for (int t = 0; t < CHUNK; t += W) {
        const Floats weight = exp_of(load(scores + t) - base);
        total += weight;
        store(scores + t, weight);
    }
    row.total = total;
}

}  // namespace
