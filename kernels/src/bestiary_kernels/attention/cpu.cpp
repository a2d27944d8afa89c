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
        Running running;
        KeyRange seen[TILE];          // the keys that each row sees
        KeyRange parts[TILE / PART];  // and that any row of a part sees
    };

    int64_t group() const { return call.q_heads / call.kv_heads; }
    int64_t head_of(const Item& item, int64_t row) const {
        return item.kv_head * group() + (item.first_row + row) % group();
    }
    int64_t token_of(const Item& item, int64_t row) const {
        return tables.query_starts[item.sequence] + (item.first_row + row) / group();
    }
    // A row's largest score and total before it meets a key: its sink, or nothing. Biases are measured as by `add_biases`.
    struct Start {
        float largest, total;
    };
    Start start_of(const Item& item, int64_t row) const {
        if (!call.sinks) return {-__builtin_inff(), 0.0f};
        Start start{number_of(call.sinks, head_of(item, row), call.sinks_are_bf16), 1.0f};
        if (call.slopes) {
            float base[W];
            const KeyRange seen = keys_of(call, tables, item.sequence, token_of(item, row));
            Slope(call.slopes, head_of(item, row), call.slopes_are_bf16).biases(seen.end - 1, 1, base);
            start.largest -= base[0];
        }
        return start;
    }
    bool reserve(Space& space) const {
        constexpr int64_t per = Dot<T>::per_unit;
        space.units = (call.width + per - 1) / per;
        space.padded_units = (space.units + STEP - 1) / STEP * STEP;
        space.padded = padded_sums<T>(call.value_width);
        const int64_t turned = CHUNK * space.padded_units, q_size = TILE * space.padded_units;
        const int64_t sums = TILE * space.padded, values = CHUNK * space.padded, scores = PART * CHUNK;
        float* memory = (float*)scratch(size_t(turned + q_size + sums + values + scores) * sizeof(float));
        if (!memory) return false;
        space.turned = (Floats*)memory;
        space.scores = memory + turned;
        space.sums = space.scores + scores;
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
            const Start start = item.partial ? Start{-__builtin_inff(), 0.0f} : start_of(item, row);
            space.running.largest[row] = start.largest;
            space.running.total[row] = Floats{};
            space.running.total[row][0] = start.total;
            space.seen[row] = keys_of(call, tables, item.sequence, token);
        }
        for (int64_t first = 0; first < item.rows; first += PART) {
            const int64_t last = smaller<int64_t>(first + PART, item.rows) - 1;
            space.parts[first / PART] =
                keys_of_all(call, tables, item.sequence, token_of(item, first), token_of(item, last));
        }
        memset(space.sums, 0, size_t(item.rows * space.padded) * sizeof(float));
    }

    // Asks for the queries of an item that comes later, and for where its rows go.
    void ask_for(const Item& item) const {
        const int64_t in = group() * call.width * int64_t(sizeof(T)), head = item.kv_head * group();
        const int64_t written = group() * call.value_width * int64_t(sizeof(T));
        for (int64_t row = 0; row < item.rows; row += group()) {
            const int64_t token = token_of(item, row);
            const char* const from = (const char*)(q + token * call.q_stride + head * call.width);
            const char* const to = (const char*)(out + (token * call.q_heads + head) * call.value_width);
            for (int64_t at = 0; at < in; at += 64) __builtin_prefetch(from + at, 0, 2);
            for (int64_t at = 0; at < written; at += 64) __builtin_prefetch(to + at, 1, 2);
        }
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

    // What the rows of all parts share: keys as `score_tile` reads them, and values as they are met.
    SEPARATE void prepare(const Rows& chunk, Space& space) const {
        for (int t = 0; t < CHUNK; t += PAIR)
            turn_keys(chunk.k + t, call.width, space.turned + t / W * space.padded_units);
        if (Weights<T>::are_pairs)
            Pairs<T>::join_all(chunk.v, call.value_width, space.padded, space.values);
        else if (!meets_values_as_they_lie(space))
            widen_all(chunk.v, call.value_width, space.padded, space.values);
    }
    bool meets_values_as_they_lie(const Space& space) const {
        return Values<T>::step == W && call.value_width == space.padded;
    }

    // The weighted values of a part's rows, which begin at `sums`.
    SEPARATE void weigh(int rows, int count, const Rows& chunk, Space& space, float* sums) const {
        if (Weights<T>::are_pairs)
            return Pairs<T>::weigh(rows, space.scores, space.values, count, sums, space.padded);
        if (meets_values_as_they_lie(space)) {
            Ahead<T> nothing;
            return weigh_tile<T, false>(rows, space.scores, chunk.v, nothing, count, sums, space.padded, space.padded);
        }
        const float* wide[CHUNK];
        for (int t = 0; t < CHUNK; ++t) wide[t] = space.values + t * space.padded;
        Ahead<float> nothing;
        weigh_tile<float, false>(rows, space.scores, wide, nothing, count, sums, space.padded, space.padded);
    }
    // A few keys at a time, whose values lie together, or memory would see every other line of a chunk first.
    SEPARATE void weigh_few(int rows, int count, const Rows& chunk, Ahead<T> ahead, Space& space) const {
        for (int t = 0; t < count; t += W) {
            const int some = smaller(W, count - t);
            if (FewWeights<T>::are_pairs)
                Pairs<T>::weigh_few(rows, space.scores + t / 2, chunk.v + t, ahead, some, space.sums, call.value_width,
                                    space.padded);
            else
                weigh_tile<T, true>(rows, space.scores + t, chunk.v + t, ahead, some, space.sums, call.value_width,
                                    space.padded);
        }
    }

    SEPARATE void score(int rows, int count, const float* q, Space& space) const {
        for (int t = 0; t < count; t += PAIR)
            score_tile<T>(rows, q, space.padded_units, space.turned + t / W * space.padded_units, space.units,
                          space.scores + t);
    }
    SEPARATE void score_all_few(int rows, int count, const Rows& chunk, Ahead<T> ahead, Space& space) const {
        Ahead<T> nothing;
        for (int t = 0; t < count; t += W)
            for (int row = 0; row < rows; row += R)
                score_few((const Floats*)(space.q + row * space.padded_units), chunk.k + t, call.width,
                          space.scores + row * CHUNK + t, row ? nothing : ahead);
    }

    // Of the biases only their differences count. Measured from the last key that the row sees they are small where
    // weights are large, and a sum keeps the digits that a long context's bias would take from it.
    SEPARATE void add_biases(const Item& item, int64_t row, int64_t begin, int count, int64_t last, float scale,
                             float* scores) const {
        const Slope slope(call.slopes, head_of(item, row), call.slopes_are_bf16);
        float biases[CHUNK], base[W];
        slope.biases(last, 1, base);
        slope.biases(begin, count, biases);
        for (int t = 0; t < count; t += W)
            store(scores + t, load(scores + t) * scale + (load(biases + t) - base[0]));
    }

    // Does what the call asks of the scores of `rows` from `first` on before they are weights; returns what they are
    // still to be multiplied by.
    float set_scores(const Item& item, int64_t first, int rows, int64_t begin, int count, Space& space) const {
        if (call.softcap == 0 && !call.slopes && scale > 0) return scale;
        for (int64_t row = 0; row < rows; ++row) {
            float *const scores = space.scores + row * CHUNK, left = scale;
            const int64_t last = space.seen[first + row].end - 1;
            if (call.softcap != 0) cap_scores(scores, count, left, float(call.softcap)), left = 1.0f;
            if (call.slopes) add_biases(item, first + row, begin, count, last, left, scores), left = 1.0f;
            for (int t = 0; left != 1.0f && t < CHUNK; t += W) store(scores + t, load(scores + t) * left);
        }
        return 1.0f;
    }

    template <class Form>
    void soften_part(const Item& item, int64_t first, int rows, int64_t begin, int count, Space& space) const {
        const float left_to_scale = set_scores(item, first, rows, begin, count, space);
        soften<Form>(rows, space.scores, space.seen + first, begin, count, left_to_scale,
                        space.running.largest + first, space.running.total + first, space.sums + first * space.padded,
                        space.padded);
    }

    // Parts whose rows see none of the keys pass.
    void meet_chunk(const Item& item, int64_t begin, const Rows& chunk, Space& space) const {
        const int count = int(smaller<int64_t>(CHUNK, item.end - begin));
        prepare(chunk, space);
        for (int64_t first = 0; first < item.rows; first += PART) {
            const KeyRange& seen = space.parts[first / PART];
            if (begin >= seen.end || begin + count <= seen.begin) continue;
            const int rows = int(smaller<int64_t>(PART, item.rows - first));
            score(rows, count, space.q + first * space.padded_units, space);
            soften_part<Weights<T>>(item, first, rows, begin, count, space);
            weigh(rows, count, chunk, space, space.sums + first * space.padded);
        }
    }
    // The next chunk comes a whole chunk ahead of its turn: its keys while keys are met, its values while values are,
    // unless those are the beginnings of its keys.
    void meet_chunk_few(const Item& item, int64_t begin, const Rows& chunk, const Rows& next, int left,
                        Space& space) const {
        const int count = int(smaller<int64_t>(CHUNK, item.end - begin)), rows = item.rows;
        score_all_few(rows, count, chunk, Ahead<T>(next.k, left, call.width), space);
        soften_part<FewWeights<T>>(item, 0, rows, begin, count, space);
        const int values_left = v_cache == k_cache ? 0 : left;
        weigh_few(rows, count, chunk, Ahead<T>(next.v, values_left, call.value_width), space);
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
            const float total = sum_of(space.running.total[row]);
            if (!item.partial) {
                write_row(item, row, sums, total);
                continue;
            }
            float* const to = item.partial + row * partial_width(call);
            memcpy(to, sums, size_t(space.padded) * sizeof(float));
            to[space.padded] = space.running.largest[row];
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
        if (later && later->rows > FEW_ROWS) ask_for(*later);
#if defined(__AMX_BF16__)
        tiles::Shapes shapes;
        if (Weights<T>::are_pairs && item.rows > FEW_ROWS) shapes.set(tiles::ROWS, space.units % tiles::STEPS);
#endif
        int turn = 0;
        for (int64_t begin = item.begin; begin < item.end; begin += CHUNK, turn ^= 1) {
            Rows& next = space.chunks[turn ^ 1];
            const bool goes_on = begin + CHUNK < item.end;
            const Item* const then = goes_on ? &item : later;
            const int64_t from = goes_on ? begin + CHUNK : later ? later->begin : 0;
            const int left = then ? int(smaller<int64_t>(CHUNK, then->end - from)) : 0;
            if (left > 0) find_rows(*then, from, next);
            if (item.rows <= FEW_ROWS)
                meet_chunk_few(item, begin, space.chunks[turn], next, left, space);
            else
                meet_chunk(item, begin, space.chunks[turn], space);
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
            const Start sink = start_of(first, row);
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
