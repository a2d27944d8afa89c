// Mixture of experts for a few tokens of each: every chosen expert's weights are read once, for all its tokens.
//
// One parallel region of two passes: the inner numbers of every choice, expert by expert, then the columns of y, each
// thread for all experts, so that nobody else adds to its sums. Included after activation/cpu.cpp, whose `activated` it
// uses.
#include "chosen.hpp"

namespace {

struct MoeCall {
    int64_t tokens, experts, width, inner, top_k, x_stride;
};

struct MoeChoices {
    const float* weights;
    const int64_t* experts;  // both [tokens, top_k]
};

template <class T, int kind> struct Moe {
    typedef Lines<T> Product;
    static constexpr int LINES = Product::LINES, BLOCK = Product::BLOCK;

    const MoeCall& call;
    const MoeChoices& choices;
    const T *x, *gate_up, *down;
    T* y;
    Buckets buckets = {};
    float* sums = nullptr;  // [tokens, width]
    T* hidden = nullptr;    // [choices in the order of their experts, inner]

    // Which of two vectors' lanes are gates, or ups: they come by halves of the lines of one product.
    static Ints half_of(int which) {
        constexpr int half = LINES / 2;
        return lanes() / half * LINES + lanes() % half + which * half;
    }

    // A block of inner numbers for every token of an expert.
    void hide(const Bucket& bucket, int64_t start) const {
        const int lines = int(smaller<int64_t>(BLOCK, call.inner - start));
        const T* const gate = gate_up + (bucket.expert * 2 * call.inner + start) * call.width;
        Product::by_groups(
            bucket, [&](int64_t first, auto known) { hide_group<decltype(known)::rows>(first, gate, start, lines); });
    }

    template <int tokens> void hide_group(int64_t first, const T* gate, int64_t start, int lines) const {
        constexpr int half = LINES / 2;
        const T *from[tokens], *at[LINES], *const up = gate + call.inner * call.width;
        for (int i = 0; i < tokens; ++i) from[i] = x + buckets.order[first + i] / call.top_k * call.x_stride;
        float both[tokens][2 * BLOCK];
        if (lines < BLOCK) memset(both, 0, sizeof both);
        for (int line = 0; line < lines; line += half) {
            for (int i = 0; i < half; ++i) {
                const int64_t offset = smaller(line + i, lines - 1) * call.width;
                at[i] = gate + offset, at[half + i] = up + offset;
            }
            Product::template multiply<tokens>(from, at, call.width, half * call.width, both[0] + 2 * line, 2 * BLOCK);
        }
        for (int token = 0; token < tokens; ++token)
            over_vectors(lines, [&](int64_t i, int n) {
                const Floats a = Product::rounded(both[token] + 2 * i), b = Product::rounded(both[token] + 2 * i + W);
                const Floats act = activated<kind>(__builtin_shuffle(a, b, half_of(0)));
                T* const to = hidden + (first + token) * call.inner + start + i;
                store_up_to(to, act * __builtin_shuffle(a, b, half_of(1)), n);
            });
    }

    // A block of y's columns for every token, from all experts.
    void combine(int64_t start) const {
        const int lines = int(smaller<int64_t>(BLOCK, call.width - start));
        for (int64_t token = 0; token < call.tokens; ++token)
            memset(sums + token * call.width + start, 0, size_t(lines) * sizeof *sums);
        for (int64_t i = 0; i < buckets.count; ++i) add_expert(buckets.all[i], start, lines);
        for (int64_t token = 0; token < call.tokens; ++token)
            over_vectors(lines, [&](int64_t i, int n) {
                const int64_t place = token * call.width + start + i;
                store_up_to(y + place, load_up_to(sums + place, n), n);
            });
    }

    void add_expert(const Bucket& bucket, int64_t start, int lines) const {
        const T* const weight = down + (bucket.expert * call.width + start) * call.inner;
        Product::by_groups(
            bucket, [&](int64_t first, auto known) { add_group<decltype(known)::rows>(first, weight, start, lines); });
    }

    template <int tokens> void add_group(int64_t first, const T* weight, int64_t start, int lines) const {
        const T* from[tokens];
        for (int i = 0; i < tokens; ++i) from[i] = hidden + (first + i) * call.inner;
        float said[tokens][BLOCK];
        Product::template multiply_block<tokens>(from, weight, call.inner, lines, said);
        for (int token = 0; token < tokens; ++token) {
            const int64_t choice = buckets.order[first + token];
            float* const to = sums + choice / call.top_k * call.width + start;
            over_vectors(lines, [&](int64_t i, int n) {
                store_up_to(to + i, load_up_to(to + i, n) + Product::rounded(said[token] + i) * choices.weights[choice], n);
            });
        }
    }

    bool has_memory() {
        const int64_t all = call.tokens * call.top_k;
        const size_t numbers = size_t(call.tokens * call.width) * sizeof *sums + size_t(all * call.inner) * sizeof(T);
        char* const memory = (char*)scratch(Buckets::bytes(call.experts, all) + numbers);
        if (!memory) return false;
        buckets = Buckets::sorted(memory, call.experts, choices.experts, all);
        sums = (float*)(memory + Buckets::bytes(call.experts, all));
        hidden = (T*)(sums + call.tokens * call.width);
        return true;
    }

    void run() const {
        const int64_t pieces = (call.inner + BLOCK - 1) / BLOCK, hides = buckets.count * pieces;
        const int64_t combines = (call.width + BLOCK - 1) / BLOCK;
        const int64_t work = call.tokens * call.top_k * call.width * call.inner;
        const bool parallel = work >= Product::WORTH_SHARING;
        share(hides, hides / (16 * omp_get_max_threads()) + 1, parallel,
              [&](int64_t item) { hide(buckets.all[item / pieces], item % pieces * BLOCK); });
        share(combines, 1, parallel, [&](int64_t item) { combine(item * BLOCK); });
    }
};

template <class T, int kind> int mix(Moe<T, kind> moe) {
    if (!moe.has_memory()) return NO_MEMORY;
    moe.run();
    return OK;
}

template <class T>
int mix_kind(int kind, const MoeCall& call, const MoeChoices& choices, const void* x, const void* gate_up,
             const void* down, void* y) {
    switch (kind) {
        case SILU: return mix<T, SILU>({call, choices, (const T*)x, (const T*)gate_up, (const T*)down, (T*)y});
        case GELU: return mix<T, GELU>({call, choices, (const T*)x, (const T*)gate_up, (const T*)down, (T*)y});
        case GELU_TANH: return mix<T, GELU_TANH>({call, choices, (const T*)x, (const T*)gate_up, (const T*)down, (T*)y});
        default: return mix<T, RELU>({call, choices, (const T*)x, (const T*)gate_up, (const T*)down, (T*)y});
    }
}

}  // namespace

// x: strided rows; gate_up [experts, 2 inner, width], down [experts, width, inner], weights and experts [tokens, top_k]
// and y [tokens, width]: dense. Experts' numbers are looked at before anything is written.
EXPORT(int, moe)(int is_bf16, int kind, const void* x, const void* gate_up, const void* down, const float* weights,
                 const int64_t* experts, void* y, const MoeCall* call) {
    if (!are_experts(experts, call->tokens * call->top_k, call->experts)) return BAD_EXPERT;
    const MoeChoices choices{weights, experts};
    if (is_bf16) return mix_kind<bf16>(kind, *call, choices, x, gate_up, down, y);
    return mix_kind<float>(kind, *call, choices, x, gate_up, down, y);
}
