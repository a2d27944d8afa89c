// Gated activation: y = act(gate) * up over rows that hold gate and up side by side.
#include "../simd.hpp"

namespace {

// The order of KINDS in activation/__init__.py.
enum Kind : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

inline Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

template <int kind> inline Floats activated(Floats x) {
    if constexpr (kind == SILU) return silu(x);
    if constexpr (kind == RELU) return x < 0.0f ? Floats{} : x;  // a NaN is not below zero and stays
    if constexpr (kind == GELU) {
        const Floats magnitude = x < 0.0f ? -x : x;
        const Floats tail = 0.5f * erfc_of(magnitude * 0.70710678f);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    // x (1 + tanh u) / 2 is x sigmoid(2u)
    const Floats doubled = 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_of(-doubled));
}

template <class T, int kind> void gate_rows(const T* gate_up, T* y, int64_t rows, int64_t width, int64_t row_stride) {
    // A few thousand values are work enough to share; prefill rows are cut so that every thread finds a piece.
    constexpr int64_t piece = 2048;
    const int64_t pieces = (width + piece - 1) / piece;
    share(rows * pieces, 4, rows * width > 16384, [&](int64_t item) {
        const int64_t row = item / pieces, start = item % pieces * piece;
        const T* const gate = gate_up + row * row_stride + start;
        T* const to = y + row * width + start;
        over_vectors(smaller(piece, width - start), [&](int64_t i, int n) {
            store_up_to(to + i, activated<kind>(load_up_to(gate + i, n)) * load_up_to(gate + width + i, n), n);
        });
    });
}

template <class T> void gate_kind(int kind, const T* gate_up, T* y, int64_t rows, int64_t width, int64_t row_stride) {
    switch (kind) {
        case SILU: return gate_rows<T, SILU>(gate_up, y, rows, width, row_stride);
        case GELU: return gate_rows<T, GELU>(gate_up, y, rows, width, row_stride);
        case GELU_TANH: return gate_rows<T, GELU_TANH>(gate_up, y, rows, width, row_stride);
        default: return gate_rows<T, RELU>(gate_up, y, rows, width, row_stride);
    }
}

}  // namespace

EXPORT(int, gated_activation)(int is_bf16, int kind, const void* gate_up, void* y, int64_t rows, int64_t width,
                              int64_t row_stride) {
    if (is_bf16)
        gate_kind(kind, (const bf16*)gate_up, (bf16*)y, rows, width, row_stride);
    else
        gate_kind(kind, (const float*)gate_up, (float*)y, rows, width, row_stride);
    return OK;
}
