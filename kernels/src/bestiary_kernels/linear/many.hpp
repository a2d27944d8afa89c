// The product of many rows with a matrix of bfloat16 on AMX's tiles, from a source as in walk.hpp.
//
// An item is a part of the rows times a group of blocks of columns, whose weights the second cache holds for a long
// stretch of their inputs. Squares of 32 rows and columns go through it: as many loads as products. A thread's items
// follow one another group by group, so that it brings the same weights once.
#pragma once

#include "walk.hpp"

#if defined(__AMX_BF16__)

namespace {

template <class Source> struct ManyRows {
    static constexpr int64_t SQUARE = tiles::SQUARE;
    // Bytes of a group's weights, inputs of a stretch and rows of a part at most.
    static constexpr int64_t GROUP_BYTES = 1 << 20, MOST_INPUTS = 2048, PART_ROWS = 256;

    const Source& source;
    const bf16* x;
    int64_t x_stride;
    bf16* y;
    int64_t rows;
    int64_t outputs = source.call.outputs, inputs = source.call.inputs;
    int64_t blocks = (outputs + COLUMNS - 1) / COLUMNS, parts = (rows + PART_ROWS - 1) / PART_ROWS;
    int64_t stretches = (inputs + MOST_INPUTS - 1) / MOST_INPUTS;
    int64_t block_steps = start(1) + tiles::STEPS;  // the longest stretch's
    int64_t groups = count_groups();
    uint64_t number = next_number();

    // As many blocks as fit, but something for every thread.
    int64_t count_groups() const {
        const int64_t fit = GROUP_BYTES / (block_steps * Wide::BYTES), threads = omp_get_max_threads();
        const int64_t each = smaller(fit < 1 ? 1 : fit, (blocks * parts + threads - 1) / threads);
        return (blocks + each - 1) / each;
    }
    // Of the calls, so that a thread knows for which one it brought weights.
    static uint64_t next_number() {
        static uint64_t calls = 0;
        return __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    }

    // The first step of a stretch; each begins with a tile.
    int64_t start(int64_t stretch) const { return inputs / SQUARE * stretch / stretches * tiles::STEPS; }

    // Rows and columns from `first` to before `end`.
    struct Range {
        int64_t first, end;
    };

    // y of a square at row and column, of sums `stride` apart.
    void write(int64_t row, int64_t column, const float* sums, int64_t stride) const {
        const int n = int(smaller<int64_t>(SQUARE, outputs - column));
        const bf16* const bias = source.call.bias ? (const bf16*)source.call.bias + column : nullptr;
        const int low = smaller(n, W), high = n - low;
        const Floats first = bias ? load_up_to(bias, low) : Floats{};
        const Floats second = bias && high ? load_up_to(bias + W, high) : Floats{};
        bf16* to = y + row * outputs + column;
        for (int64_t r = 0; r < SQUARE; ++r, to += outputs, sums += stride) {
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)(load(sums + W) + second),
                                                              (__m512)(load(sums) + first));
            if (n < SQUARE)
                memcpy(to, &both, size_t(n) * sizeof *to);
            else
                _mm512_storeu_si512(to, both);
        }
    }

    // A thread's memory: sums of a square, or of all squares where another stretch follows; and the weights of a group.
    struct Space {
        int64_t stride;  // from a row of sums to the next
        float* sums;
        char* room;
        const char** weights;  // of each block
    };
    bool reserve(int64_t some_rows, int64_t some_blocks, Space& space) const {
        const bool keeps = stretches > 1;
        space.stride = keeps ? some_blocks * COLUMNS : SQUARE;
        const int64_t panels = keeps ? (some_rows + SQUARE - 1) / SQUARE : 1;
        const int64_t room = some_blocks * block_steps * Wide::BYTES, sums = panels * SQUARE * space.stride;
        space.room = (char*)scratch(size_t(room) + size_t(sums) * sizeof(float) + size_t(some_blocks) * sizeof(char*));
        space.sums = (float*)(space.room + room);
        space.weights = (const char**)(space.sums + sums);
        return space.room;
    }
    void bring(Range over, int64_t begin, int64_t end, Space& space) const {
        for (int64_t block = over.first; block < over.end; ++block) {
            const int64_t i = block - over.first;
            space.weights[i] =
                source.bring(block, begin, end, false, space.room + i * block_steps * Wide::BYTES).weights;
        }
    }

    // The rows of a panel with all columns that are near.
    void meet(int64_t row, Range over, int64_t begin, int64_t end, float* sums, const Space& space) const {
        const int64_t columns = smaller(over.end * COLUMNS, outputs) - over.first * COLUMNS;
        for (int64_t c = 0; c < columns; c += SQUARE) {
            float* const to = stretches == 1 ? sums : sums + c;
            tiles::multiply_square({(const char*)(x + row * x_stride + 2 * begin), x_stride * 2,
                                    space.weights[c / COLUMNS] + c % COLUMNS * 4, Wide::BYTES, (char*)to,
                                    space.stride * int64_t(sizeof *to)},
                                   end - begin, begin == 0);
            if (2 * end == inputs) write(row, over.first * COLUMNS + c, to, space.stride);
        }
    }

    // A last panel that would be cut begins earlier: its first rows come out the same twice.
    bool run(Range some, Range over, int64_t group) const {
        static __thread uint64_t held_number = 0;
        static __thread int64_t held_group = 0;
        Space space;
        if (!reserve(some.end - some.first, over.end - over.first, space)) return false;
        tiles::Shapes shapes;
        shapes.set(tiles::ROWS, tiles::STEPS);
        for (int64_t stretch = 0; stretch < stretches; ++stretch) {
            const int64_t begin = start(stretch), end = start(stretch + 1), last = some.end - SQUARE;
            if (stretches > 1 || held_number != number || held_group != group) bring(over, begin, end, space);
            held_number = number, held_group = group;
            float* sums = space.sums;
            for (int64_t row = some.first; row < some.end; row += SQUARE) {
                meet(smaller(row, last), over, begin, end, sums, space);
                if (stretches > 1) sums += SQUARE * space.stride;
            }
        }
        return true;
    }

    int run_all() const {
        int missed = 0;
        share(parts * groups, 1, true, [&](int64_t item) {
            const int64_t group = item / parts, part = item % parts;
            if (!run({rows * part / parts, rows * (part + 1) / parts},
                     {blocks * group / groups, blocks * (group + 1) / groups}, group))
                __atomic_store_n(&missed, 1, __ATOMIC_RELAXED);
        });
        return missed ? NO_MEMORY : OK;
    }
};

// x [rows, K] of any stride between rows and y [rows, N], dense; K in whole tiles, at least as many rows as a square has.
template <class Source>
inline int multiply_many(const Source& source, const void* x, void* y, int64_t rows, int64_t x_stride) {
    typedef ManyRows<Source> Many;
    if (rows < Many::SQUARE || source.call.inputs % Many::SQUARE) return BAD_ROW;
    return Many{source, (const bf16*)x, x_stride, (bf16*)y, rows}.run_all();
}

}  // namespace

#endif
