// The product of a few rows with a matrix of bfloat16 from a source: as it lies, or made wide when it is near.
//
// A matrix is a line of blocks of 64 outputs, in each the inputs two by two (a step). A source says how many steps shall
// be near at a time and brings them, has a reader for rows that meet them in registers, and settles what a sum means.
// Sums go through the inputs in their order, whatever the number of rows, and are cut where the threads' pieces are, so
// that a row comes out alike in any company. Rows of float32 meet the same weights. Included after activation/cpu.cpp,
// whose `activated` it uses.
#pragma once

#include "alone.hpp"

namespace {

// What a source says whose weights are what they stand for.
struct Unscaled {
    static int64_t end_of_scales(int64_t) { return INT64_MAX; }
    static GoOn to(Sums* sums, int64_t, int64_t) { return {sums}; }
    static Floats settled(const Sums& sums, int vector, int64_t) { return sums[vector]; }
};

// Rows in groups of nearly equal size: each in its turn meets some steps, or all where it is the only one. Of more rows
// than `MOST_EACH` the first group keeps for the others what it makes wide. Where a sum is scaled its parts are the same
// for any number of rows.
template <class Source, class T>
inline void multiply_alone(const Source& source, int64_t block, const T* x, int64_t x_stride, int64_t rows,
                           int64_t from, int64_t to, Sums* sums) {
    constexpr int64_t group_rows = Alone<T>::GROUP_ROWS;
    constexpr bool is_scaled = decltype(source.to(sums, block, from))::FROM_ZERO;
    constexpr bool may_keep = !Source::IS_WIDE && Source::ALONE_ROWS > MOST_EACH;
    const int64_t groups = (rows + group_rows - 1) / group_rows;
    const int64_t most = is_scaled ? Source::NEAR_STEPS : groups == 1 ? INT64_MAX / 2 : TURN_STEPS;
    alignas(64) char room[may_keep ? TURN_STEPS * Wide::BYTES : 64];
    for (int64_t begin = from, end; begin < to; begin = end) {
        end = smaller(to, smaller(begin + most, source.end_of_scales(begin)));
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t first = rows * group / groups, some = rows * (group + 1) / groups - first;
            const auto ask = Alone<T>::template ask<Source>(source.codes(block, begin), end - begin, group, groups);
            const auto meet = [&](auto reader) {
                Alone<T>::add(Asking{reader, ask}, {x + first * x_stride + 2 * begin, x_stride, some}, end - begin,
                              source.to(sums + first, block, begin));
            };
            const auto reader = source.reader(block, begin);
            if (!may_keep || rows <= MOST_EACH)
                meet(reader);
            else if constexpr (may_keep)
                group == 0 ? meet(Keeping{reader, room}) : meet(WideReader{room});
        }
    }
}

// Rows in groups of nearly equal size: the first meets the weights as they come near, the others while they are.
template <class Source, class T>
inline void multiply_near(const Source& source, int64_t block, const T* x, int64_t x_stride, int64_t rows,
                          int64_t from, int64_t to, Sums* sums) {
    constexpr int64_t group_rows = Meeting<T>::GROUP_ROWS;
    const int64_t groups = (rows + group_rows - 1) / group_rows;
    // A group alone has no end of near steps, where no sum is scaled: each piece takes the room of the one before.
    constexpr bool in_pieces = Meeting<T>::IN_PIECES && !decltype(source.to(sums, block, from))::FROM_ZERO;
    const int64_t most = in_pieces && groups == 1 ? INT64_MAX / 2 : Source::NEAR_STEPS;
    const int64_t piece = in_pieces ? PIECE_STEPS : most;
    alignas(64) char room[Source::IS_WIDE ? 64 : Source::NEAR_STEPS * Wide::BYTES];
    Meeting<T> meeting;
    const auto meet = [&](Near near, int64_t group, int64_t at, int64_t next, Turn turn) {
        const int64_t first = rows * group / groups, some = rows * (group + 1) / groups - first;
        meeting.template add<Source>(near, {x + first * x_stride + 2 * at, x_stride, some}, next - at, turn,
                                     source.to(sums + first, block, at));
    };
    for (int64_t begin = from, end; begin < to; begin = end) {
        end = smaller(to, smaller(begin + most, source.end_of_scales(begin)));
        Near all{};
        for (int64_t at = begin, next; at < end; at = next) {
            next = smaller(end, at + piece);
            char* const free = room + (groups > 1 ? at - begin : 0) * Wide::BYTES;
            const Near near = source.bring(block, at, next, free);
            if (at == begin) all = near;
            meet(near, 0, at, next, {true, at == begin, next == end});
        }
        for (int64_t group = 1; group < groups; ++group) meet(all, group, begin, end, {false, true, true});
    }
}

