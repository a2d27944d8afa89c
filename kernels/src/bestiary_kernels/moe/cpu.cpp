// Mixture of experts for a few tokens of each: every chosen expert's weights are read once, for all its tokens.
//
// One parallel region of two passes: the inner numbers of every choice, expert by expert, then the columns of y, each
// thread for all experts, so that nobody else adds to its sums. Included after activation/cpu.cpp, whose `activated` it
// uses.
#include "../dot.hpp"

namespace {

struct MoeCall {
    int64_t tokens, experts, width, inner, top_k, x_stride;
};

struct MoeChoices {
    const float* weights;
    const int64_t* experts;  // both [tokens, top_k]
};

// The choices of one expert: `count` from place `first` of the choices in the order of their experts.
struct Bucket {
    int64_t expert, first, count;
};

template <class T, int kind> struct Moe {
    typedef Along<T> Inputs;
    // Tokens that go together, the lines of weights that the registers hold beside them, and lines of one item.
    static constexpr int TOKENS = MOST_TOGETHER, LINES = W == 16 ? 4 : 2, BLOCK = 16;
    static constexpr int64_t WORTH_SHARING = 65536;

    const MoeCall& call;
    const MoeChoices& choices;
    const T *x, *gate_up, *down;
    T* y;
    Bucket* buckets = nullptr;
    int64_t* order = nullptr;  // the choices' numbers
    float* sums = nullptr;     // [tokens, width]
    T* hidden = nullptr;       // [choices in the order of their experts, inner]
    int64_t count = 0;

    // to[token * stride + line] = from[token] . lines[line]. `next` is how far beyond them the lines lie that come after.
    template <int tokens>
    static void multiply(const T* const* from, const T* const* lines, int64_t inputs, int64_t next, float* to,
                         int64_t stride) {
        Floats sum[tokens][LINES] = {};
        int64_t k = 0;
        const auto add = [&](auto take) {
            typename Inputs::Lanes w[LINES];
#pragma GCC unroll 4
            for (int line = 0; line < LINES; ++line) w[line] = take(lines[line] + k);
#pragma GCC unroll 8
            for (int token = 0; token < tokens; ++token) {
                const typename Inputs::Lanes v = take(from[token] + k);
#pragma GCC unroll 4
                for (int line = 0; line < LINES; ++line) sum[token][line] = Inputs::add(sum[token][line], v, w[line]);
            }
        };
        for (; k + Inputs::STEP <= inputs; k += Inputs::STEP) {
#pragma GCC unroll 4
            for (int line = 0; line < LINES; ++line) __builtin_prefetch(lines[line] + k + next);
            add([](const T* at) { return Inputs::take(at); });
        }
        if (const int rest = int(inputs - k)) add([=](const T* at) { return Inputs::take_part(at, rest); });
        for (int token = 0; token < tokens; ++token, to += stride) {
            if constexpr (LINES == 4) {
                const Floats four = sums_of(sum[token][0], sum[token][1], sum[token][2], sum[token][3]);
                memcpy(to, &four, 4 * sizeof *to);
            } else {
                for (int line = 0; line < LINES; ++line) to[line] = sum_of(sum[token][line]);
            }
        }
    }

    // body(first place, count) for groups of nearly equal size; the compiler knows the count.
    template <class Body> static void by_groups(const Bucket& bucket, Body body) {
        const int64_t groups = (bucket.count + TOKENS - 1) / TOKENS;
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t begin = bucket.count * i / groups, end = bucket.count * (i + 1) / groups;
            with_known(end - begin, [&](auto known) { body(bucket.first + begin, known); });
        }
    }

    static Floats rounded(const float* from) {
        T whole[W];
        store(whole, load(from));
        return load(whole);
    }

    // Which of two vectors' lanes are gates, or ups: they come by halves of the lines of one product.
    static Ints half_of(int which) {
        constexpr int half = LINES / 2;
        return lanes() / half * LINES + lanes() % half + which * half;
    }

    // A block of inner numbers for every token of an expert.
    void hide(const Bucket& bucket, int64_t start) const {
        const int lines = int(smaller<int64_t>(BLOCK, call.inner - start));
        const T* const gate = gate_up + (bucket.expert * 2 * call.inner + start) * call.width;
        by_groups(bucket, [&](int64_t first, auto known) { hide_group<decltype(known)::rows>(first, gate, start, lines); });
    }

