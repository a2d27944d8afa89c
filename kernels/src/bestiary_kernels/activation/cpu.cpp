// Activation y = act(x), and gated activation y = act(gate) * up over rows that hold gate and up side by side.
#include "../simd.hpp"

namespace {

// The order of the kinds in activation/__init__.py; only the first four gate.
enum Kind : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, QUICK_GELU = 5 };

inline Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }  // a NaN is not below zero and stays

template <int kind> inline Floats activated(Floats x) {
    if constexpr (kind == SILU) return silu(x);
    if constexpr (kind == RELU) return relu(x);
    if constexpr (kind == RELU2) return relu(x) * relu(x);
    if constexpr (kind == QUICK_GELU) return x / (1.0f + exp_of(-1.702f * x));
    if constexpr (kind == GELU) {
        const Floats magnitude = x < 0.0f ? -x : x;
        const Floats tail = 0.5f * erfc_of(magnitude * 0.70710678f);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    // x (1 + tanh u) / 2 is x sigmoid(2u)
    const Floats doubled = 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_of(-doubled));
}

// Rows of x, or with `gated` of gate and up side by side.
struct ActivationRows {
    int64_t rows, width, row_stride;

    template <class T, int kind, bool gated> void run(const T* x, T* y) const {
        // A few thousand values are work enough to share; long rows are cut so that every thread finds a piece.
        constexpr int64_t piece = 2048;
        const int64_t pieces = (width + piece - 1) / piece;
        share(rows * pieces, 4, rows * width > 16384, [&](int64_t item) {
            const int64_t row = item / pieces, start = item % pieces * piece;
            const T* const from = x + row * row_stride + start;
            T* const to = y + row * width + start;
            over_vectors(smaller(piece, width - start), [&](int64_t i, int n) {
                Floats value = activated<kind>(load_up_to(from + i, n));
                if constexpr (gated) value *= load_up_to(from + width + i, n);
                store_up_to(to + i, value, n);
            });
        });
    }
};

template <bool gated, class T> void activate(int kind, const T* x, T* y, ActivationRows rows) {
    switch (kind) {
        case SILU: return rows.run<T, SILU, gated>(x, y);
        case GELU: return rows.run<T, GELU, gated>(x, y);
        case GELU_TANH: return rows.run<T, GELU_TANH, gated>(x, y);
        case RELU: return rows.run<T, RELU, gated>(x, y);
    }
    if constexpr (!gated) {
        if (kind == RELU2) return rows.run<T, RELU2, gated>(x, y);
        rows.run<T, QUICK_GELU, gated>(x, y);
    }
}

}  // namespace

EXPORT(int, gated_activation)(int is_bf16, int kind, const void* gate_up, void* y, int64_t rows, int64_t width,
                              int64_t row_stride) {
    if (is_bf16)
        activate<true>(kind, (const bf16*)gate_up, (bf16*)y, {rows, width, row_stride});
    else
        activate<true>(kind, (const float*)gate_up, (float*)y, {rows, width, row_stride});
    return OK;
}

EXPORT(int, activation)(int is_bf16, int kind, const void* x, void* y, int64_t rows, int64_t width,
                        int64_t row_stride) {
    if (is_bf16)
        activate<false>(kind, (const bf16*)x, (bf16*)y, {rows, width, row_stride});
    else
        activate<false>(kind, (const float*)x, (float*)y, {rows, width, row_stride});
    return OK;
}
