// Paged attention: ragged prefill and decode in one call, causal, grouped KV heads, keys read where they lie.
//
// Work is cut into items (sequence, KV head, tile of query rows, span of keys). An item longer than its fair share
// leaves an unfinished sum, and a second pass joins the spans.
#include "tile.hpp"

namespace {

struct AttentionCall {
    int64_t tokens, sequences, q_heads, kv_heads, width;
    int64_t q_stride, k_block_stride, v_block_stride;  // elements
    int64_t blocks, block_size, max_blocks;
};

struct Item {
    int32_t sequence, kv_head, first_row, rows;
    int32_t begin, end;        // the span of keys
    int32_t part, parts;       // which span of how many the tile is cut into
    float* partial;            // where an unfinished sum goes; null when the item is whole
};

struct Tables {
    const int32_t *block_tables, *query_starts, *context_lens;
};

// Per query row of a partial: its sums, then its largest score and the total of its weights.
inline int64_t partial_width(int64_t width) { return (width + W - 1) / W * W + 2; }

int check_attention(const AttentionCall& call, const Tables& tables) {
    if (tables.query_starts[0] != 0 || tables.query_starts[call.sequences] != call.tokens) return BAD_RAGGED;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t queries = int64_t(tables.query_starts[s + 1]) - tables.query_starts[s];
        const int64_t context = tables.context_lens[s], pages = (context + call.block_size - 1) / call.block_size;
        if (queries < 0 || context < queries || pages > call.max_blocks) return BAD_RAGGED;
        for (int64_t page = 0; page < pages; ++page) {
            const int32_t block = tables.block_tables[s * call.max_blocks + page];
            if (block < 0 || block >= call.blocks) return BAD_BLOCK;
        }
    }
    return OK;
}

// Calls visit(item without span, keys it sees) for every tile, in the order of the sequences.
template <class Visit> void over_tiles(const AttentionCall& call, const Tables& tables, Visit visit) {
    const int64_t group = call.q_heads / call.kv_heads;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t queries = tables.query_starts[s + 1] - tables.query_starts[s], rows = queries * group;
        for (int64_t head = 0; head < call.kv_heads; ++head)
            for (int64_t first = 0; first < rows; first += TILE) {
                const int64_t taken = smaller<int64_t>(TILE, rows - first);
                const int64_t last_token = (first + taken - 1) / group;
                const int64_t keys = tables.context_lens[s] - queries + last_token + 1;
                visit(Item{int32_t(s), int32_t(head), int32_t(first), int32_t(taken), 0, 0, 0, 1, nullptr}, keys);
            }
    }
}

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

// No item should be more than an eighth of a thread's share, or the threads end apart; a span under 256 keys would
// cost more to join than it saves.
int make_plan(const AttentionCall& call, const Tables& tables, Plan& plan) {
    int64_t total = 0;
    over_tiles(call, tables, [&](const Item&, int64_t keys) { total += keys; });
    const int64_t threads = omp_get_max_threads();
    plan.parallel = threads > 1 && total * call.width > 16384;
    int64_t span = INT32_MAX;
    if (plan.parallel) span = total / (threads * 8) < 256 ? 256 : total / (threads * 8);
    int64_t partial_rows = 0;
    over_tiles(call, tables, [&](const Item& tile, int64_t keys) {
        const int64_t parts = (keys + span - 1) / span;
        plan.count += parts;
        if (parts > 1) partial_rows += parts * tile.rows;
    });
    plan.split = partial_rows > 0;
    plan.items = (Item*)malloc(size_t(plan.count + 1) * sizeof(Item));
    const int64_t row_floats = partial_width(call.width);
    if (plan.split) plan.partials = (float*)malloc(size_t(partial_rows * row_floats) * sizeof(float));
    if (!plan.items || (plan.split && !plan.partials)) return NO_MEMORY;
    Item* next = plan.items;
    float* partial = plan.partials;
    over_tiles(call, tables, [&](Item item, int64_t keys) {
        item.parts = int32_t((keys + span - 1) / span);
        for (item.part = 0; item.part < item.parts; ++item.part) {
            item.begin = int32_t(keys * item.part / item.parts);
            item.end = int32_t(keys * (item.part + 1) / item.parts);
            item.partial = item.parts > 1 ? partial : nullptr;
            if (item.parts > 1) partial += item.rows * row_floats;
            *next++ = item;
        }
    });
    return OK;
}

