// What each query of a paged batch sees, whether tables and lengths fit, and how the work is cut. No arithmetic.
//
// Work is cut into items (sequence, KV head, tile of query rows, span of keys). The keys of a tile are those that any
// of its rows sees, and no others are looked at. An item longer than its fair share leaves an unfinished sum.
#pragma once

#include "values.hpp"

namespace {

// As `attention/cpu.py` packs it. Zero and null stand for a setting that is absent.
struct AttentionCall {
    int64_t tokens, sequences, q_heads, kv_heads, width, value_width;
    int64_t q_stride, k_block_stride, v_block_stride;  // elements
    int64_t v_stride;                                  // elements from one value to the next inside a block
    int64_t blocks, block_size, max_blocks;
    int64_t is_causal, window;
    const int32_t *visible, *ranges;
    const void* slopes;
    int64_t slopes_are_bf16;
    const void* sinks;  // a score of each head that has no value
    int64_t sinks_are_bf16;
    double softcap;
};

struct Tables {
    const int32_t *block_tables, *query_starts, *context_lens;
};

struct Item {
    int32_t sequence, kv_head, first_row, rows;
    int32_t begin, end;   // the span of keys
    int32_t part, parts;  // which span of how many the tile is cut into
    float* partial;       // where an unfinished sum goes; null when the item is whole
};

// The keys that query `token` of the batch sees, a query of sequence s. A prefix that sees itself whole reaches past
// every window of its own, so that this is always one range.
inline KeyRange keys_of(const AttentionCall& call, const Tables& tables, int64_t s, int64_t token) {
    const int64_t context = tables.context_lens[s];
    if (!call.is_causal) {
        if (!call.ranges) return {0, context};
        const int64_t begin = call.ranges[2 * token], end = call.ranges[2 * token + 1];
        return {begin < 0 ? 0 : begin, smaller(end, context)};
    }
    const int64_t place = context - tables.query_starts[s + 1] + token;
    if (call.visible && place < call.visible[s]) return {0, smaller<int64_t>(call.visible[s], context)};
    return {call.window && place >= call.window ? place - call.window + 1 : 0, place + 1};
}

// The keys that any of the queries first to last sees. Both ends grow from query to query, but for given ranges.
inline KeyRange keys_of_all(const AttentionCall& call, const Tables& tables, int64_t s, int64_t first, int64_t last) {
    if (!call.ranges)
        return {keys_of(call, tables, s, first).begin, keys_of(call, tables, s, last).end};
    KeyRange all{INT32_MAX, 0};
    for (int64_t token = first; token <= last; ++token) {
        const KeyRange keys = keys_of(call, tables, s, token);
        if (keys.begin >= keys.end) continue;
        all.begin = smaller(all.begin, keys.begin);
        all.end = all.end < keys.end ? keys.end : all.end;
    }
    return all.begin < all.end ? all : KeyRange{0, 0};
}

// Blocks wholly before the first query's window may be gone: their ids are not looked at.
inline int check_attention(const AttentionCall& call, const Tables& tables) {
    if (tables.query_starts[0] != 0 || tables.query_starts[call.sequences] != call.tokens) return BAD_RAGGED;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t queries = int64_t(tables.query_starts[s + 1]) - tables.query_starts[s];
        const int64_t context = tables.context_lens[s], pages = (context + call.block_size - 1) / call.block_size;
        if (queries < 0 || context < (call.is_causal ? queries : 0) || pages > call.max_blocks) return BAD_RAGGED;
        const int64_t first = call.is_causal ? keys_of(call, tables, s, tables.query_starts[s]).begin : 0;
        for (int64_t page = first / call.block_size; page < pages; ++page) {
            const int32_t block = tables.block_tables[s * call.max_blocks + page];
            if (block < 0 || block >= call.blocks) return BAD_BLOCK;
        }
    }
    return OK;
}

// Query rows that each KV head of a sequence meets.
inline int64_t rows_of(const AttentionCall& call, const Tables& tables, int64_t s) {
    return (int64_t(tables.query_starts[s + 1]) - tables.query_starts[s]) * (call.q_heads / call.kv_heads);
}

