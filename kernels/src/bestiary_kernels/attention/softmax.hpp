// From scores to weights: cap, biases, hidden keys and the running softmax of a tile's rows.
#pragma once

#include "scores.hpp"

namespace {

// The running softmax of a tile's rows: each one's largest score so far, and per lane the sum of weights relative to it.
struct Running {
    alignas(64) float largest[TILE];
    Floats total[TILE];
};

// Keys from `begin` to before `end`; none when they cross.
struct KeyRange {
    int64_t begin, end;
};

// How weights are written for those who meet values: as they are.
template <class T> struct Weights {
    static constexpr bool are_pairs = false;
    static Floats power(Floats x) { return power_of_two(x); }
    static void put(float* row, int t, Floats first, Floats second) {
        store(row + t, first);
        store(row + t + W, second);
    }
};

#if defined(__AVX512BF16__)
// As pairs of bfloat16, in the first half of their place: the machine multiplies those. Of eight bits that are kept a
// shorter polynomial knows enough: our own minimax fit of 2^r on [0, 1), relative error 3e-6.
template <> struct Weights<bf16> {
    static constexpr bool are_pairs = true;
    static Floats power(Floats x) {
        const Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Floats p = r * 1.3534166850e-2f + 5.2011460066e-2f;
        p = p * r + 2.4144275486e-1f;
        p = p * r + 6.9300383329e-1f;
        p = p * r + 1.0000026226f;
        return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
    }
    static void put(float* row, int t, Floats first, Floats second) {
        const __m512bh two = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        store(row + t / 2, (Floats)_mm512_rol_epi32((__m512i)two, 16));
    }
};
#endif

// How those of a few rows are written. Intel's cores take four times as long for a product of pairs as for one of floats,
// so that these are floats, rounded as pairs are: tokens that come by few rows shall be those that come by many.
#if defined(__AMX_BF16__)
template <class T> struct FewWeights : Weights<T> {};
template <> struct FewWeights<bf16> {
    static constexpr bool are_pairs = false;
    static Floats power(Floats x) { return Weights<bf16>::power(x); }
    static void put(float* row, int t, Floats first, Floats second) {
        store(row + t, rounded(first));
        store(row + t + W, rounded(second));
    }

  private:
    static Floats rounded(Floats x) {
        return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
    }
};
#else
template <class T> using FewWeights = Weights<T>;
#endif

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

// Softly holds scaled scores between -cap and cap.
SEPARATE void cap_scores(float* scores, int count, float scale, float cap) {
    const float share_of = scale / cap;
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

// tops[row] = the largest score of each row's chunk, of the keys that it sees: the range, counted from the chunk's first.
inline void find_tops(int rows, float* scores, const KeyRange* seen, int64_t first, int count, float* tops) {
    for (int row = 0; row < rows; ++row, scores += CHUNK) {
        const int64_t begin = seen[row].begin - first, end = smaller<int64_t>(seen[row].end - first, count);
        if (begin > 0 || end < CHUNK)
            hide(scores, int(smaller<int64_t>(begin < 0 ? 0 : begin, CHUNK)), int(end < 0 ? 0 : end));
        Floats top = load(scores);
#pragma GCC unroll 4
        for (int t = W; t < CHUNK; t += W) top = larger(load(scores + t), top);
        tops[row] = largest_of(top);
    }
}

// Turns a chunk of scores into weights and rescales what earlier chunks left; `scale` (above 0) is what the scores are
// still to be multiplied by. In passes over all rows, for in one row each step waits for the one before. A row that has
// seen no key keeps its largest at -inf; measuring from 0 then keeps -inf - -inf out of the exponent.
template <class Form>
SEPARATE void soften(int rows, float* scores, const KeyRange* seen, int64_t first, int count, float scale,
                     float* largest, Floats* running, float* sums, int64_t width) {
    constexpr float log2_e = 1.44269504f, nothing = -__builtin_inff();
    alignas(64) float tops[PART] = {}, bases[PART], shrinks[PART], grew[PART];
    find_tops(rows, scores, seen, first, count, tops);
    for (int row = 0; row < rows; row += W) {
        const Floats before = load(largest + row), now = larger(load(tops + row) * scale, before);
        const Floats base = (now == nothing ? 0.0f : now) * log2_e;
        store(largest + row, now);
        store(bases + row, base);
        store(shrinks + row, power_of_two(before * log2_e - base));
        store(grew + row, now > before ? splat(1.0f) : Floats{});
    }
    for (int row = 0; row < rows; ++row) {
        if (grew[row] == 0.0f) continue;
        for (int64_t d = row * width; d < (row + 1) * width; d += W) store(sums + d, load(sums + d) * shrinks[row]);
        running[row] *= shrinks[row];
    }
    const float factor = scale * log2_e;
    for (int row = 0; row < rows; ++row) {
        float* const of_row = scores + row * CHUNK;
        Floats total = running[row];
#pragma GCC unroll 2
        for (int t = 0; t < CHUNK; t += 2 * W) {
            const Floats first_weights = Form::power(load(of_row + t) * factor - bases[row]);
            const Floats second_weights = Form::power(load(of_row + t + W) * factor - bases[row]);
            total += first_weights;
            total += second_weights;
            Form::put(of_row, t, first_weights, second_weights);
        }
        running[row] = total;
    }
}

}  // namespace
