// The arithmetic of one attention tile: K turned to lanes, scores, weights, weighted sum of V. Float32 after the load.
//
// A tile holds up to TILE query rows (query tokens x the heads of one KV group) and meets the keys CHUNK at a time.
// Keys are taken PAIR at a time and transposed, so that a lane is a key and a score needs no sum across lanes.
#pragma once

#include "../simd.hpp"

namespace {

constexpr int TILE = 32, CHUNK = 64, PAIR = 2 * W;
// Rows whose accumulators stay in registers: 32 vector registers on AVX-512, 16 elsewhere.
constexpr int SCORE_ROWS = W == 16 ? 8 : 4;
constexpr int VALUE_VECTORS = W == 16 ? 4 : 2;
constexpr int VALUE_ROWS = 4;

// How q meets k. A unit is what one lane multiplies at once: a float, or a pair of bfloat16 where the machine has it.
template <class T> struct Dot {
    static constexpr int per_unit = 1;
    static Floats load_units(const T* from) { return load(from); }
    static Floats load_units_part(const T* from, int n) { return load_part(from, n); }
    static float unit(const T* from, int) { return to_float(*from); }
    static Floats multiply_add(Floats k, float q, Floats sum) { return sum + k * q; }
};

#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
    static constexpr int per_unit = 2;
    static Floats load_units(const bf16* from) { return read_as<Floats>(from); }
    static Floats load_units_part(const bf16* from, int n) {
        bf16 whole[2 * W] = {};
        memcpy(whole, from, size_t(n) * sizeof(bf16));
        return read_as<Floats>(whole);
    }
    static float unit(const bf16* from, int n) {
        bf16 pair[2] = {};
        memcpy(pair, from, size_t(n) * sizeof(bf16));
        return read_as<float>(pair);
    }
    static Floats multiply_add(Floats k, float q, Floats sum) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)k, (__m512bh)splat_bits(q));
    }
    static Floats splat_bits(float q) { return (Floats)_mm512_set1_ps(q); }  // a copy, never arithmetic on the pair
};
#endif

// W x W transpose: log2(W) rounds of a perfect shuffle of the rows.
inline void transpose(Floats rows[W]) {
    const Ints low = (lanes() >> 1) + (lanes() & 1) * W, high = low + W / 2;
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        Floats shuffled[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; ++i) {
            shuffled[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
            shuffled[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = shuffled[i];
    }
}

// keys_units[unit][half][lane] of PAIR keys; the lanes of absent keys hold whatever their row pointer shows.
template <class T> SEPARATE void turn_keys(const T* const* k_rows, int64_t width, Floats* turned) {
    constexpr int step = W * Dot<T>::per_unit;
    for (int half = 0; half < 2; ++half) {
        for (int64_t d = 0; d < width; d += step) {
            Floats rows[W];
            const int n = int(smaller<int64_t>(step, width - d));
            if (n == step)
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) rows[i] = Dot<T>::load_units(k_rows[half * W + i] + d);
            else
                for (int i = 0; i < W; ++i) rows[i] = Dot<T>::load_units_part(k_rows[half * W + i] + d, n);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) turned[2 * (d / Dot<T>::per_unit + i) + half] = rows[i];
        }
    }
}