template <class T> struct Attention {
    AttentionCall call;
    Tables tables;
    const T *q, *k_cache, *v_cache;
    T* out;
    float scale;

    // Where the keys and values of a chunk lie.
    struct Rows {
        const T *k[CHUNK], *v[CHUNK];
    };

    // Thread memory of one tile; the widths are rounded up so that whole vectors fit.
    struct Space {
        int64_t units, padded_units, padded;
        float *q, *scores, *sums, *values;
        Floats* turned;
        Rows chunks[2];  // this one and the next, taking turns
        Running running[TILE];
    };

    int64_t group() const { return call.q_heads / call.kv_heads; }
    int64_t head_offset(const Item& item, int64_t row) const {
        return (item.kv_head * group() + (item.first_row + row) % group()) * call.width;
    }
    int64_t token_of(const Item& item, int64_t row) const {
        return tables.query_starts[item.sequence] + (item.first_row + row) / group();
    }
    // How many keys a row sees, counted from the start of the sequence.
    int64_t sees(const Item& item, int64_t row) const {
        return tables.context_lens[item.sequence] + token_of(item, row) - tables.query_starts[item.sequence + 1] + 1;
    }

    bool reserve(Space& space) const {
        constexpr int64_t per = Dot<T>::per_unit;
        space.units = (call.width + per - 1) / per;
        space.padded_units = (space.units + W - 1) / W * W;
        space.padded = (call.width + W - 1) / W * W;
        const int64_t turned = 2 * space.padded_units * W, q_size = TILE * space.padded_units;
        const int64_t sums = TILE * space.padded, values = W * space.padded;
        float* memory = (float*)scratch(size_t(turned + q_size + sums + values + TILE * CHUNK) * sizeof(float));
        if (!memory) return false;
        space.turned = (Floats*)memory;
        space.scores = memory + turned;
        space.sums = space.scores + TILE * CHUNK;
        space.values = space.sums + sums;
        space.q = space.values + values;
        return true;
    }

    void begin_tile(const Item& item, Space& space) const {
        constexpr int per = Dot<T>::per_unit;
        for (int64_t row = 0; row < item.rows; ++row) {
            const T* const from = q + token_of(item, row) * call.q_stride + head_offset(item, row);
            for (int64_t u = 0; u < space.units; ++u)
                space.q[row * space.padded_units + u] =
                    Dot<T>::unit(from + u * per, int(smaller<int64_t>(per, call.width - u * per)));
            space.running[row] = Running{Floats{}, -__builtin_inff()};
        }
        memset(space.sums, 0, size_t(item.rows * space.padded) * sizeof(float));
    }

    // Absent keys and values repeat the last, so that loads stay inside.
    SEPARATE void find_rows(const Item& item, int64_t begin, Rows& rows) const {
        const int count = int(smaller<int64_t>(CHUNK, item.end - begin));
        const int64_t width = call.width, block_size = call.block_size, in_cache = item.kv_head * block_size * width;
        const int32_t* table = tables.block_tables + item.sequence * call.max_blocks + begin / block_size;
        for (int64_t t = 0, offset = begin % block_size; t < count; ++table, offset = 0) {
            const T* k = k_cache + *table * call.k_block_stride + in_cache + offset * width;
            const T* v = v_cache + *table * call.v_block_stride + in_cache + offset * width;
            const int64_t end = smaller<int64_t>(count, t + block_size - offset);
            for (; t < end; ++t, k += width, v += width) rows.k[t] = k, rows.v[t] = v;
        }
        for (int t = count; t < CHUNK; ++t) rows.k[t] = rows.k[count - 1], rows.v[t] = rows.v[count - 1];
    }

    // Asks memory for rows of the next chunk: pages lie anywhere, so that the hardware's own prefetch stops at each
    // one's end. A few at a time between arithmetic; all at once would fill the queue and hold up the loads.
    void ask_for(const T* const* rows, int count) const {
        const int64_t row_bytes = call.width * int64_t(sizeof(T));
        for (int t = 0; t < count; ++t)
            for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch((const char*)rows[t] + at);
    }

    // Values for many rows, or of a width that is no multiple of the lanes, are widened once and read from the cache.
    SEPARATE void weigh(const Item& item, int count, const Rows& chunk, Space& space) const {
        const bool as_they_lie = call.width % W == 0 && (sizeof(T) == sizeof(float) || item.rows <= VALUE_ROWS);
        if (as_they_lie) return weigh_tile(item.rows, space.scores, chunk.v, count, space.sums, space.padded);
        for (int begin = 0; begin < count; begin += W) {
            const int tokens = smaller(W, count - begin);
            const float* rows[W];
            for (int t = 0; t < tokens; ++t) {
                float* const to = space.values + t * space.padded;
                over_vectors(call.width,
                             [&](int64_t d, int n) { store(to + d, load_up_to(chunk.v[begin + t] + d, n)); });
                rows[t] = to;
            }
            weigh_tile(item.rows, space.scores + begin, rows, tokens, space.sums, space.padded);
        }
    }

    void meet_chunk(const Item& item, int64_t begin, const Rows& chunk, const Rows& next, Space& space) const {
        const int count = int(smaller<int64_t>(CHUNK, item.end - begin));
        for (int t = 0; t < count; t += PAIR) {
            ask_for(next.k + t, PAIR);
            turn_keys(chunk.k + t, call.width, space.turned);
            score_tile<T>(item.rows, space.q, space.padded_units, space.turned, space.units, scale, space.scores + t);
        }
        for (int64_t row = 0; row < item.rows; ++row) {
            int64_t visible = smaller<int64_t>(sees(item, row) - begin, count);
            if (visible < 0) visible = 0;
            soften(space.scores + row * CHUNK, int(visible), space.running[row], space.sums + row * space.padded,
                   space.padded);
        }
        ask_for(next.v, CHUNK);
        weigh(item, count, chunk, space);
    }

    void write_row(const Item& item, int64_t row, const float* sums, float total) const {
        T* const to = out + token_of(item, row) * call.q_heads * call.width + head_offset(item, row);
        const Floats share_of = splat(1.0f / total);
        over_vectors(call.width, [&](int64_t d, int n) { store_up_to(to + d, load(sums + d) * share_of, n); });
    }

    void end_tile(const Item& item, const Space& space) const {
        for (int64_t row = 0; row < item.rows; ++row) {
            const float* const sums = space.sums + row * space.padded;
            const float total = sum_of(space.running[row].total);
            if (!item.partial) {
                write_row(item, row, sums, total);
                continue;
            }
            float* const to = item.partial + row * partial_width(call.width);
            memcpy(to, sums, size_t(space.padded) * sizeof(float));
            to[space.padded] = space.running[row].largest;
            to[space.padded + 1] = total;
        }
    }

    bool run(const Item& item) const {
        Space space;
        if (!reserve(space)) return false;
        begin_tile(item, space);
        find_rows(item, item.begin, space.chunks[0]);
        int turn = 0;
        for (int64_t begin = item.begin; begin < item.end; begin += CHUNK, turn ^= 1) {
            const bool last = begin + CHUNK >= item.end;
            if (!last) find_rows(item, begin + CHUNK, space.chunks[turn ^ 1]);
            meet_chunk(item, begin, space.chunks[turn], space.chunks[last ? turn : turn ^ 1], space);
        }
        end_tile(item, space);
        return true;
    }

    // Joins the spans of a tile, which lie one after another from `first`, into the first span's sums.
    void join(const Item& first) const {
        const int64_t stride = partial_width(call.width), padded = stride - 2;
        for (int64_t row = 0; row < first.rows; ++row) {
            float* const sums = first.partial + row * stride;
            float &largest = sums[padded], &total = sums[padded + 1];
            for (int64_t part = 1; part < first.parts; ++part) {
                const float* const other = first.partial + (part * first.rows + row) * stride;
                const float top = other[padded] > largest ? other[padded] : largest;
                if (top == -__builtin_inff()) continue;
                const Floats keep = exp_of(splat(largest - top)), add = exp_of(splat(other[padded] - top));
                for (int64_t d = 0; d < padded; d += W) store(sums + d, load(sums + d) * keep + load(other + d) * add);
                total = total * keep[0] + other[padded + 1] * add[0];
                largest = top;
            }
            write_row(first, row, sums, total);
        }
    }

    int run_all() const {
        Plan plan;
        const int status = make_plan(call, tables, plan);
        if (status != OK) return status;
        int missed = 0;
        share(plan.count, 1, plan.parallel, [&](int64_t i) {
            if (!run(plan.items[i])) __atomic_store_n(&missed, 1, __ATOMIC_RELAXED);
        });
        if (missed) return NO_MEMORY;
        if (plan.split)
            for (int64_t i = 0; i < plan.count; i += plan.items[i].parts)
                if (plan.items[i].partial) join(plan.items[i]);
        return OK;
    }
};

}  // namespace

// q: strided tokens of dense heads; out: dense; caches [blocks, kv_heads, block_size, width] with strided blocks.
EXPORT(int, paged_attention)(int is_bf16, const void* q, const void* k_cache, const void* v_cache, void* out,
                             const int32_t* block_tables, const int32_t* query_starts, const int32_t* context_lens,
                             float scale, const AttentionCall* call) {
    const Tables tables{block_tables, query_starts, context_lens};
    const int status = check_attention(*call, tables);
    if (status != OK) return status;
    if (is_bf16)
        return Attention<bf16>{*call,           tables,     (const bf16*)q, (const bf16*)k_cache, (const bf16*)v_cache,
                               (bf16*)out, scale}
            .run_all();
    return Attention<float>{*call,        tables, (const float*)q, (const float*)k_cache, (const float*)v_cache,
                            (float*)out, scale}
        .run_all();
}
