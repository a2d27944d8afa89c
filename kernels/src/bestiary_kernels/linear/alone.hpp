// How rows meet weights that are made wide in registers, to the bit as they meet those that are near.
//
// A reader brings one step of a block after the other: pairs(use) says use(c, pairs) of every vector c of W outputs,
// floats(use) says use(c, first, second). Groups of rows take turns over the same steps, each with a reader of its own
// (`multiply_alone` of walk.hpp), before each of which memory is asked for what comes later.
#pragma once

#include "meet.hpp"

namespace {

// Steps that groups of rows take turns over: the second cache holds them, wide, and what the next turn reads.
constexpr int64_t TURN_STEPS = 256;
// Rows of which each group makes the weights wide for itself: Zen 4, which writes half a register at a time, takes as
// long to write them wide and to read them twice.
constexpr int64_t MOST_EACH = 3 * TOGETHER_ROWS;

// A reader that asks memory, before each step, for what comes later.
template <class Reader, class Ask> struct Asking {
    Reader reader;
    Ask ask;
    template <class Use> __attribute__((always_inline)) void pairs(Use use) { ask(), reader.pairs(use); }
    template <class Use> __attribute__((always_inline)) void floats(Use use) { ask(), reader.floats(use); }
};
template <class Reader, class Ask> Asking(Reader, Ask) -> Asking<Reader, Ask>;

// Steps that are wide.
struct WideReader {
    const char* at;
    template <class Use> __attribute__((always_inline)) void pairs(Use use) {
        Wide::pairs(at, use);
        at += Wide::BYTES;
    }
};

// A reader that leaves behind, wide, what it read.
template <class Reader> struct Keeping {
    Reader reader;
    char* room;
    template <class Use> __attribute__((always_inline)) void pairs(Use use) {
        reader.pairs([&](int c, Words pairs) __attribute__((always_inline)) {
            use(c, pairs);
            memcpy(room + c * sizeof pairs, &pairs, sizeof pairs);
        });
        room += Wide::BYTES;
    }
};
template <class Reader> Keeping(Reader, char*) -> Keeping<Reader>;

// All of a step, for the second cache and later for the first.
template <class Source> struct AskTwice {
    const char* at;
    __attribute__((always_inline)) void operator()() {
        for (int line = 0; line < Source::STEP_BYTES; line += 64) {
            ask_once(at + Source::AHEAD + line);
            __builtin_prefetch(at + Source::NEAR + line);
        }
        at += Source::STEP_BYTES;
    }
};

// One row, as floats. A tile takes as long for one as for sixteen, and while it multiplies nobody asks memory for more.
// Intel's Instruction Set Reference says how TDPBF16PS sums: over the sixteen steps of a tile the first and the second
// inputs apart, each fused, then both together, then with what the tiles before gave.
template <class T> struct Alone {
    // Rows of a group, and of all groups that take their turns.
    static constexpr int GROUP_ROWS = 1, MOST_ROWS = 1;

    // What the reader of a group's turn, from these codes on, asks for; of how many steps and which of how many groups
    // it is matters only where they share.
    template <class Source> static AskTwice<Source> ask(const char* codes, int64_t, int64_t, int64_t) {
        return {codes};
    }

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

// Some bytes of each step, for the second cache; or all of them, where one group reads them.
template <class Source> struct AskShare {
    const char* at;
    int64_t bytes;
    __attribute__((always_inline)) void operator()() {
        if (bytes == Source::STEP_BYTES)
            for (int line = 0; line < Source::STEP_BYTES; line += 64) ask_once(at + line);
        else
            for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
        at += bytes;
    }
};

// Groups whose sums the registers hold.
template <> struct Alone<bf16> {
    static constexpr int GROUP_ROWS = TOGETHER_ROWS, MOST_ROWS = ::MOST_ROWS;

    // Of what the next turn reads each group asks for its share: were all asked for while the first group reads, memory
    // would rest during the turns of the others.
    template <class Source> static AskShare<Source> ask(const char* codes, int64_t steps, int64_t group, int64_t groups) {
        const int64_t bytes = (Source::STEP_BYTES + groups - 1) / groups;
        const int64_t far = groups == 1 ? Source::AHEAD : TURN_STEPS * Source::STEP_BYTES;
        return {codes + far + group * bytes * steps, bytes};
    }

    template <class Reader, class To>
    static void add(const Reader& reader, const Rows<bf16>& rows, int64_t steps, const To& to) {
        add_pairs(reader, rows, steps, to);
    }
};

#endif

}  // namespace
