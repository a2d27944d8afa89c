// A matrix of the expert that a choice names, times its row: each chosen expert's is read once, for all its rows.
#include "chosen.hpp"

namespace {

struct ExpertsCall {
    int64_t choices, each, experts, inputs, outputs, x_stride;  // `each` choices share a row of x
};

template <class T> struct ExpertsLinear {
    typedef Lines<T> Product;
    static constexpr int BLOCK = Product::BLOCK;

    const ExpertsCall& call;
    const T *x, *weight;
    T* y;
    Buckets buckets;

    // A block of outputs for every choice of an expert.
    void multiply(const Bucket& bucket, int64_t start) const {
        const int lines = int(smaller<int64_t>(BLOCK, call.outputs - start));
        const T* const from = weight + (bucket.expert * call.outputs + start) * call.inputs;
        Product::by_groups(bucket, [&](int64_t first, auto known) {
            multiply_group<decltype(known)::rows>(buckets.order + first, from, start, lines);
        });
    }

    template <int choices>
    void multiply_group(const int64_t* choice, const T* from, int64_t start, int lines) const {
        const T* rows[choices];
        for (int i = 0; i < choices; ++i) rows[i] = x + choice[i] / call.each * call.x_stride;
        float said[choices][BLOCK];
        Product::template multiply_block<choices>(rows, from, call.inputs, lines, said);
        for (int i = 0; i < choices; ++i) {
            T* const to = y + choice[i] * call.outputs + start;
            over_vectors(lines, [&](int64_t at, int n) { store_up_to(to + at, load(said[i] + at), n); });
        }
    }

    void run() const {
        const int64_t pieces = (call.outputs + BLOCK - 1) / BLOCK, items = buckets.count * pieces;
        const bool parallel = call.choices * call.inputs * call.outputs >= Product::WORTH_SHARING;
        share(items, items / (16 * omp_get_max_threads()) + 1, parallel,
              [&](int64_t item) { multiply(buckets.all[item / pieces], item % pieces * BLOCK); });
    }
};

template <class T>
void multiply_experts(const ExpertsCall& call, const Buckets& buckets, const void* x, const void* weight, void* y) {
    ExpertsLinear<T>{call, (const T*)x, (const T*)weight, (T*)y, buckets}.run();
}

}  // namespace

// x: strided rows; weight [experts, outputs, inputs], experts [choices] and y [choices, outputs]: dense. Experts'
// numbers are looked at before anything is written.
EXPORT(int, experts_linear)(int is_bf16, const void* x, const void* weight, const int64_t* experts, void* y,
                            const ExpertsCall* call) {
    if (!are_experts(experts, call->choices, call->experts)) return BAD_EXPERT;
    void* const memory = scratch(Buckets::bytes(call->experts, call->choices));
    if (!memory) return NO_MEMORY;
    const Buckets buckets = Buckets::sorted(memory, call->experts, experts, call->choices);
    const auto multiply = is_bf16 ? multiply_experts<bf16> : multiply_experts<float>;
    multiply(*call, buckets, x, weight, y);
    return OK;
}
