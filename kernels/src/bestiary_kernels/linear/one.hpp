// The product of one row with weights that are made wide in registers only, to the bit what meet.hpp gives.
//
// A tile takes as long for one row as for sixteen, and while it multiplies nobody asks memory for more. Intel's
// Instruction Set Reference says how TDPBF16PS sums: over the sixteen steps of a tile the first and the second inputs
// apart, each fused, then both together, then with what the tiles before gave. So a row comes out alike in any company.
#pragma once

#include "walk.hpp"

namespace {

// A tile's, or so many that the inputs stay near as floats.
template <class T> constexpr int64_t STEPS_OF_SUMS = Meeting<T>::ADDS_APART ? 16 : 32;

// sums[64] += x[2 * steps] * weights; take(step, use) makes a step's weights wide, says use(c, first, second) of every
// vector c of W outputs and its two inputs, and asks for what comes after it. Floats since AMX's processors take four
// times as long for a product of pairs, where there is one.
template <class T, class Take> inline void multiply_one_row(const T* x, int64_t steps, Floats* sums, Take take) {
    constexpr bool apart = Meeting<T>::ADDS_APART;
    for (int64_t begin = 0, end; begin < steps; begin = end) {
        end = smaller(steps, begin + STEPS_OF_SUMS<T>);
        float inputs[2 * STEPS_OF_SUMS<T>];
        over_vectors(2 * (end - begin), [&](int64_t i, int n) {
            store_up_to(inputs + i, load_up_to(x + 2 * begin + i, n), n);
        });
        Floats first[VECTORS] = {}, second[VECTORS] = {};
        if (!apart)
            for (int c = 0; c < VECTORS; ++c) first[c] = sums[c];
        for (int64_t step = begin; step < end; ++step) {
            const float* const pair = inputs + 2 * (step - begin);
            take(step, [&](int c, Floats even, Floats odd) __attribute__((always_inline)) {
                first[c] += even * pair[0];
                (apart ? second : first)[c] += odd * pair[1];
            });
        }
        for (int c = 0; c < VECTORS; ++c) sums[c] = apart ? sums[c] + (first[c] + second[c]) : first[c];
    }
}

}  // namespace
