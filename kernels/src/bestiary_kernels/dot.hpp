// How two rows meet along their inputs, a step of lanes at a time: what every product of dot products shares.
#pragma once
#include "simd.hpp"

namespace {

template <class T> struct Along {
    typedef Floats Lanes;
    static constexpr int STEP = W;
    static Lanes take(const T* from) { return load(from); }
    static Lanes take_part(const T* from, int n) { return load_part(from, n); }
    static Floats add(Floats sum, Lanes a, Lanes b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <> struct Along<bf16> {
    typedef __m512bh Lanes;
    static constexpr int STEP = 2 * W;
    static Lanes take(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static Lanes take_part(const bf16* from, int n) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, from); }
    static Floats add(Floats sum, Lanes a, Lanes b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

// A number of rows that the compiler knows.
template <int n> struct Known {
    static constexpr int rows = n;
};

// Rows whose sums the registers hold beside a few lines of weights.
constexpr int MOST_TOGETHER = 6;

template <class Body> inline void with_known(int64_t rows, Body body) {
    switch (rows) {
        case 1: return body(Known<1>{});
        case 2: return body(Known<2>{});
        case 3: return body(Known<3>{});
        case 4: return body(Known<4>{});
        case 5: return body(Known<5>{});
        case 6: return body(Known<6>{});
    }
}

// Of every four lanes the two from `from` on, of a vector and of a second one: in turns, or one vector after the other.
inline Ints pairs_of(int from, bool in_turns) {
    Ints index{};
    for (int i = 0; i < W; ++i) {
        const int place = i % 4, second = in_turns ? place % 2 : place / 2;
        index[i] = i - place + from + (in_turns ? place / 2 : place % 2) + second * W;
    }
    return index;
}

// Of every four lanes the sum in four vectors, one after another in those lanes.
inline Floats sums_of_fours(Floats a, Floats b, Floats c, Floats d) {
    const Floats ab = __builtin_shuffle(a, b, pairs_of(0, true)) + __builtin_shuffle(a, b, pairs_of(2, true));
    const Floats cd = __builtin_shuffle(c, d, pairs_of(0, true)) + __builtin_shuffle(c, d, pairs_of(2, true));
    return __builtin_shuffle(ab, cd, pairs_of(0, false)) + __builtin_shuffle(ab, cd, pairs_of(2, false));
}

// The sums of four vectors, in the first four lanes: together they cost little more than one.
inline Floats sums_of(Floats a, Floats b, Floats c, Floats d) {
    Floats all = sums_of_fours(a, b, c, d);
    for (int step = W / 2; step >= 4; step /= 2) all += __builtin_shuffle(all, lanes() ^ step);
    return all;
}

}  // namespace
