// The product of many rows with a matrix of bfloat16 on AMX's tiles, from a source as in walk.hpp, and its activation.
//
// An item is a part of the rows times a group of blocks of columns, whose weights the second cache holds for a long
// stretch of their inputs. Squares of 32 rows and columns go through it: as many loads as products. A thread's items
// follow one another group by group, so that it brings the same weights once. Of what gates, gate and up are near
// together, so that neither goes to memory.
#pragma once

#include "walk.hpp"

#if defined(__AMX_BF16__)

namespace {

// `halves`: 1, or 2 where the first half of the outputs gates the second.
template <class Source, int halves> struct ManyRows {
    static constexpr int64_t SQUARE = tiles::SQUARE;
    // Bytes of a group's weights, inputs of a stretch and rows of a part at most.
    static constexpr int64_t GROUP_BYTES = 1 << 20, MOST_INPUTS = 2048, PART_ROWS = 256;

    const Source& source;
    const bf16* x;
    int64_t x_stride;
    bf16* y;
    int64_t rows;
    int kind;  // of activation
    int64_t width = source.call.outputs / halves, inputs = source.call.inputs;
    int64_t blocks = (width + COLUMNS - 1) / COLUMNS, parts = (rows + PART_ROWS - 1) / PART_ROWS;
    int64_t stretches = (inputs + MOST_INPUTS - 1) / MOST_INPUTS;
    int64_t block_steps = start(1) + tiles::STEPS;  // the longest stretch's
    uint64_t number = next_number();

    // So many that the blocks of each fit.
    int64_t least_groups() const {
        const int64_t fit = GROUP_BYTES / (halves * block_steps * Wide::BYTES);
        return fit < 1 ? blocks : (blocks + fit - 1) / fit;
    }
    // And that every thread has as many items.
    int64_t even_groups() const {
        const int64_t threads = omp_get_max_threads();
        const int64_t items = (parts * least_groups() + threads - 1) / threads * threads;
        return smaller(blocks, (items + parts - 1) / parts);
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

    // Of sums what a product and, if any, an activation after it give: both round.
    template <int kind> static Floats finished(const float* sums, int64_t half, const Floats (*bias)[2], int c) {
        const Floats value = load(sums + c * W) + bias[0][c];
        if constexpr (halves == 2) return gated<kind>(value, load(sums + half + c * W) + bias[1][c]);
        return kind == AS_IT_IS ? value : activated<kind>(rounded(value));
    }

    // y of a square at row and column, of sums `stride` apart.
    template <int kind> void write(int64_t row, int64_t column, const float* sums, int64_t stride) const {
        const int n = int(smaller<int64_t>(SQUARE, width - column)), low = smaller(n, W), high = n - low;
        Floats bias[halves][2] = {};
        for (int half = 0; half < halves && source.call.bias; ++half) {
            const bf16* const from = (const bf16*)source.call.bias + half * width + column;
            bias[half][0] = load_up_to(from, low);
            if (high) bias[half][1] = load_up_to(from + W, high);
        }
        bf16* to = y + row * width + column;
        for (int64_t r = 0; r < SQUARE; ++r, to += width, sums += stride) {
            const Floats first = finished<kind>(sums, stride / halves, bias, 0);
            const Floats second = finished<kind>(sums, stride / halves, bias, 1);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
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
        space.stride = halves * (keeps ? some_blocks * COLUMNS : SQUARE);
        const int64_t panels = keeps ? (some_rows + SQUARE - 1) / SQUARE : 1;
        const int64_t near = halves * some_blocks, room = near * block_steps * Wide::BYTES;
        const int64_t sums = panels * SQUARE * space.stride;
        const size_t bytes = size_t(room) + size_t(sums) * sizeof(float) + size_t(near) * sizeof(char*);
        space.room = (char*)scratch<Whose::PART>(bytes);
        space.sums = (float*)(space.room + room);
        space.weights = (const char**)(space.sums + sums);
        return space.room;
    }
    void bring(Range over, int64_t begin, int64_t end, Space& space) const {
        const int64_t each = over.end - over.first;
        for (int64_t i = 0; i < halves * each; ++i) {
            const int64_t block = over.first + i % each + i / each * blocks;
            space.weights[i] = source.bring(block, begin, end, space.room + i * block_steps * Wide::BYTES).weights;
        }
    }

    // The rows of a panel with all columns that are near.
    void meet(int64_t row, Range over, int64_t begin, int64_t end, float* sums, const Space& space) const {
        const int64_t each = over.end - over.first, columns = smaller(over.end * COLUMNS, width) - over.first * COLUMNS;
        for (int64_t c = 0; c < columns; c += SQUARE) {
            float* const to = stretches == 1 ? sums : sums + c;
            for (int64_t half = 0; half < halves; ++half)
                tiles::multiply_square({(const char*)(x + row * x_stride + 2 * begin), x_stride * 2,
                                        space.weights[half * each + c / COLUMNS] + c % COLUMNS * 4, Wide::BYTES,
                                        (char*)(to + half * space.stride / halves),
                                        space.stride * int64_t(sizeof *to)},
                                       end - begin, begin == 0);
            if (2 * end == inputs)
                of_kind(kind, [&](auto of) { write<of.KIND>(row, over.first * COLUMNS + c, to, space.stride); });
        }
    }

    // One item; false without memory. A last panel that would be cut begins earlier: its first rows come out twice.
    bool run(int64_t part, int64_t group, int64_t groups) const {
        const Range some{rows * part / parts, rows * (part + 1) / parts};
        const Range over{blocks * group / groups, blocks * (group + 1) / groups};
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
        const int64_t groups = even_groups();
        share(parts * groups, 1, true, [&](int64_t item) {
            if (!run(item % parts, item / parts, groups)) __atomic_store_n(&missed, 1, __ATOMIC_RELAXED);
        });
        return missed ? NO_MEMORY : OK;
    }
};

// x [rows, K] of any stride between rows and y [rows, N], dense; K in whole tiles, at least as many rows as a square has.
// With `gated` y is [rows, N / 2], of whole blocks.
template <class Source>
inline int multiply_many(const Source& source, const void* x, void* y, int64_t rows, int64_t x_stride, int kind,
                         int gated) {
    if (rows < tiles::SQUARE || source.call.inputs % tiles::SQUARE) return BAD_ROW;
    if (!gated) return ManyRows<Source, 1>{source, (const bf16*)x, x_stride, (bf16*)y, rows, kind}.run_all();
    if (source.call.outputs % (2 * COLUMNS)) return BAD_PARTS;
    return ManyRows<Source, 2>{source, (const bf16*)x, x_stride, (bf16*)y, rows, kind}.run_all();
}

}  // namespace

#endif
