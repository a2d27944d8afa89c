// Product of a few rows with a packed weight, and rows read back out of it.
//
// bfloat16: [ceil(N / 64)][K / 2][64][2], the layout that oneDNN's packing gives on AVX-512-bf16 machines; every step
// over K/2 reads 256 consecutive bytes, so each thread walks memory in one straight line.
// The same in twelve bits: squeezed.hpp, from which the near steps are made wide before they are met.
// float32: rows [N][K] as they are.
#include "squeezed.hpp"

namespace {

constexpr int COLUMNS = 64;

struct PackedCall {
    const void *weight, *bias;  // the bias has N elements of the weight's type, or is null
    int64_t outputs, inputs;
};

#if defined(__AVX512BF16__)

constexpr int VECTORS = COLUMNS / W;
// Rows that the registers hold beside a block's weights, and rows that one call takes.
constexpr int TOGETHER_ROWS = 6, MOST_ROWS = 64;
typedef Floats Sums[VECTORS];

// Steps of a block that are near while one group of rows after the other reads them, and what shall come meanwhile.
struct Near {
    const char* weights;
    const char* ahead;
};

// Where a block's weights come from: as they lie, in the second cache from the first group of rows on (128 KiB).
struct Packed {
    const PackedCall& call;
    static constexpr int AHEAD_BYTES = 256;  // that a step takes
    static constexpr bool ALWAYS_AHEAD = true;
    struct Room {};
    static int64_t near_steps(int64_t) { return 512; }
    Near bring(int64_t block, int64_t first, int64_t, Room&) const {
        const char* const at = (const char*)call.weight + (block * (call.inputs / 2) + first) * COLUMNS * 4;
        return {at, at + 4096};
    }
};

// Or made wide in a room in the first cache: a tile for few rows, where widening itself asks for what comes next; two
// for more, where it comes while the first group reads.
struct Squeezed {
    const SqueezedCall& call;
    squeezed::Tables tables{call.exponents};
    static constexpr int AHEAD_BYTES = squeezed::BYTES;
    static constexpr bool ALWAYS_AHEAD = false;
    static constexpr int64_t FEW_ROWS = 2 * TOGETHER_ROWS, MOST_STEPS = 2 * squeezed::TILE;
    struct alignas(64) Room {
        char weights[MOST_STEPS * COLUMNS * 4];
    };
    static int64_t near_steps(int64_t rows) { return rows <= FEW_ROWS ? squeezed::TILE : MOST_STEPS; }
    Near bring(int64_t block, int64_t first, int64_t end, Room& room) const {
        for (int64_t step = first, next; step < end; step = next) {
            next = smaller(end, (step / squeezed::TILE + 1) * squeezed::TILE);
            squeezed::widen(call, tables, block, step, next, room.weights + (step - first) * COLUMNS * 4);
        }
        return {room.weights, (const char*)call.codes + (block * call.steps() + end) * squeezed::BYTES};
    }
};

// sums[row][64] += x[row] * weights, in `steps` steps of two inputs.
template <int rows, int ahead_bytes, bool once>
inline void multiply_block(Near near, const bf16* x, int64_t x_stride, int64_t steps, Sums* sums) {
    Floats local[rows][VECTORS];
    memcpy(local, sums, sizeof local);
    for (int64_t step = 0; step < steps; ++step) {
        const char* const at = near.weights + step * COLUMNS * 4;
#pragma GCC unroll 4
        for (int line = 0; line < ahead_bytes; line += 64)
            __builtin_prefetch(near.ahead + step * ahead_bytes + line, 0, once ? 0 : 3);
        __m512bh w[VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c) w[c] = (__m512bh)read_as<Floats>(at + c * 64);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(read_as<int>(x + r * x_stride + 2 * step));
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) local[r][c] = (Floats)_mm512_dpbf16_ps((__m512)local[r][c], w[c], pair);
        }
    }
    memcpy(sums, local, sizeof local);
}

