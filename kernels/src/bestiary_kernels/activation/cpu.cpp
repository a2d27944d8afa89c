// Activation y = act(x), and gated activation y = act(gate) * up over rows that hold gate and up side by side.
#include "../simd.hpp"

namespace {

// The order of the kinds in activation/__init__.py; only the first four gate.
enum Kind : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, QUICK_GELU = 5 };

inline Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }  // a NaN is not below zero and stays

// relu(x) - m erfc(m / sqrt 2) / 2 with m = |x|, so that the far negative tail keeps its digits. erfc(z) / 2 is
// t e^(-z^2 + f(t)), t = 1 / (1 + z / 2); f is our own least-squares fit (8.5e-8), its last number lowered by ln 2, and
// its pairs are summed as a tree, which waits less. Infinity would meet t = 0, hence the bound, where the tail is 0.
inline Floats gelu(Floats x) {
    const Floats far = splat(1e4f);
    Floats m = (Floats)((Words)x & 0x7fffffffu);
    m = m > far ? far : m;
    const Floats t = 1.0f / (1.0f + 0.35355339f * m), t2 = t * t;
    const Floats high = (t * 1.787034552e-1f - 8.599416930e-1f) * t2 + (t * 1.565589974f - 1.221623523f);
    const Floats low = (t * 3.368944062e-1f - 2.101132605e-1f) * t2 + (t * 1.026416263e-1f + 3.732846628e-1f);
    const Floats f = (high * (t2 * t2) + low) * t2 + (t * 1.000077938f - 1.958660683f);
    return relu(x) - m * t * exp_of(f - 0.5f * m * m);
}

template <int kind> inline Floats activated(Floats x) {
    if constexpr (kind == SILU) return silu(x);
    if constexpr (kind == RELU) return relu(x);
    if constexpr (kind == RELU2) return relu(x) * relu(x);
    if constexpr (kind == QUICK_GELU) return x / (1.0f + exp_of(-1.702f * x));
    if constexpr (kind == GELU) return gelu(x);
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
