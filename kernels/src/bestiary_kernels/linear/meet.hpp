// How a group of rows meets some steps of a block of weights that are near: on AMX's tiles, in pairs, or as floats.
//
// A step has 64 outputs, of each the weights of two inputs side by side, in bfloat16. Sums go through the inputs in their
// order, whatever the number of rows.
#pragma once

#include "../dot.hpp"
#include "../tiles.hpp"

namespace {

constexpr int COLUMNS = 64, VECTORS = COLUMNS / W;
// Rows that the registers hold beside a block's weights, and rows that one call takes.
constexpr int TOGETHER_ROWS = 6, MOST_ROWS = 64;
// Steps that the first group of rows meets at a time where it does not wait for all that shall be near: a tile's.
constexpr int64_t PIECE_STEPS = 16;
typedef Floats Sums[VECTORS];

// Vectors of outputs that the registers hold sums of for so many rows.
constexpr int wide_for(int rows) { return W == 16 ? 4 : rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

// Steps of a block that are near while one group of rows after the other reads them, and what shall come meanwhile.
struct Near {
    const char* weights;
    const char* ahead;
};

// A step of such weights as it is; use(c, pairs) of every vector c of W outputs.
struct Wide {
    static constexpr int BYTES = 4 * COLUMNS;
    template <class Use> __attribute__((always_inline)) static void pairs(const char* at, Use use) {
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) use(c, read_as<Words>(at + c * sizeof(Words)));
    }
};

// What takes the weights of the two inputs as floats, of pairs.
template <class Use> inline auto of_pairs(Use use) {
    return [use](int c, Words pairs)
               __attribute__((always_inline)) { use(c, one_of<0>(pairs), one_of<1>(pairs)); };
}

// Rows of x, the first of them at x.
template <class T> struct Rows {
    const T* x;
    int64_t stride, count;
};

// Where a group's sums over some steps go: on with what the steps before gave, or to it after a scale for each output.
struct GoOn {
    static constexpr bool FROM_ZERO = false;
    Sums* sums;
    Floats start(int row, int c) const { return sums[row][c]; }
    void finish(int row, int c, Floats sum) const { sums[row][c] = sum; }
};
struct Scaled {
    static constexpr bool FROM_ZERO = true;
    Sums* sums;
    Floats scales[VECTORS];
    Floats start(int, int) const { return Floats{}; }
    void finish(int row, int c, Floats sum) const { sums[row][c] += sum * scales[c]; }
};

// Of a source's steps, whether the rows are the first that read them; and whether with these steps the turn of these
// rows begins, and whether it ends.
struct Turn {
    bool is_first, begins, ends;
};

// One input after the other, each weight a float in a register.
template <class T> class Meeting {
  public:
    static constexpr int GROUP_ROWS = TOGETHER_ROWS;
    static constexpr int64_t NEAR_STEPS = 32;  // 8 KiB, in the first cache beside the rows
    static constexpr bool IN_PIECES = false;   // whether the first group meets some steps before the others are near
    static constexpr bool ADDS_APART = false;  // whether the first and the second inputs have sums of their own

    // to += x * weights, in `steps` steps of two inputs.
    template <class Source, class To>
    void add(Near near, const Rows<T>& rows, int64_t steps, Turn turn, const To& to) {
        for (int64_t row = 0; row < rows.count; ++row)
            over_vectors(2 * steps, [&](int64_t i, int n) {
                store_up_to(inputs[row] + i, load_up_to(rows.x + row * rows.stride + i, n), n);
            });
        with_known(rows.count, [&](auto known) {
            if (turn.is_first)
                block<decltype(known)::rows, Source::STEP_BYTES>(near, steps, to);
            else
                block<decltype(known)::rows, 0>(near, steps, to);
        });
    }

  private:
    float inputs[GROUP_ROWS][2 * NEAR_STEPS];

    template <int rows, int ahead_bytes, class To> void block(Near near, int64_t steps, const To& to) const {
        constexpr int wide = wide_for(rows);
        for (int first = 0; first < VECTORS; first += wide) {
            Floats local[rows][wide];
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < wide; ++c) local[r][c] = to.start(r, first + c);
            for (int64_t step = 0; step < steps; ++step) {
                for (int line = 0; line < ahead_bytes && first == 0; line += 64)
                    ask_once(near.ahead + step * ahead_bytes + line);
                const char* const at = near.weights + step * Wide::BYTES + first * sizeof(Words);
                meet<0>(at, 2 * step, local);
                meet<1>(at, 2 * step + 1, local);
            }
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < wide; ++c) to.finish(r, first + c, local[r][c]);
        }
    }

    template <int which, int rows, int wide>
    __attribute__((always_inline)) void meet(const char* at, int64_t input, Floats (&sums)[rows][wide]) const {
        Floats w[wide];
#pragma GCC unroll 8
        for (int c = 0; c < wide; ++c) w[c] = one_of<which>(read_as<Words>(at + c * sizeof(Words)));
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < wide; ++c) sums[r][c] += w[c] * inputs[r][input];
    }
};

