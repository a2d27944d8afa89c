// Which experts compute each token: scores, the best of the keys that they become, and the chosen ones' weights.
#include <float.h>

#include "../../simd.hpp"

namespace {

// The order of SCORINGS in moe/__init__.py; the last one are the logits themselves, for a softmax over the chosen.
enum Scoring : int64_t { SOFTMAX = 0, SIGMOID = 1, SPARSEMIXER = 2, LOGITS = 3 };

struct RouteCall {
    int64_t rows, experts, row_stride, top_k, groups, top_groups, scoring, renormalise, by_two;
    double scale, threshold;  // sparsemixer's: how far from the best an expert counts
};

constexpr int64_t MOST_EXPERTS = 1024;
constexpr float TINY_SUM = 1e-20f;  // TINY in moe/reference.py

inline float best_of(const float* keys, int64_t count) {
    Floats best = splat(-INFINITY);
    over_vectors(count, [&](int64_t i, int n) {
        Floats some = load_up_to(keys + i, n);
        for (int lane = n; lane < W; ++lane) some[lane] = -INFINITY;
        best = larger(best, some);
    });
    return largest_of(best);
}

// Takes the first of the largest keys out of them and returns its place.
inline int64_t take_best(float* keys, int64_t count) {
    const float best = best_of(keys, count);
    int64_t place = 0;
    while (place < count - 1 && keys[place] != best) ++place;
    keys[place] = -INFINITY;
    return place;
}

// What may be compared: NaN is the best, and nothing is as low as what was taken or closed.
inline Floats comparable(Floats x) {
    x = x == x ? x : splat(INFINITY);
    return x < -FLT_MAX ? splat(-FLT_MAX) : x;
}

inline void softmax(float* x, int64_t count) {
    const float best = best_of(x, count);
    Floats sums{};
    over_vectors(count, [&](int64_t i, int n) {
        Floats part = exp_of(load_up_to(x + i, n) - best);
        for (int lane = n; lane < W; ++lane) part[lane] = 0.0f;
        sums += part;
        store_up_to(x + i, part, n);
    });
    const float total = sum_of(sums);
    over_vectors(count, [&](int64_t i, int n) { store_up_to(x + i, load_up_to(x + i, n) / total, n); });
}

// -inf for the keys outside the best groups.
inline void close_groups(const RouteCall& call, float* keys) {
    const int64_t size = call.experts / call.groups;
    float values[MOST_EXPERTS];
    for (int64_t group = 0; group < call.groups; ++group) {
        float best = -INFINITY, second = -INFINITY;
        for (int64_t i = group * size; i < (group + 1) * size; ++i) {
            second = keys[i] > best ? best : keys[i] > second ? keys[i] : second;
            best = keys[i] > best ? keys[i] : best;
        }
        const float value = call.by_two ? best + second : best;
        values[group] = value < -FLT_MAX ? -FLT_MAX : value;
    }
    for (int64_t i = 0; i < call.top_groups; ++i) take_best(values, call.groups);
    for (int64_t group = 0; group < call.groups; ++group)
        if (values[group] != -INFINITY)
            for (int64_t i = group * size; i < (group + 1) * size; ++i) keys[i] = -INFINITY;
}

// The best that is left, weighed by a softmax over those left that come near it.
inline void mix_sparsely(const RouteCall& call, const float* scores, float* left, float* weights, int64_t* experts) {
    const float threshold = float(call.threshold);
    for (int64_t choice = 0; choice < call.top_k; ++choice) {
        const int64_t expert = take_best(left, call.experts);
        const float best = scores[expert];
        Floats sums{};
        over_vectors(call.experts, [&](int64_t i, int n) {
            const Floats score = load_up_to(scores + i, n);
            const Floats size = larger(score < 0.0f ? -score : score, splat(best));
            const Floats near = (best - score) / size > threshold ? splat(-INFINITY) : load_up_to(left + i, n);
            Floats part = exp_of(near - best);
            for (int lane = n; lane < W; ++lane) part[lane] = 0.0f;
            sums += part;
        });
        weights[choice] = 1.0f / (1.0f + sum_of(sums));  // itself is no longer left
        experts[choice] = expert;
    }
}

template <class T>
void route_row(const RouteCall& call, const T* logits, const float* bias, float* weights, int64_t* experts) {
    float scores[MOST_EXPERTS], keys[MOST_EXPERTS];
    over_vectors(call.experts, [&](int64_t i, int n) {
        const Floats x = load_up_to(logits + i, n);
        store_up_to(scores + i, call.scoring == SIGMOID ? 1.0f / (1.0f + exp_of(-x)) : x, n);
    });
    if (call.scoring == SOFTMAX) softmax(scores, call.experts);
    over_vectors(call.experts, [&](int64_t i, int n) {
        const Floats score = load_up_to(scores + i, n);
        store_up_to(keys + i, comparable(bias ? score + load_up_to(bias + i, n) : score), n);
    });
    if (call.scoring == SPARSEMIXER) {
        mix_sparsely(call, scores, keys, weights, experts);
    } else {
        if (call.top_groups < call.groups) close_groups(call, keys);
        for (int64_t i = 0; i < call.top_k; ++i) {
            experts[i] = take_best(keys, call.experts);
            weights[i] = scores[experts[i]];
        }
        if (call.scoring == LOGITS) softmax(weights, call.top_k);
    }
    float factor = float(call.scale);
    if (call.renormalise) {
        float total = TINY_SUM;
        for (int64_t i = 0; i < call.top_k; ++i) total += weights[i];
        factor /= total;
    }
    for (int64_t i = 0; i < call.top_k; ++i) weights[i] *= factor;
}

template <class T>
void route_rows(const RouteCall& call, const T* logits, const float* bias, float* weights, int64_t* experts) {
    share(call.rows, 8, call.rows * call.experts > 4096, [&](int64_t row) {
        route_row(call, logits + row * call.row_stride, bias, weights + row * call.top_k, experts + row * call.top_k);
    });
}

}  // namespace

// logits: strided rows; bias [experts] or null; weights and experts [rows, top_k]: dense. At most 1024 experts.
EXPORT(int, route)(int is_bf16, const void* logits, const float* bias, float* weights, int64_t* experts,
                   const RouteCall* call) {
    if (call->experts > MOST_EXPERTS) return BAD_ROW;
    if (is_bf16)
        route_rows(*call, (const bf16*)logits, bias, weights, experts);
    else
        route_rows(*call, (const float*)logits, bias, weights, experts);
    return OK;
}