    template <int tokens> void hide_group(int64_t first, const T* gate, int64_t start, int lines) const {
        constexpr int half = LINES / 2;
        const T *from[tokens], *at[LINES], *const up = gate + call.inner * call.width;
        for (int i = 0; i < tokens; ++i) from[i] = x + order[first + i] / call.top_k * call.x_stride;
        float both[tokens][2 * BLOCK];
        if (lines < BLOCK) memset(both, 0, sizeof both);
        for (int line = 0; line < lines; line += half) {
            for (int i = 0; i < half; ++i) {
                const int64_t offset = smaller(line + i, lines - 1) * call.width;
                at[i] = gate + offset, at[half + i] = up + offset;
            }
            multiply<tokens>(from, at, call.width, half * call.width, both[0] + 2 * line, 2 * BLOCK);
        }
        for (int token = 0; token < tokens; ++token)
            over_vectors(lines, [&](int64_t i, int n) {
                const Floats a = rounded(both[token] + 2 * i), b = rounded(both[token] + 2 * i + W);
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
        for (int64_t i = 0; i < count; ++i) add_expert(buckets[i], start, lines);
        for (int64_t token = 0; token < call.tokens; ++token)
            over_vectors(lines, [&](int64_t i, int n) {
                const int64_t place = token * call.width + start + i;
                store_up_to(y + place, load_up_to(sums + place, n), n);
            });
    }

    void add_expert(const Bucket& bucket, int64_t start, int lines) const {
        const T* const weight = down + (bucket.expert * call.width + start) * call.inner;
        by_groups(bucket, [&](int64_t first, auto known) { add_group<decltype(known)::rows>(first, weight, start, lines); });
    }

    template <int tokens> void add_group(int64_t first, const T* weight, int64_t start, int lines) const {
        const T *from[tokens], *at[LINES];
        for (int i = 0; i < tokens; ++i) from[i] = hidden + (first + i) * call.inner;
        float said[tokens][BLOCK];
        if (lines < BLOCK) memset(said, 0, sizeof said);
        for (int line = 0; line < lines; line += LINES) {
            for (int i = 0; i < LINES; ++i) at[i] = weight + smaller(line + i, lines - 1) * call.inner;
            multiply<tokens>(from, at, call.inner, LINES * call.inner, said[0] + line, BLOCK);
        }
        for (int token = 0; token < tokens; ++token) {
            const int64_t choice = order[first + token];
            float* const to = sums + choice / call.top_k * call.width + start;
            over_vectors(lines, [&](int64_t i, int n) {
                store_up_to(to + i, load_up_to(to + i, n) + rounded(said[token] + i) * choices.weights[choice], n);
            });
        }
    }

    bool has_memory() {
        const int64_t all = call.tokens * call.top_k;
        const size_t fixed = size_t(call.experts) * sizeof *buckets + size_t(all) * sizeof *order;
        const size_t numbers = size_t(call.tokens * call.width) * sizeof *sums + size_t(all * call.inner) * sizeof(T);
        buckets = (Bucket*)scratch(fixed + numbers);
        order = (int64_t*)(buckets + call.experts);
        sums = (float*)(order + all);
        hidden = (T*)(sums + call.tokens * call.width);
        return buckets;
    }

    // The chosen experts' buckets, close together.
    void sort_choices() {
        const int64_t all = call.tokens * call.top_k;
        for (int64_t expert = 0; expert < call.experts; ++expert) buckets[expert] = {expert, 0, 0};
        for (int64_t i = 0; i < all; ++i) ++buckets[choices.experts[i]].count;
        for (int64_t expert = 0, before = 0; expert < call.experts; before += buckets[expert++].count)
            buckets[expert].first = before;
        for (int64_t i = 0; i < all; ++i) order[buckets[choices.experts[i]].first++] = i;
        for (int64_t expert = 0; expert < call.experts; ++expert) {
            buckets[expert].first -= buckets[expert].count;
            if (buckets[expert].count) buckets[count++] = buckets[expert];
        }
    }

    void run() const {
        const int64_t pieces = (call.inner + BLOCK - 1) / BLOCK, hides = count * pieces;
        const int64_t combines = (call.width + BLOCK - 1) / BLOCK;
        const int64_t work = call.tokens * call.top_k * call.width * call.inner;
        const bool parallel = work >= WORTH_SHARING;
        share(hides, hides / (16 * omp_get_max_threads()) + 1, parallel,
              [&](int64_t item) { hide(buckets[item / pieces], item % pieces * BLOCK); });
        share(combines, 1, parallel, [&](int64_t item) { combine(item * BLOCK); });
    }
};

template <class T, int kind> int mix(Moe<T, kind> moe) {
    if (!moe.has_memory()) return NO_MEMORY;
    moe.sort_choices();
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
    for (int64_t i = 0; i < call->tokens * call->top_k; ++i)
        if (experts[i] < 0 || experts[i] >= call->experts) return BAD_EXPERT;
    const MoeChoices choices{weights, experts};
    if (is_bf16) return mix_kind<bf16>(kind, *call, choices, x, gate_up, down, y);
    return mix_kind<float>(kind, *call, choices, x, gate_up, down, y);
}
