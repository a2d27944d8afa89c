// Low-rank adapters beside a product: y += (x down^T) up, each row with the adapter of its slot.
//
// One parallel region of two passes: first every row's inner numbers, then the columns of y. Rows of one slot go together
// wherever they stand and share the loads of its adapter; rows without a slot are never looked at.
#include "../dot.hpp"

namespace {

struct LoraCall {
    int64_t rows, columns, inputs, slots, parts, most_rank;
    int64_t y_stride, x_stride;  // elements from one row to the next
};

struct LoraTables {
    const int32_t *slots, *ranks, *starts;
};

// Rows that go together: `count` from place `first` of the rows in the order of their slots. The slot's groups are
// `fellows` from number `eldest` on.
struct LoraGroup {
    int32_t first, count, slot, eldest, fellows;
};

template <class T> struct Lora {
    typedef Along<T> Inputs;
    // Rows that go together, and what the registers hold beside them: ranks in the first pass, vectors in the second.
    static constexpr int ROWS = MOST_TOGETHER, WIDE = W == 16 ? 4 : 2;
    // Columns that one thread takes at a time, and how far ahead a rank's columns are asked for.
    static constexpr int64_t PIECE = 512, AHEAD = 512 / sizeof(T);
    // Multiplications below which a region costs more than it gains.
    static constexpr int64_t WORTH_SHARING = 65536;

    const LoraCall& call;
    const LoraTables& tables;
    const T *x, *down, *up;
    T* y;
    LoraGroup* groups = nullptr;
    float* inner = nullptr;    // [rows in the order of their slots, parts, most_rank]
    int32_t* order = nullptr;  // those rows' numbers
    int64_t count = 0, work = 0;

    int64_t rank(int64_t slot, int64_t part) const { return tables.ranks[slot * call.parts + part]; }
    int64_t inner_stride() const { return call.parts * call.most_rank; }
    float* inner_of(int64_t place, int64_t part) const {
        return inner + place * inner_stride() + part * call.most_rank;
    }

    // The last inputs, fewer than a step.
    SEPARATE static Floats last_of(Floats sum, const T* a, const T* b, int n) {
        return Inputs::add(sum, Inputs::take_part(a, n), Inputs::take_part(b, n));
    }

    // to[row][0 .. ranks] = x[row] . at[0 .. ranks]
    template <int rows> void shrink(const int32_t* numbers, const T* at, float* to, int ranks) const {
        const T *from[rows], *weight[WIDE];
        for (int row = 0; row < rows; ++row) from[row] = x + numbers[row] * call.x_stride;
        for (int r = 0; r < WIDE; ++r) weight[r] = at + (r < ranks ? r : 0) * call.inputs;
        Floats sums[rows][WIDE] = {};
        int64_t k = 0;
        for (; k + Inputs::STEP <= call.inputs; k += Inputs::STEP) {
            typename Inputs::Lanes w[WIDE];
#pragma GCC unroll 4
            for (int r = 0; r < WIDE; ++r) w[r] = Inputs::take(weight[r] + k);
#pragma GCC unroll 8
            for (int row = 0; row < rows; ++row) {
                const typename Inputs::Lanes v = Inputs::take(from[row] + k);
#pragma GCC unroll 4
                for (int r = 0; r < WIDE; ++r) sums[row][r] = Inputs::add(sums[row][r], v, w[r]);
            }
        }
        const int rest = int(call.inputs - k);
        for (int row = 0; row < rows; ++row)
            for (int r = 0; r < ranks; ++r) {
                const Floats sum = rest ? last_of(sums[row][r], from[row] + k, weight[r] + k, rest) : sums[row][r];
                to[row * inner_stride() + r] = sum_of(sum);
            }
    }

    // Some ranks of one part for one group; for ranks that the part does not have there is nothing to do.
    void shrink_item(int64_t item, int64_t blocks) const {
        const LoraGroup& group = groups[item / (call.parts * blocks)];
        const int64_t part = item / blocks % call.parts, first = item % blocks * WIDE;
        const int ranks = int(smaller<int64_t>(WIDE, rank(group.slot, part) - first));
        if (ranks <= 0) return;
        const T* const at = down + ((group.slot * call.parts + part) * call.most_rank + first) * call.inputs;
        float* const to = inner_of(group.first, part) + first;
        with_known(group.count, [&](auto known) { shrink<decltype(known)::rows>(order + group.first, at, to, ranks); });
    }

    // The first wide * W columns of each row += from[row] . at
    template <int rows, int wide>
    void expand_tile(const float* from, const T* at, T* const* to, int64_t column, int64_t ranks) const {
        Floats sums[rows][wide] = {};
        at += column;
        for (int64_t r = 0; r < ranks; ++r, at += call.columns) {
            // The ranks are more lines of memory, each in a page of its own, than a machine foresees.
            for (int line = 0; line < wide * W; line += 64 / sizeof(T)) __builtin_prefetch(at + AHEAD + line);
            Floats w[wide];
#pragma GCC unroll 4
            for (int c = 0; c < wide; ++c) w[c] = load(at + c * W);
#pragma GCC unroll 8
            for (int row = 0; row < rows; ++row) {
                const Floats v = splat(from[row * inner_stride() + r]);
#pragma GCC unroll 4
                for (int c = 0; c < wide; ++c) sums[row][c] += v * w[c];
            }
        }
        for (int row = 0; row < rows; ++row)
            for (int c = 0; c < wide; ++c) {
                T* const place = to[row] + column + c * W;
                store(place, load(place) + sums[row][c]);
            }
    }

    // The last columns of one row, fewer than a tile.
    SEPARATE void expand_rest(const float* from, const T* at, T* to, int64_t columns, int64_t ranks) const {
        over_vectors(columns, [&](int64_t column, int n) {
            Floats sum{};
            for (int64_t r = 0; r < ranks; ++r) sum += from[r] * load_up_to(at + r * call.columns + column, n);
            store_up_to(to + column, load_up_to(to + column, n) + sum, n);
        });
    }

    // The columns begin .. end of one part.
    template <int rows>
    void expand(const int32_t* numbers, const float* from, const T* at, int64_t ranks, int64_t begin,
                int64_t end) const {
        T* to[rows];
        for (int row = 0; row < rows; ++row) to[row] = y + numbers[row] * call.y_stride;
        int64_t column = begin;
        for (; column + WIDE * W <= end; column += WIDE * W) expand_tile<rows, WIDE>(from, at, to, column, ranks);
        if (column == end) return;
        for (int row = 0; row < rows; ++row)
            expand_rest(from + row * inner_stride(), at + column, to[row] + column, end - column, ranks);
    }

    // One piece of the columns for one group. Slot by slot, in it piece by piece, for one group of the slot after the
    // other: memory is read in its order, and what a group has brought near serves the next.
    void expand_item(int64_t item, int64_t pieces) const {
        const LoraGroup& any = groups[item / pieces];
        const int64_t of_slot = item - any.eldest * pieces, piece = of_slot / any.fellows * PIECE;
        const LoraGroup& group = groups[any.eldest + of_slot % any.fellows];
        const T* const at = up + group.slot * call.most_rank * call.columns;
        for (int64_t part = 0; part < call.parts; ++part) {
            const int64_t start = tables.starts[part], ranks = rank(group.slot, part);
            const int64_t begin = start < piece ? piece : start;
            const int64_t end = smaller<int64_t>(tables.starts[part + 1], piece + PIECE);
            if (!ranks || begin >= end) continue;
            const float* const from = inner_of(group.first, part);
            with_known(group.count, [&](auto known) {
                expand<decltype(known)::rows>(order + group.first, from, at, ranks, begin, end);
            });
        }
    }

    // The multiplications that one row of this slot takes; below zero for a rank that cannot be.
    int64_t row_work(int64_t slot) const {
        int64_t total = 0;
        for (int64_t part = 0; part < call.parts; ++part) {
            const int64_t ranks = rank(slot, part);
            if (ranks < 0 || ranks > call.most_rank) return -1;
            total += ranks * (call.inputs + tables.starts[part + 1] - tables.starts[part]);
        }
        return total;
    }

    // ends[slot] becomes the place after the slot's last row.
    void sort_rows(int32_t* ends) const {
        memset(ends, 0, size_t(call.slots) * sizeof *ends);
        for (int64_t row = 0; row < call.rows; ++row)
            if (tables.slots[row] >= 0) ++ends[tables.slots[row]];
        for (int64_t slot = 0, before = 0; slot < call.slots; ++slot) {
            const int64_t rows = ends[slot];
            ends[slot] = int32_t(before);
            before += rows;
        }
        for (int64_t row = 0; row < call.rows; ++row)
            if (tables.slots[row] >= 0) order[ends[tables.slots[row]]++] = int32_t(row);
    }

    // The rows of each slot become groups of nearly equal size, or none where every rank is 0.
    int make_groups(const int32_t* ends) {
        for (int32_t slot = 0, first = 0; slot < call.slots; first = ends[slot++]) {
            const int64_t rows = ends[slot] - first, parts = (rows + ROWS - 1) / ROWS;
            const int64_t each = rows ? row_work(slot) : 0;
            if (each < 0) return BAD_RANK;
            if (!each) continue;
            const int64_t eldest = count;
            for (int64_t i = 0; i < parts; ++i) {
                const int64_t begin = rows * i / parts, end = rows * (i + 1) / parts;
                groups[count++] = {int32_t(first + begin), int32_t(end - begin), slot, int32_t(eldest), int32_t(parts)};
            }
            work += rows * each;
        }
        return OK;
    }

    int plan(int64_t active) {
        const size_t row_bytes = size_t(inner_stride()) * sizeof *inner + sizeof *groups + sizeof *order;
        inner = (float*)scratch(size_t(active) * row_bytes + size_t(call.slots) * sizeof *order);
        if (!inner) return NO_MEMORY;
        groups = (LoraGroup*)(inner + active * inner_stride());
        order = (int32_t*)(groups + active);
        int32_t* const ends = order + active;
        sort_rows(ends);
        return make_groups(ends);
    }

    void run() const {
        const int64_t blocks = (call.most_rank + WIDE - 1) / WIDE, shrinks = count * call.parts * blocks;
        const int64_t pieces = (call.columns + PIECE - 1) / PIECE, expands = count * pieces;
        const bool parallel = work >= WORTH_SHARING;
        const int64_t pieces_each = 8 * omp_get_max_threads();
        share(shrinks, shrinks / pieces_each + 1, parallel, [&](int64_t item) { shrink_item(item, blocks); });
        share(expands, expands / pieces_each + 1, parallel, [&](int64_t item) { expand_item(item, pieces); });
    }
};

template <class T> int add_lora(Lora<T> lora, int64_t active) {
    const int status = lora.plan(active);
    if (status == OK) lora.run();
    return status;
}

// How many rows have a slot, or below zero the status of one that is none.
inline int64_t count_active(const LoraCall& call, const int32_t* slots) {
    int32_t low = -1, high = -1;
    int64_t active = 0;
    for (int64_t i = 0; i < call.rows; ++i) {
        low = smaller(low, slots[i]);
        high = high < slots[i] ? slots[i] : high;
        active += slots[i] >= 0;
    }
    return low < -1 || high >= call.slots ? -BAD_ADAPTER : active;
}

inline bool are_starts(const LoraCall& call, const int32_t* starts) {
    for (int64_t part = 0; part < call.parts; ++part)
        if (starts[part] > starts[part + 1]) return false;
    return starts[0] == 0 && starts[call.parts] == call.columns;
}

}  // namespace

// Everything is looked at before anything is written. y and x: strided rows; down [slots, parts, most_rank, inputs],
// up [slots, most_rank, columns], ranks [slots, parts] and starts [parts + 1]: dense.
EXPORT(int, lora)(int is_bf16, void* y, const void* x, const int32_t* slots, const void* down, const void* up,
                  const int32_t* ranks, const int32_t* starts, const LoraCall* call) {
    const int64_t active = count_active(*call, slots);
    if (active <= 0) return int(-active);
    if (!are_starts(*call, starts)) return BAD_PARTS;
    const LoraTables tables{slots, ranks, starts};
    if (is_bf16)
        return add_lora<bf16>({*call, tables, (const bf16*)x, (const bf16*)down, (const bf16*)up, (bf16*)y}, active);
    return add_lora<float>({*call, tables, (const float*)x, (const float*)down, (const float*)up, (float*)y}, active);
}
