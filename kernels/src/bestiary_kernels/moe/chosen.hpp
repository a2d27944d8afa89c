// Choices in the order of their experts, and products of a few of an expert's tokens with lines of its weights: what
// all operations of experts share. Knows neither who chose nor what becomes of the numbers.
#pragma once
#include "../dot.hpp"

namespace {

// The choices of one expert: `count` from place `first` of the choices in the order of their experts.
struct Bucket {
    int64_t expert, first, count;
};

// The chosen experts' buckets, close together.
struct Buckets {
    Bucket* all;
    int64_t* order;  // the choices' numbers
    int64_t count;

    static size_t bytes(int64_t experts, int64_t choices) {
        return size_t(experts) * sizeof(Bucket) + size_t(choices) * sizeof(int64_t);
    }

    // `memory`: as many bytes; `chosen`: each choice's expert.
    static Buckets sorted(void* memory, int64_t experts, const int64_t* chosen, int64_t choices) {
        Bucket* const all = (Bucket*)memory;
        int64_t *const order = (int64_t*)(all + experts), count = 0;
        for (int64_t expert = 0; expert < experts; ++expert) all[expert] = {expert, 0, 0};
        for (int64_t i = 0; i < choices; ++i) ++all[chosen[i]].count;
        for (int64_t expert = 0, before = 0; expert < experts; before += all[expert++].count)
            all[expert].first = before;
        for (int64_t i = 0; i < choices; ++i) order[all[chosen[i]].first++] = i;
        for (int64_t expert = 0; expert < experts; ++expert) {
            all[expert].first -= all[expert].count;
            if (all[expert].count) all[count++] = all[expert];
        }
        return {all, order, count};
    }
};

// Whether each is an expert.
inline bool are_experts(const int64_t* chosen, int64_t choices, int64_t experts) {
    for (int64_t i = 0; i < choices; ++i)
        if (chosen[i] < 0 || chosen[i] >= experts) return false;
    return true;
}

template <class T> struct Lines {
    typedef Along<T> Inputs;
    // Tokens that go together, the lines of weights that the registers hold beside them, and lines of one item.
    static constexpr int TOKENS = MOST_TOGETHER, LINES = W == 16 ? 4 : 2, BLOCK = 16;
    static constexpr int64_t WORTH_SHARING = 65536;

    // to[token * stride + line] = from[token] . lines[line]. `next` is how far beyond them lie the lines that follow.
    // Inlined by decree: left to itself the compiler asks how much else there is to inline, and sums live in memory.
    template <int tokens>
    __attribute__((always_inline)) static inline void multiply(const T* const* from, const T* const* lines,
                                                               int64_t inputs, int64_t next, float* to,
                                                               int64_t stride) {
        Floats sum[tokens][LINES] = {};
        int64_t k = 0;
        const auto add = [&](auto take) __attribute__((always_inline)) {
            typename Inputs::Lanes w[LINES];
#pragma GCC unroll 4
            for (int line = 0; line < LINES; ++line) w[line] = take(lines[line] + k);
#pragma GCC unroll 8
            for (int token = 0; token < tokens; ++token) {
                const typename Inputs::Lanes v = take(from[token] + k);
#pragma GCC unroll 4
                for (int line = 0; line < LINES; ++line) sum[token][line] = Inputs::add(sum[token][line], v, w[line]);
            }
        };
        for (; k + Inputs::STEP <= inputs; k += Inputs::STEP) {
#pragma GCC unroll 4
            for (int line = 0; line < LINES; ++line) __builtin_prefetch(lines[line] + k + next);
            add([](const T* at) { return Inputs::take(at); });
        }
        if (const int rest = int(inputs - k)) add([=](const T* at) { return Inputs::take_part(at, rest); });
#pragma GCC unroll 8
        for (int token = 0; token < tokens; ++token, to += stride) {
            if constexpr (LINES == 4) {
                const Floats four = sums_of(sum[token][0], sum[token][1], sum[token][2], sum[token][3]);
                memcpy(to, &four, 4 * sizeof *to);
            } else {
                for (int line = 0; line < LINES; ++line) to[line] = sum_of(sum[token][line]);
            }
        }
    }

    // body(first place, count) for groups of nearly equal size; the compiler knows the count.
    template <class Body> static void by_groups(const Bucket& bucket, Body body) {
        const int64_t groups = (bucket.count + TOKENS - 1) / TOKENS;
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t begin = bucket.count * i / groups, end = bucket.count * (i + 1) / groups;
            with_known(end - begin, [&](auto known) { body(bucket.first + begin, known); });
        }
    }

    static Floats rounded(const float* from) {
        T whole[W];
        store(whole, load(from));
        return load(whole);
    }

    // said[token][line] = from[token] . weight[line] for a block of up to BLOCK lines; beyond them are zeros.
    template <int tokens>
    __attribute__((always_inline)) static inline void multiply_block(const T* const* from, const T* weight,
                                                                     int64_t inputs, int lines,
                                                                     float (*said)[BLOCK]) {
        if (lines < BLOCK) memset(said, 0, tokens * sizeof *said);
        for (int line = 0; line < lines; line += LINES) {
            const T* at[LINES];
            for (int i = 0; i < LINES; ++i) at[i] = weight + smaller(line + i, lines - 1) * inputs;
            multiply<tokens>(from, at, inputs, LINES * inputs, said[0] + line, BLOCK);
        }
    }
};

}  // namespace
