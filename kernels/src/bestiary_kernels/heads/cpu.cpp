// A few rows times a matrix for each head, whose rows are added up: y[token, head] = sum of x[k] weight[head, k].
#include "../dot.hpp"

namespace {

struct HeadsCall {
    int64_t tokens, heads, inputs, outputs;
    int64_t x_stride, x_head_stride, head_stride, row_stride, y_stride, y_head_stride;  // in elements
};

// Rows of a matrix that are added up, STEP at a time, and numbers of x that they are multiplied with.
template <class T> struct Down {
    typedef Floats Lanes;
    static constexpr int STEP = 1;
    static Lanes take(const T* at, int64_t, int, int n) { return load_up_to(at, n); }
    static Lanes spread(const T* x, int) { return splat(to_float(*x)); }
    static Floats add(Floats sum, Lanes a, Lanes b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two rows: a lane holds a column's numbers of both.
template <> struct Down<bf16> {
    typedef __m512bh Lanes;
    static constexpr int STEP = 2;
    static Words column(const bf16* at, int n) {
        if (n == W) return widen(read_as<Halves>(at));
        bf16 whole[W] = {};
        memcpy(whole, at, size_t(n) * sizeof *at);
        return widen(read_as<Halves>(whole));
    }
    static Lanes take(const bf16* at, int64_t stride, int rows, int n) {
        const Words first = column(at, n);
        return (Lanes)(rows == 1 ? first : first | column(at + stride, n) << 16);
    }
    static Lanes spread(const bf16* x, int rows) {
        return (Lanes)_mm512_set1_epi32(rows == 1 ? read_as<uint16_t>(x) : read_as<int>(x));
    }
    static Floats add(Floats sum, Lanes a, Lanes b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

template <class T> struct HeadsProduct {
    // What the registers hold of a row of the weight, beside the sums of MOST_TOGETHER tokens.
    static constexpr int VECTORS = W == 16 ? 4 : 2, COLUMNS = VECTORS * W, STEP = Down<T>::STEP;

    const HeadsCall& call;
    const T *x, *weight;
    T* y;

    template <int tokens, bool whole> void multiply(const T* from, const T* columns, int count, T* to) const {
        Floats sums[tokens][VECTORS] = {};
        const auto add = [&](int64_t k, int rows) {
            typename Down<T>::Lanes w[VECTORS];
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) {
                const int n = whole ? W : count < c * W ? 0 : smaller(W, count - c * W);
                w[c] = Down<T>::take(columns + k * call.row_stride + c * W, call.row_stride, rows, n);
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const auto v = Down<T>::spread(from + t * call.x_stride + k, rows);
#pragma GCC unroll 4
                for (int c = 0; c < VECTORS; ++c) sums[t][c] = Down<T>::add(sums[t][c], v, w[c]);
            }
        };
        int64_t k = 0;
        for (; k + STEP <= call.inputs; k += STEP) add(k, STEP);
        if (k < call.inputs) add(k, 1);
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
                with_known(end - token, [&](auto known) {
                    constexpr int tokens = decltype(known)::rows;
                    if (count == COLUMNS)
                        multiply<tokens, true>(from, columns, count, to);
                    else
                        multiply<tokens, false>(from, columns, count, to);
                });
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