template <int ahead_bytes, bool once = false>
inline void multiply_group(int64_t rows, Near near, const bf16* x, int64_t x_stride, int64_t steps, Sums* sums) {
    switch (rows) {
        case 1: return multiply_block<1, ahead_bytes, once>(near, x, x_stride, steps, sums);
        case 2: return multiply_block<2, ahead_bytes, once>(near, x, x_stride, steps, sums);
        case 3: return multiply_block<3, ahead_bytes, once>(near, x, x_stride, steps, sums);
        case 4: return multiply_block<4, ahead_bytes, once>(near, x, x_stride, steps, sums);
        case 5: return multiply_block<5, ahead_bytes, once>(near, x, x_stride, steps, sums);
        case 6: return multiply_block<6, ahead_bytes, once>(near, x, x_stride, steps, sums);
    }
}

// All rows in groups of nearly equal size: each reads the weights that the one before has brought near.
template <class Source>
inline void multiply_groups(const Source& source, int64_t block, const bf16* x, int64_t x_stride, int64_t rows,
                            int64_t from, int64_t to, Sums* sums) {
    const int64_t groups = (rows + TOGETHER_ROWS - 1) / TOGETHER_ROWS, most = Source::near_steps(rows);
    typename Source::Room room;
    for (int64_t begin = from, end; begin < to; begin = end) {
        end = smaller(to, begin + most);
        const Near near = source.bring(block, begin, end, room);
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t first = rows * group / groups, some = rows * (group + 1) / groups - first;
            const bf16* const at = x + first * x_stride + 2 * begin;
            if (groups == 1)
                multiply_group<Source::AHEAD_BYTES, true>(some, near, at, x_stride, end - begin, sums + first);
            else if (group == 0 || Source::ALWAYS_AHEAD)
                multiply_group<Source::AHEAD_BYTES>(some, near, at, x_stride, end - begin, sums + first);
            else
                multiply_group<0>(some, near, at, x_stride, end - begin, sums + first);
        }
    }
}

template <class Call>
inline void write_block(const Call& call, int64_t block, const Sums* sums, int64_t rows, bf16* y) {
    const int64_t first = block * COLUMNS;
    for (int c = 0; c < VECTORS; ++c) {
        const int64_t column = first + c * W;
        const int n = int(smaller<int64_t>(W, call.outputs - column));
        if (n <= 0) return;
        Floats bias{};
        if (call.bias) bias = load_up_to((const bf16*)call.bias + column, n);
        for (int64_t r = 0; r < rows; ++r) store_up_to(y + r * call.outputs + column, sums[r][c] + bias, n);
    }
}

// The weight is one line of blocks x K/2 steps, cut evenly into pieces, a few for each thread, which take them in turns: a
// core that another program borrows delays one piece. A block that a cut divides is finished after the region.
template <class Source>
inline int multiply_packed(const Source& source, const bf16* x, int64_t x_stride, bf16* y, int64_t rows) {
    constexpr int most_threads = 256, pieces_each = 4;
    constexpr int64_t least_steps = 256;  // 64 KiB of weights
    const auto& call = source.call;
    const int64_t steps = call.inputs / 2, blocks = (call.outputs + COLUMNS - 1) / COLUMNS, total = steps * blocks;
    const int64_t threads = total * rows < 512 ? 1 : smaller(omp_get_max_threads(), most_threads);
    const int64_t pieces = threads == 1 ? 1 : smaller(pieces_each * threads, threads + total / least_steps);
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
                write_block(call, block, sums, rows, y);
            } else {
                edge_block[edge] = block;
                memcpy(edge_sums + edge++ * rows, sums, size_t(rows) * sizeof(Sums));
            }
            at += to - from;
        }
    };
    share(pieces, 1, pieces > 1, walk);
    for (int64_t i = 0; i < most_edges; ++i) {
        if (edge_block[i] < 0) continue;
        Sums* const sums = edge_sums + i * rows;
        for (int64_t j = i + 1; j < most_edges; ++j) {
            if (edge_block[j] != edge_block[i]) continue;
            for (int64_t r = 0; r < rows; ++r)
                for (int c = 0; c < VECTORS; ++c) sums[r][c] += edge_sums[j * rows + r][c];
            edge_block[j] = -1;
        }
        write_block(call, edge_block[i], sums, rows, y);
    }
    return OK;
}

#endif

// Four outputs at a time share the loads of x; a thread walks its outputs' weights in one straight line.
constexpr int TOGETHER = 4;

