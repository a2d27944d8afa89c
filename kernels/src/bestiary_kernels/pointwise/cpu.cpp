// Sums and products of single numbers: x + y, x + sigmoid(gate) y, and x times a factor, softly capped.
#include "../attention/softmax.hpp"  // tanh_of

namespace {

// A few thousand values are work enough to share.
constexpr int64_t POINTWISE_PIECE = 2048, POINTWISE_SHARED = 16384;

template <class T> void add_rows(const T* x, const T* y, const T* gate, T* out, int64_t rows, int64_t width) {
    const int64_t pieces = (width + POINTWISE_PIECE - 1) / POINTWISE_PIECE;
    share(rows * pieces, 4, rows * width > POINTWISE_SHARED, [&](int64_t item) {
        const int64_t row = item / pieces, start = item % pieces * POINTWISE_PIECE, first = row * width + start;
        const Floats factor = gate ? 1.0f / (1.0f + exp_of(-splat(to_float(gate[row])))) : splat(1.0f);
        over_vectors(smaller(POINTWISE_PIECE, width - start), [&](int64_t i, int n) {
            const Floats sum = load_up_to(x + first + i, n) + factor * load_up_to(y + first + i, n);
            store_up_to(out + first + i, sum, n);
        });
    });
}

template <class T> void scale_all(const T* x, T* y, int64_t count, float factor, float cap) {
    T rounded[W];
    store(rounded, splat(factor));
    const Floats times = load(rounded);
    share((count + POINTWISE_PIECE - 1) / POINTWISE_PIECE, 4, count > POINTWISE_SHARED, [&](int64_t item) {
        const int64_t first = item * POINTWISE_PIECE;
        over_vectors(smaller(POINTWISE_PIECE, count - first), [&](int64_t i, int n) {
            Floats value = load_up_to(x + first + i, n) * times;
            if (cap > 0) value = cap * tanh_of(value / cap);
            store_up_to(y + first + i, value, n);
        });
    });
}

}  // namespace

// x, y and out [rows, width], gate [rows] or null: dense.
EXPORT(int, add)(int is_bf16, const void* x, const void* y, const void* gate, void* out, int64_t rows, int64_t width) {
    if (is_bf16)
        add_rows((const bf16*)x, (const bf16*)y, (const bf16*)gate, (bf16*)out, rows, width);
    else
        add_rows((const float*)x, (const float*)y, (const float*)gate, (float*)out, rows, width);
    return OK;
}

// `count` values in a line; a cap of 0 is none.
EXPORT(int, scaled)(int is_bf16, const void* x, void* y, int64_t count, float factor, float cap) {
    if (is_bf16)
        scale_all((const bf16*)x, (bf16*)y, count, factor, cap);
    else
        scale_all((const float*)x, (float*)y, count, factor, cap);
    return OK;
}
