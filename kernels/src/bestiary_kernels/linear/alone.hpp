// How few rows meet weights that are made wide in registers only, to the bit as they meet those that are near.
//
// A reader brings one step of a block after the other, and asks memory for what comes later: pairs(use) says
// use(c, pairs) of every vector c of W outputs, floats(use) says use(c, first, second). Groups of rows take turns over
// the same steps, each with a reader of its own (`multiply_alone` of walk.hpp).
#pragma once

#include "meet.hpp"

namespace {

// One row, as floats. A tile takes as long for one as for sixteen, and while it multiplies nobody asks memory for more.
// Intel's Instruction Set Reference says how TDPBF16PS sums: over the sixteen steps of a tile the first and the second
// inputs apart, each fused, then both together, then with what the tiles before gave.
template <class T> struct Alone {
    // Rows of a group, and of all groups that take their turns.
    static constexpr int GROUP_ROWS = 1, MOST_ROWS = 1;
    // Whether memory is asked for the second cache, and later for the first.
    static constexpr bool ASKS_TWICE = true;

    // to += x * weights, in `steps` steps of two inputs.
    template <class Reader, class To>
    static void add(Reader reader, const Rows<T>& rows, int64_t steps, const To& to) {
        constexpr bool apart = Meeting<T>::ADDS_APART;
        Floats sums[VECTORS];
        for (int c = 0; c < VECTORS; ++c) sums[c] = to.start(0, c);
        for (int64_t begin = 0, end; begin < steps; begin = end) {
            end = smaller(steps, begin + STEPS);
            float inputs[2 * STEPS];
            over_vectors(2 * (end - begin), [&](int64_t i, int n) {
                store_up_to(inputs + i, load_up_to(rows.x + 2 * begin + i, n), n);
            });
            Floats first[VECTORS] = {}, second[VECTORS] = {};
            if (!apart)
                for (int c = 0; c < VECTORS; ++c) first[c] = sums[c];
            for (int64_t step = begin; step < end; ++step) {
                const float* const pair = inputs + 2 * (step - begin);
                reader.floats([&](int c, Floats even, Floats odd) __attribute__((always_inline)) {
                    first[c] += even * pair[0];
                    (apart ? second : first)[c] += odd * pair[1];
                });
            }
            for (int c = 0; c < VECTORS; ++c) sums[c] = apart ? sums[c] + (first[c] + second[c]) : first[c];
        }
        for (int c = 0; c < VECTORS; ++c) to.finish(0, c, sums[c]);
    }

  private:
    // A tile's, or so many that the inputs stay near as floats.
    static constexpr int64_t STEPS = Meeting<T>::ADDS_APART ? PIECE_STEPS : 32;
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

// Groups whose sums the registers hold. To write wide weights and to read them again takes Zen 4, which does half a
// register at a time, longer than to make them wide for each of three groups.
template <> struct Alone<bf16> {
    static constexpr int GROUP_ROWS = TOGETHER_ROWS, MOST_ROWS = 3 * TOGETHER_ROWS;
    static constexpr bool ASKS_TWICE = false;

    template <class Reader, class To>
    static void add(const Reader& reader, const Rows<bf16>& rows, int64_t steps, const To& to) {
        add_pairs(reader, rows, steps, to);
    }
};

#endif

}  // namespace