// All rows, at least one, as the source says for so many: in registers, or where the weights are near.
template <class Source, class T>
inline void multiply_groups(const Source& source, int64_t block, const T* x, int64_t x_stride, int64_t rows,
                            int64_t from, int64_t to, Sums* sums) {
    if constexpr (Source::ALONE_ROWS > 0)
        if (rows <= Source::ALONE_ROWS) return multiply_alone(source, block, x, x_stride, rows, from, to, sums);
    if constexpr (Source::ALONE_ROWS < MOST_ROWS)
        multiply_near(source, block, x, x_stride, rows, from, to, sums);
}

template <class Source, class T>
inline void write_block(const Source& source, int64_t block, const Sums* sums, int64_t rows, T* y) {
    const auto& call = source.call;
    const int64_t first = block * COLUMNS;
    for (int c = 0; c < VECTORS; ++c) {
        const int64_t column = first + c * W;
        const int n = int(smaller<int64_t>(W, call.outputs - column));
        if (n <= 0) return;
        Floats bias{};
        if (call.bias) bias = load_up_to((const T*)call.bias + column, n);
        for (int64_t r = 0; r < rows; ++r)
            store_up_to(y + r * call.outputs + column, source.settled(sums[r], c, column) + bias, n);
    }
}

// Of the sums of gate and up what two steps give: a product rounds.
template <int kind> inline Floats gated(Floats gate, Floats up) { return activated<kind>(rounded(gate)) * rounded(up); }

// A few for each thread: so many that one that is held up delays little, so few that cuts cost nothing that is felt.
inline int64_t pieces_of(int64_t steps) {
    constexpr int64_t least_steps = 256, worth_steps = 2048, most_each = 4, most_threads = 256;
    const int64_t threads = smaller<int64_t>(omp_get_max_threads(), most_threads);
    const int64_t each = smaller(1 + steps / (threads * worth_steps), most_each);
    return smaller(threads * each, 1 + steps / least_steps);
}

// The weight is one line of blocks x K/2 steps, cut evenly into pieces, a few for each thread: a core that another
// program borrows delays one piece. A block that a cut divides is finished after the loop.
template <class Source, class T>
inline int multiply_few(const Source& source, const T* x, int64_t x_stride, T* y, int64_t rows) {
    const auto& call = source.call;
    const int64_t steps = call.inputs / 2, blocks = (call.outputs + COLUMNS - 1) / COLUMNS, total = steps * blocks;
    const int64_t pieces = pieces_of(total);
    const int64_t most_edges = 2 * pieces;
    // Sums of the blocks that a cut divides, and those blocks' numbers.
    Sums* const edge_sums = (Sums*)scratch(size_t(most_edges * rows) * sizeof(Sums) + size_t(most_edges) * 8);
    if (!edge_sums) return NO_MEMORY;
    int64_t* const edge_block = (int64_t*)(edge_sums + most_edges * rows);
    for (int64_t i = 0; i < most_edges; ++i) edge_block[i] = -1;
    const auto walk = [&](int64_t piece) {
        Floats sums[MOST_ROWS][VECTORS];
        int64_t at = total * piece / pieces;
        const int64_t end = total * (piece + 1) / pieces;
        int64_t edge = 2 * piece;
        while (at < end) {
            const int64_t block = at / steps, from = at - block * steps, to = smaller(steps, from + end - at);
            memset(sums, 0, size_t(rows) * sizeof(Sums));
            multiply_groups(source, block, x, x_stride, rows, from, to, sums);
            if (to - from == steps) {
                write_block(source, block, sums, rows, y);
            } else {
                edge_block[edge] = block;
                memcpy(edge_sums + edge++ * rows, sums, size_t(rows) * sizeof(Sums));
            }
            at += to - from;
        }
    };
    share(pieces, 1, total * rows >= 512, walk);
    for (int64_t i = 0; i < most_edges; ++i) {
        if (edge_block[i] < 0) continue;
        Sums* const sums = edge_sums + i * rows;
        for (int64_t j = i + 1; j < most_edges; ++j) {
            if (edge_block[j] != edge_block[i]) continue;
            for (int64_t r = 0; r < rows; ++r)
                for (int c = 0; c < VECTORS; ++c) sums[r][c] += edge_sums[j * rows + r][c];
            edge_block[j] = -1;
        }
        write_block(source, edge_block[i], sums, rows, y);
    }
    return OK;
}

// Any number of rows, in passes of nearly equal size.
template <class Source, class T>
inline int multiply_any_rows(const Source& source, const T* x, int64_t x_stride, T* y, int64_t rows) {
    if (rows < 0) return BAD_ROW;
    const int64_t passes = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes, some = rows * (pass + 1) / passes - first;
        const int status = multiply_few(source, x + first * x_stride, x_stride, y + first * source.call.outputs, some);
        if (status != OK) return status;
    }
    return OK;
}

}  // namespace