// Calls visit(item without span, keys of it) for every tile, in the order of the sequences.
template <class Visit> void over_tiles(const AttentionCall& call, const Tables& tables, Visit visit) {
    const int64_t group = call.q_heads / call.kv_heads;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t start = tables.query_starts[s], rows = rows_of(call, tables, s);
        for (int64_t head = 0; head < call.kv_heads; ++head)
            for (int64_t first = 0; first < rows; first += TILE) {
                const int64_t taken = smaller<int64_t>(TILE, rows - first), last = first + taken - 1;
                const KeyRange keys = keys_of_all(call, tables, s, start + first / group, start + last / group);
                visit(Item{int32_t(s), int32_t(head), int32_t(first), int32_t(taken), 0, 0, 0, 1, nullptr}, keys);
            }
    }
}

// Per query row of a partial: its sums, then its largest score and the total of its weights.
inline int64_t partial_width(const AttentionCall& call) { return padded_sums<bf16>(call.value_width) + 2; }

struct Plan {
    Item* items = nullptr;
    float* partials = nullptr;
    int64_t count = 0;
    bool parallel = false, split = false;
    ~Plan() {
        free(items);
        free(partials);
    }
};

// Keys that few rows meet before the next head meets its own, in the same blocks: of more, the processor has forgotten
// where those lie by then.
constexpr int64_t LONGEST = 2048;

// No item should be more than an eighth of a thread's share, or the threads end apart; a span under 256 keys would
// cost more to join than it saves. A tile without keys is an item too: its rows are zeros.
inline int make_plan(const AttentionCall& call, const Tables& tables, Plan& plan) {
    int64_t total = 0;
    over_tiles(call, tables, [&](const Item&, KeyRange keys) { total += keys.end - keys.begin; });
    const int64_t threads = omp_get_max_threads();
    plan.parallel = threads > 1 && total * call.width > 16384;
    int64_t span = INT32_MAX;
    if (plan.parallel) span = total / (threads * 8) < 256 ? 256 : total / (threads * 8);
    const auto parts_of = [span](const Item& tile, KeyRange keys) {
        const int64_t most = tile.rows <= FEW_ROWS ? smaller(span, LONGEST) : span;
        const int64_t parts = (keys.end - keys.begin + most - 1) / most;
        return parts ? parts : 1;
    };
    int64_t partial_rows = 0;
    over_tiles(call, tables, [&](const Item& tile, KeyRange keys) {
        const int64_t parts = parts_of(tile, keys);
        plan.count += parts;
        if (parts > 1) partial_rows += parts * tile.rows;
    });
    plan.split = partial_rows > 0;
    plan.items = (Item*)malloc(size_t(plan.count + 1) * sizeof(Item));
    const int64_t row_floats = partial_width(call);
    if (plan.split) plan.partials = (float*)malloc(size_t(partial_rows * row_floats) * sizeof(float));
    if (!plan.items || (plan.split && !plan.partials)) return NO_MEMORY;
    Item* next = plan.items;
    float* partial = plan.partials;
    over_tiles(call, tables, [&](Item item, KeyRange keys) {
        const int64_t count = keys.end - keys.begin;
        item.parts = int32_t(parts_of(item, keys));
        // Where a head is one tile, all heads meet a span before any meets the next: their keys lie in the same blocks.
        const bool in_turns = rows_of(call, tables, item.sequence) <= TILE;
        Item* to = in_turns ? next - item.kv_head * (item.parts - 1) : next;
        for (item.part = 0; item.part < item.parts; ++item.part, to += in_turns ? call.kv_heads : 1) {
            item.begin = int32_t(keys.begin + count * item.part / item.parts);
            item.end = int32_t(keys.begin + count * (item.part + 1) / item.parts);
            item.partial = item.parts > 1 ? partial : nullptr;
            if (item.parts > 1) partial += item.rows * row_floats;
            *to = item;
        }
        next += item.parts;
    });
    return OK;
}

}  // namespace
