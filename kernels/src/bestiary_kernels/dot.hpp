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

}  // namespace
