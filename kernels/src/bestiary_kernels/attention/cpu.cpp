// Paged attention: ragged prefill and decode in one call, grouped KV heads, keys read where they lie. `plan.hpp` says
// who sees what and cuts the work; here each item meets its keys, and a second pass joins the spans of long ones.
#include "plan.hpp"

namespace {

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
        KeyRange seen[TILE];  // the keys that each row sees
    };

    int64_t group() const { return call.q_heads / call.kv_heads; }
    int64_t head_of(const Item& item, int64_t row) const {
        return item.kv_head * group() + (item.first_row + row) % group();
    }
    int64_t token_of(const Item& item, int64_t row) const {
        return tables.query_starts[item.sequence] + (item.first_row + row) / group();
    }
    // A row's largest score and total before it meets a key: its sink, or nothing. Biases are measured as by `add_biases`.
    Running nothing_seen(const Item& item, int64_t row) const {
        Running running{Floats{}, -__builtin_inff()};
        if (!call.sinks) return running;
        running.largest = number_of(call.sinks, head_of(item, row), call.sinks_are_bf16);
        running.total[0] = 1.0f;
        if (call.slopes) {
            float base[W];
            const KeyRange seen = keys_of(call, tables, item.sequence, token_of(item, row));
            Slope(call.slopes, head_of(item, row), call.slopes_are_bf16).biases(seen.end - 1, 1, base);
            running.largest -= base[0];
        }
        return running;
    }
    bool reserve(Space& space) const {
        constexpr int64_t per = Dot<T>::per_unit;
        space.units = (call.width + per - 1) / per;
        space.padded_units = (space.units + STEP - 1) / STEP * STEP;
        space.padded = padded_sums<T>(call.value_width);
        const int64_t turned = 2 * space.padded_units * W, q_size = TILE * space.padded_units;
        const int64_t sums = TILE * space.padded, values = CHUNK / 2 * space.padded;
        float* memory = (float*)scratch(size_t(turned + q_size + sums + values + TILE * CHUNK) * sizeof(float));
        if (!memory) return false;
        space.turned = (Floats*)memory;
        space.scores = memory + turned;
        space.sums = space.scores + TILE * CHUNK;
        space.values = space.sums + sums;
        space.q = space.values + values;
        return true;
    }

    // Query rows lie one after another, or as `score_few` reads them.
    void begin_tile(const Item& item, Space& space) const {
        constexpr int64_t per = Dot<T>::per_unit;
        const bool few = item.rows <= FEW_ROWS;
        const int64_t next_four = few ? W : 4;
        if (few) memset(space.q, 0, size_t(FEW_ROWS * space.padded_units) * sizeof(float));
        for (int64_t row = 0; row < item.rows; ++row) {
            const int64_t token = token_of(item, row);
            const T* const from = q + token * call.q_stride + head_of(item, row) * call.width;
            float* to = space.q + (few ? row / R * R * space.padded_units + row % R * 4 : row * space.padded_units);
            int64_t d = 0;
            for (; d + 4 * per <= call.width; d += 4 * per, to += next_four)
                for (int u = 0; u < 4; ++u) to[u] = Dot<T>::unit(from + d + u * per);
            if (d < call.width) {
                T four[4 * per] = {};
                memcpy(four, from + d, size_t(call.width - d) * sizeof(T));
                for (int u = 0; u < 4; ++u) to[u] = Dot<T>::unit(four + u * per);
            }
            // Of a tile that is cut, whoever joins it adds the sinks.
            space.running[row] = item.partial ? Running{Floats{}, -__builtin_inff()} : nothing_seen(item, row);
            space.seen[row] = keys_of(call, tables, item.sequence, token);
        }
        memset(space.sums, 0, size_t(item.rows * space.padded) * sizeof(float));
    }

    // Absent keys and values repeat the last, so that loads stay inside.
    SEPARATE void find_rows(const Item& item, int64_t begin, Rows& rows) const {
        const int count = int(smaller<int64_t>(CHUNK, item.end - begin));
        const int64_t k_stride = call.width, v_stride = call.v_stride, block_size = call.block_size;
        const int64_t place = item.kv_head * block_size;
        const int32_t* table = tables.block_tables + item.sequence * call.max_blocks + begin / block_size;
        for (int64_t t = 0, offset = begin % block_size; t < count; ++table, offset = 0) {
            const T* k = k_cache + *table * call.k_block_stride + (place + offset) * k_stride;
            const T* v = v_cache + *table * call.v_block_stride + (place + offset) * v_stride;
            const int64_t end = smaller<int64_t>(count, t + block_size - offset);
            if (item.rows <= FEW_ROWS) open_run(k, (end - t) * k_stride), open_run(v, (end - t) * v_stride);
            for (; t < end; ++t, k += k_stride, v += v_stride) rows.k[t] = k, rows.v[t] = v;
        }
        for (int t = count; t < CHUNK; ++t) rows.k[t] = rows.k[count - 1], rows.v[t] = rows.v[count - 1];
    }

    // For many rows, values become once what they are met as.
    SEPARATE void weigh(const Item& item, int count, const Rows& chunk, Ahead<T> ahead, Space& space) const {
        constexpr int step = Values<T>::step;
        const int64_t width = call.value_width, padded = space.padded;
        if (Pairs<T>::known)
            for (int64_t row = 0; row < item.rows; ++row) Pairs<T>::round(space.scores + row * CHUNK);
        if (item.rows <= FEW_ROWS) {
            // A few keys at a time, whose values lie together, or memory would see every other line of a chunk first.
            for (int t = 0; t < count; t += W) {
                const int some = smaller(W, count - t);
                if (Pairs<T>::known)
                    Pairs<T>::weigh_few(int(item.rows), space.scores + t / 2, chunk.v + t, ahead, some, space.sums,
                                        width, padded);
                else
                    weigh_tile<T, true>(item.rows, space.scores + t, chunk.v + t, ahead, some, space.sums, width,
                                        padded);
            }
            return;
        }
        if (Pairs<T>::known)
            return Pairs<T>::weigh(int(item.rows), space.scores, chunk.v, count, space.sums, width, padded,
                                   space.values);
        if (step == W && width == padded)
            return weigh_tile<T, false>(item.rows, space.scores, chunk.v, ahead, count, space.sums, width, padded);
        Ahead<float> nothing;
        for (int begin = 0; begin < count; begin += W) {
            const int tokens = smaller(W, count - begin);
            const float* rows[W];
            for (int t = 0; t < tokens; ++t) {
                float* const to = space.values + t * padded;
                for (int64_t d = 0; d < width; d += step) {
                    Floats v[step / W];
                    Values<T>::take(chunk.v[begin + t] + d, int(width - d), v);
                    for (int i = 0; i < step / W; ++i) store(to + d + i * W, v[i]);
                }
                rows[t] = to;
            }
            weigh_tile<float, false>(item.rows, space.scores + begin, rows, nothing, tokens, space.sums, padded,
                                     padded);
        }
    }

    SEPARATE void score(const Item& item, int count, const Rows& chunk, Ahead<T> ahead, Space& space) const {
        if (item.rows <= FEW_ROWS) {
            Ahead<T> nothing;
            for (int t = 0; t < count; t += W)
                for (int64_t row = 0; row < item.rows; row += R)
                    score_few((const Floats*)(space.q + row * space.padded_units), chunk.k + t, call.width, scale,
                              space.scores + row * CHUNK + t, row ? nothing : ahead);
            return;
        }
        for (int t = 0; t < count; t += PAIR) {
            turn_keys(chunk.k + t, call.width, space.turned);
            score_tile<T>(item.rows, space.q, space.padded_units, space.turned, space.units, scale, space.scores + t);
        }
    }

    // Of the biases only their differences count. Measured from the last key that the row sees they are small where
    // weights are large, and a sum keeps the digits that a long context's bias would take from it.
    SEPARATE void add_biases(const Item& item, int64_t row, int64_t begin, int count, int64_t last,
                             float* scores) const {
        const Slope slope(call.slopes, head_of(item, row), call.slopes_are_bf16);
        float biases[CHUNK], base[W];
        slope.biases(last, 1, base);
        slope.biases(begin, count, biases);
        for (int t = 0; t < count; t += W) store(scores + t, load(scores + t) + (load(biases + t) - base[0]));
    }

    // The next chunk comes a whole chunk ahead of its turn: its keys while keys are met, its values while values are,
    // unless those are the beginnings of its keys.
    void meet_chunk(const Item& item, int64_t begin, const Rows& chunk, const Rows& next, int left, Space& space) const {
        const int count = int(smaller<int64_t>(CHUNK, item.end - begin));
        score(item, count, chunk, Ahead<T>(next.k, left, call.width), space);
        for (int64_t row = 0; row < item.rows; ++row) {
            const KeyRange seen{space.seen[row].begin - begin, smaller<int64_t>(space.seen[row].end - begin, count)};
            float *const scores = space.scores + row * CHUNK, *const sums = space.sums + row * space.padded;
            if (call.softcap != 0) cap_scores(scores, count, float(call.softcap));
            if (call.slopes) add_biases(item, row, begin, count, space.seen[row].end - 1, scores);
            soften(scores, int(seen.begin < 0 ? 0 : smaller<int64_t>(seen.begin, CHUNK)),
                   int(seen.end < 0 ? 0 : seen.end), space.running[row], sums, space.padded);
        }
        const int values_left = v_cache == k_cache ? 0 : left;
        weigh(item, count, chunk, Ahead<T>(next.v, values_left, call.value_width), space);
    }

    // A row that saw no key has a total of 0, and gets zeros.
    void write_row(const Item& item, int64_t row, const float* sums, float total) const {
        T* const to = out + (token_of(item, row) * call.q_heads + head_of(item, row)) * call.value_width;
        const Floats share_of = splat(total == 0.0f ? 0.0f : 1.0f / total);
        over_vectors(call.value_width, [&](int64_t d, int n) { store_up_to(to + d, load(sums + d) * share_of, n); });
    }

    void end_tile(const Item& item, const Space& space) const {
        for (int64_t row = 0; row < item.rows; ++row) {
            float* const sums = space.sums + row * space.padded;
            Values<T>::put_in_order(sums, space.padded);
            const float total = sum_of(space.running[row].total);
            if (!item.partial) {
                write_row(item, row, sums, total);
                continue;
            }
            float* const to = item.partial + row * partial_width(call);
            memcpy(to, sums, size_t(space.padded) * sizeof(float));
            to[space.padded] = space.running[row].largest;
            to[space.padded + 1] = total;
        }
    }

    // `later`: what this thread is likely to meet next, or null. Its first keys come while this item's last ones are met.
    bool run(const Item& item, const Item* later) const {
        Space space;
        if (!reserve(space)) return false;
        if (item.begin < item.end) {
            find_rows(item, item.begin, space.chunks[0]);
            Ahead<T>(space.chunks[0].k, W, call.width).keep_up_with(0, int(W * call.width));
        }
        begin_tile(item, space);
#if defined(__AMX_BF16__)
        tiles::Shapes shapes;
        if (Pairs<T>::known && item.rows > FEW_ROWS) shapes.set(tiles::ROWS, space.units % tiles::STEPS);
#endif
        int turn = 0;
        for (int64_t begin = item.begin; begin < item.end; begin += CHUNK, turn ^= 1) {
            Rows& next = space.chunks[turn ^ 1];
            const bool goes_on = begin + CHUNK < item.end;
            const Item* const then = goes_on ? &item : later;
            const int64_t from = goes_on ? begin + CHUNK : later ? later->begin : 0;
            const int left = then ? int(smaller<int64_t>(CHUNK, then->end - from)) : 0;
            if (left > 0) find_rows(*then, from, next);
            meet_chunk(item, begin, space.chunks[turn], next, left, space);
        }
        end_tile(item, space);
        return true;
    }

    // Joins the spans of a tile, which lie one after another from `first`, into the first span's sums.
    void join(const Item& first) const {
        const int64_t stride = partial_width(call), padded = padded_sums<T>(call.value_width);
        for (int64_t row = 0; row < first.rows; ++row) {
            float* const sums = first.partial + row * stride;
            float &largest = sums[padded], &total = sums[padded + 1];
            for (int64_t part = 1; part < first.parts; ++part) {
                const float* const other = first.partial + (part * first.rows + row) * stride;
                const float top = other[padded] > largest ? other[padded] : largest;
                const float base = top == -__builtin_inff() ? 0.0f : top;  // as in `soften`
                const Floats keep = exp_of(splat(largest - base)), add = exp_of(splat(other[padded] - base));
                for (int64_t d = 0; d < padded; d += W) store(sums + d, load(sums + d) * keep + load(other + d) * add);
                total = total * keep[0] + other[padded + 1] * add[0];
                largest = top;
            }
            const Running sink = nothing_seen(first, row);
            if (call.sinks) {
                const float top = sink.largest > largest ? sink.largest : largest;
                const Floats keep = exp_of(splat(largest - top));
                for (int64_t d = 0; d < padded; d += W) store(sums + d, load(sums + d) * keep);
                total = total * keep[0] + exp_of(splat(sink.largest - top))[0];
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
            const Item* const later = i + 1 < plan.count ? &plan.items[i + 1] : nullptr;
            if (!run(plan.items[i], later)) __atomic_store_n(&missed, 1, __ATOMIC_RELAXED);
        });
        if (missed) return NO_MEMORY;
        if (plan.split)
            for (int64_t i = 0; i < plan.count; ++i)
                if (plan.items[i].partial && plan.items[i].part == 0) join(plan.items[i]);
        return OK;
    }
};

}  // namespace

// q: strided tokens of dense heads; out: dense. Caches have strided blocks, of dense [kv_heads, block_size, width] keys
// and of values that stand v_stride apart, of which the first value_width numbers count.
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
