// A few rows times a matrix for each head, whose rows are added up: y[token, head] = sum of x[k] weight[head, k].
#include "../dot.hpp"

namespace {

struct HeadsCall {
    int64_t tokens, heads, inputs, outputs;
    int64_t x_stride, x_head_stride, head_stride, row_stride, y_stride, y_head_stride;  // in elements
};

template <class T> struct HeadsProduct {
    // What the registers hold of a row of the weight, beside the sums of MOST_TOGETHER tokens.
    static constexpr int VECTORS = W == 16 ? 4 : 2, COLUMNS = VECTORS * W;

    const HeadsCall& call;
    const T *x, *weight;
    T* y;

    template <int tokens> void multiply(const T* from, const T* columns, int count, T* to) const {
        Floats sums[tokens][VECTORS] = {};
        const auto add = [&](int64_t k, auto take) {
            Floats w[VECTORS];
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) w[c] = take(columns + k * call.row_stride + c * W, count - c * W);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const Floats v = splat(to_float(from[t * call.x_stride + k]));
#pragma GCC unroll 4
                for (int c = 0; c < VECTORS; ++c) sums[t][c] += v * w[c];
            }
        };
        if (count == COLUMNS)
            for (int64_t k = 0; k < call.inputs; ++k) add(k, [](const T* at, int) { return load(at); });
        else
            for (int64_t k = 0; k < call.inputs; ++k)
                add(k, [](const T* at, int n) { return n > 0 ? load_part(at, smaller(n, W)) : Floats{}; });
        for (int t = 0; t < tokens; ++t)
            for (int c = 0; c * W < count; ++c)
                store_up_to(to + t * call.y_stride + c * W, sums[t][c], smaller(W, count - c * W));
    }

    void run() const {
        const int64_t pieces = (call.outputs + COLUMNS - 1) / COLUMNS;
        const int64_t groups = (call.tokens + MOST_TOGETHER - 1) / MOST_TOGETHER;
        const bool parallel = call.heads * call.inputs * call.outputs * call.tokens > 65536;
        share(call.heads * pieces, 1, parallel, [&](int64_t item) {
            const int64_t head = item / pieces, first = item % pieces * COLUMNS;
            const T* const columns = weight + head * call.head_stride + first;
            const int count = int(smaller<int64_t>(COLUMNS, call.outputs - first));
            for (int64_t i = 0; i < groups; ++i) {
                const int64_t token = call.tokens * i / groups, end = call.tokens * (i + 1) / groups;
                const T* const from = x + token * call.x_stride + head * call.x_head_stride;
                T* const to = y + token * call.y_stride + head * call.y_head_stride + first;
                with_known(end - token,
                           [&](auto known) { multiply<decltype(known)::rows>(from, columns, count, to); });
            }
        });
    }
};

}  // namespace

// x [tokens, heads, inputs], weight [heads, inputs, outputs] and y [tokens, heads, outputs], dense along the last.
EXPORT(int, heads_linear)(int is_bf16, const void* x, const void* weight, void* y, const HeadsCall* call) {
    if (is_bf16)
        HeadsProduct<bf16>{*call, (const bf16*)x, (const bf16*)weight, (bf16*)y}.run();
    else
        HeadsProduct<float>{*call, (const float*)x, (const float*)weight, (float*)y}.run();
    return OK;
}