template <int rows>
inline void multiply_rows(const PackedCall& call, const float* x, int64_t x_stride, float* y, int64_t first,
                          int outputs) {
    const int64_t inputs = call.inputs;
    const float* weight[TOGETHER];
    for (int c = 0; c < TOGETHER; ++c)
        weight[c] = (const float*)call.weight + (first + (c < outputs ? c : 0)) * inputs;
    Floats sums[rows][TOGETHER] = {};
    const auto add = [&](int64_t k, int n) {
        Floats w[TOGETHER];
#pragma GCC unroll 4
        for (int c = 0; c < TOGETHER; ++c) w[c] = load_up_to(weight[c] + k, n);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Floats v = load_up_to(x + r * x_stride + k, n);
#pragma GCC unroll 4
            for (int c = 0; c < TOGETHER; ++c) sums[r][c] += v * w[c];
        }
    };
    int64_t k = 0;
    for (; k + W <= inputs; k += W) add(k, W);
    if (k < inputs) add(k, int(inputs - k));
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < outputs; ++c) {
            const float bias = call.bias ? ((const float*)call.bias)[first + c] : 0.0f;
            y[r * call.outputs + first + c] = sum_of(sums[r][c]) + bias;
        }
}

template <int rows> int multiply_all_rows(const PackedCall& call, const float* x, int64_t x_stride, float* y) {
    const int64_t groups = (call.outputs + TOGETHER - 1) / TOGETHER;
    share(groups, 16, call.outputs * call.inputs > 32768, [&](int64_t group) {
        const int64_t first = group * TOGETHER;
        multiply_rows<rows>(call, x, x_stride, y, first, int(smaller<int64_t>(TOGETHER, call.outputs - first)));
    });
    return OK;
}

}  // namespace

#if defined(__AVX512BF16__)

// x [rows, K] of any stride between rows and y [rows, N], dense; at most 64 rows.
EXPORT(int, linear_packed)(const PackedCall* call, const void* x, void* y, int64_t rows, int64_t x_stride) {
    if (rows < 0 || rows > MOST_ROWS) return BAD_ROW;
    return rows ? multiply_packed(Packed{*call}, (const bf16*)x, x_stride, (bf16*)y, rows) : OK;
}

// The same of a squeezed weight, to the bit, and of any number of rows: in passes of nearly equal size.
EXPORT(int, linear_squeezed)(const SqueezedCall* call, const void* x, void* y, int64_t rows, int64_t x_stride) {
    if (rows < 0) return BAD_ROW;
    const int64_t passes = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes, some = rows * (pass + 1) / passes - first;
        bf16* const to = (bf16*)y + first * call->outputs;
        const int status = multiply_packed(Squeezed{*call}, (const bf16*)x + first * x_stride, x_stride, to, some);
        if (status != OK) return status;
    }
    return OK;
}

#endif

// The same for float32, whose rows lie as they are.
EXPORT(int, linear_rows)(const PackedCall* call, const float* x, float* y, int64_t rows, int64_t x_stride) {
    switch (rows) {
        case 0: return OK;
        case 1: return multiply_all_rows<1>(*call, x, x_stride, y);
        case 2: return multiply_all_rows<2>(*call, x, x_stride, y);
        case 3: return multiply_all_rows<3>(*call, x, x_stride, y);
        case 4: return multiply_all_rows<4>(*call, x, x_stride, y);
        case 5: return multiply_all_rows<5>(*call, x, x_stride, y);
        case 6: return multiply_all_rows<6>(*call, x, x_stride, y);
    }
    return BAD_ROW;
}

// y [ids, K] gets the rows `ids` of a bfloat16 weight in the packed layout.
EXPORT(int, embedding_packed)(const PackedCall* call, const int64_t* ids, void* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= call->outputs) return BAD_ROW;
    const int64_t steps = call->inputs / 2;
    share(count, 1, count * steps > 4096, [&](int64_t i) {
        const uint32_t* const from =
            (const uint32_t*)call->weight + ids[i] / COLUMNS * steps * COLUMNS + ids[i] % COLUMNS;
        uint32_t* const to = (uint32_t*)y + i * steps;
        for (int64_t step = 0; step < steps; ++step) to[step] = from[step * COLUMNS];
    });
    return OK;
}
