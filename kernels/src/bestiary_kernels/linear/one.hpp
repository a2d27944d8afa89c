// The product of one row with weights that are made wide in registers only. Adds up as AMX's tiles do.
//
// A tile takes as long for one row as for sixteen, and while it multiplies nobody asks memory for more. Intel's
// Instruction Set Reference says how TDPBF16PS sums: over the sixteen steps of a tile the first and the second inputs
// apart, each fused, then both together, then with what the tiles before gave. So a row comes out alike in any company.
#pragma once

#include "walk.hpp"

#if defined(__AMX_BF16__)

namespace {

// sums[64] += x[2 * steps] * weights; take(step, w) makes a step's weights wide and asks for what comes after it. Floats
// since the processor takes four times as long for a product of pairs.
template <class Take> inline void multiply_one_row(const bf16* x, int64_t steps, Floats* sums, Take take) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    for (int64_t begin = 0, end; begin < steps; begin = end) {
        end = smaller<int64_t>(steps, begin + tiles::STEPS);
        float inputs[2 * tiles::STEPS];
        over_vectors(2 * (end - begin), [&](int64_t i, int n) { store(inputs + i, load_up_to(x + 2 * begin + i, n)); });
        Floats first[VECTORS] = {}, second[VECTORS] = {};
        for (int64_t step = begin; step < end; ++step) {
            __m512i w[VECTORS];
            take(step, w);
            const float* const pair = inputs + 2 * (step - begin);
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) {
                first[c] += (Floats)_mm512_slli_epi32(w[c], 16) * pair[0];
                second[c] += (Floats)_mm512_and_si512(w[c], upper) * pair[1];
            }
        }
        for (int c = 0; c < VECTORS; ++c) sums[c] += first[c] + second[c];
    }
}

}  // namespace

#endif