template <class T, int rows>
SEPARATE void score_rows(const float* q, int64_t q_stride, const Floats* turned, int64_t units, float scale,
                         float* scores) {
    Floats sums[rows][2] = {};
    for (int64_t u = 0; u < units; ++u) {
        const Floats k0 = turned[2 * u], k1 = turned[2 * u + 1];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            sums[r][0] = Dot<T>::multiply_add(k0, q[r * q_stride + u], sums[r][0]);
            sums[r][1] = Dot<T>::multiply_add(k1, q[r * q_stride + u], sums[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        store(scores + r * CHUNK, sums[r][0] * scale);
        store(scores + r * CHUNK + W, sums[r][1] * scale);
    }
}

template <class T>
void score_tile(int rows, const float* q, int64_t q_stride, const Floats* turned, int64_t units, float scale,
                float* scores) {
    for (int left = rows; left > 0;) {
        int taken = SCORE_ROWS;
        if (left >= SCORE_ROWS)
            score_rows<T, SCORE_ROWS>(q, q_stride, turned, units, scale, scores);
        else if (left >= 4)
            score_rows<T, 4>(q, q_stride, turned, units, scale, scores), taken = 4;
        else if (left == 3)
            score_rows<T, 3>(q, q_stride, turned, units, scale, scores), taken = 3;
        else if (left == 2)
            score_rows<T, 2>(q, q_stride, turned, units, scale, scores), taken = 2;
        else
            score_rows<T, 1>(q, q_stride, turned, units, scale, scores), taken = 1;
        left -= taken;
        q += taken * q_stride;
        scores += taken * CHUNK;
    }
}

template <class V, int rows, int vectors>
void weigh_block(const float* weights, const V* const* v_rows, int64_t d, int tokens, float* sums, int64_t width) {
    Floats held[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < vectors; ++c) held[r][c] = load(sums + r * width + d + c * W);
    for (int t = 0; t < tokens; ++t) {
        Floats v[vectors];
#pragma GCC unroll 4
        for (int c = 0; c < vectors; ++c) v[c] = load(v_rows[t] + d + c * W);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < vectors; ++c) held[r][c] += v[c] * weights[r * CHUNK + t];
    }
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < vectors; ++c) store(sums + r * width + d + c * W, held[r][c]);
}

template <class V, int rows>
void weigh_rows(const float* weights, const V* const* v_rows, int tokens, float* sums, int64_t width) {
    int64_t d = 0;
    for (; d + VALUE_VECTORS * W <= width; d += VALUE_VECTORS * W)
        weigh_block<V, rows, VALUE_VECTORS>(weights, v_rows, d, tokens, sums, width);
    for (; d < width; d += W) weigh_block<V, rows, 1>(weights, v_rows, d, tokens, sums, width);
}

// sums[row][width] += weights[row][token] * v_rows[token][width]; width is a multiple of W.
template <class V>
void weigh_tile(int rows, const float* weights, const V* const* v_rows, int tokens, float* sums, int64_t width) {
    int r = 0;
    for (; r + VALUE_ROWS <= rows; r += VALUE_ROWS)
        weigh_rows<V, VALUE_ROWS>(weights + r * CHUNK, v_rows, tokens, sums + r * width, width);
    weights += r * CHUNK;
    sums += r * width;
    switch (rows - r) {
        case 3: return weigh_rows<V, 3>(weights, v_rows, tokens, sums, width);
        case 2: return weigh_rows<V, 2>(weights, v_rows, tokens, sums, width);
        case 1: return weigh_rows<V, 1>(weights, v_rows, tokens, sums, width);
    }
}

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

// A head's ALiBi slope; its products with places are rounded as torch rounds them in the slopes' own type.
struct Slope {
    float value = 0;
    bool is_bf16 = false;

    Slope() = default;
    Slope(const void* slopes, int64_t head, bool is_bf16)
        : value(is_bf16 ? to_float(((const bf16*)slopes)[head]) : ((const float*)slopes)[head]), is_bf16(is_bf16) {}

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
    for (int t = W; t < CHUNK; t += W) top = larger(load(scores + t), top);
    const float chunk_top = largest_of(top);
    if (chunk_top > row.largest) {
        const Floats shrink = exp_of(splat(row.largest - chunk_top));
        for (int64_t d = 0; d < width; d += W) store(sums + d, load(sums + d) * shrink);
        row.total *= shrink;
        row.largest = chunk_top;
    }
    const float base = row.largest == nothing ? 0.0f : row.largest;
    for (int t = 0; t < CHUNK; t += W) {
        const Floats weight = exp_of(load(scores + t) - base);
        row.total += weight;
        store(scores + t, weight);
    }
}

}  // namespace