#if defined(__AMX_BF16__)

template <> class Meeting<bf16> {
  public:
    static constexpr int GROUP_ROWS = tiles::ROWS;
    static constexpr int64_t NEAR_STEPS = 512;  // 128 KiB, in the second cache from the first group of rows on
    static constexpr bool IN_PIECES = true, ADDS_APART = true;

    // A group's sums stay in the tiles from one step to the next, and few steps come near at a time: else the processor
    // would not make some wide while the tiles multiply others, and memory would rest meanwhile.
    template <class Source, class To>
    void add(Near near, const Rows<bf16>& rows, int64_t steps, Turn turn, const To& to) {
        const auto ahead = [&](int64_t step) {
            if (Source::ALWAYS_AHEAD && turn.is_first)
                for (int line = 0; line < Source::STEP_BYTES; line += 64)
                    ask_once(near.ahead + step * Source::STEP_BYTES + line);
        };
        const int64_t left = steps % tiles::STEPS;
        tiles::Operands of{(const char*)rows.x, rows.stride * 2, near.weights, Wide::BYTES, nullptr, sizeof(Sums)};
        if constexpr (To::FROM_ZERO) {
            alignas(64) Sums local[tiles::ROWS];
            of.sums = (char*)local;
            shapes.set(rows.count, left);
            tiles::multiply<VECTORS>(of, steps, true, ahead);
            for (int r = 0; r < rows.count; ++r)
                for (int c = 0; c < VECTORS; ++c) to.finish(r, c, local[r][c]);
        } else {
            char* const sums = (char*)to.sums;
            bool stand = !turn.begins;  // in the tiles, of the steps before
            if (stand && !shapes.are(rows.count, left)) {
                tiles::store_sums<VECTORS>(sums, sizeof(Sums));
                stand = false;
            }
            shapes.set(rows.count, left);
            if (!stand) tiles::load_sums<VECTORS>(sums, sizeof(Sums));
            tiles::add_products<VECTORS>(of, steps, ahead);
            if (turn.ends) tiles::store_sums<VECTORS>(sums, sizeof(Sums));
        }
    }

  private:
    tiles::Shapes shapes;
};

#elif defined(__AVX512BF16__)

// to += x * the weights that a reader brings, of up to six rows: pairs(use) says use(c, pairs) of a step, then the next.
template <class Reader, class To>
inline void add_pairs(Reader from, const Rows<bf16>& all, int64_t steps, const To& to) {
    with_known(all.count, [&](auto known) {
        constexpr int rows = decltype(known)::rows;
        Reader reader = from;
        const bf16* const x = all.x;
        const int64_t stride = all.stride;
        Floats local[rows][VECTORS];
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < VECTORS; ++c) local[r][c] = to.start(r, c);
        for (int64_t step = 0; step < steps; ++step) {
            __m512bh w[VECTORS];
            reader.pairs([&](int c, Words pairs) __attribute__((always_inline)) { w[c] = (__m512bh)pairs; });
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(read_as<int>(x + r * stride + 2 * step));
#pragma GCC unroll 4
                for (int c = 0; c < VECTORS; ++c)
                    local[r][c] = (Floats)_mm512_dpbf16_ps((__m512)local[r][c], w[c], pair);
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < VECTORS; ++c) to.finish(r, c, local[r][c]);
    });
}

#endif

}  // namespace
