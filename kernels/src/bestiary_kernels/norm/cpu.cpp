// Residual sum and norm of each row in one pass over memory: the row is read again from the first-level cache.
#include "../simd.hpp"

namespace {

// A row of [tokens, heads, width] views; a matrix has one head.
struct NormRows {
    int64_t tokens, heads, width, token_stride, head_stride;

    // body(x, the sum's row or null, y, the head) of every row.
    template <class T, class Body> void each(const T* x, T* residual, T* y, Body body) const {
        const int64_t count = tokens * heads;
        share(count, 8, count * width > 32768, [&](int64_t row) {
            const int64_t head = row % heads;
            T* const sum = residual ? residual + row * width : nullptr;
            body(x + row / heads * token_stride + head * head_stride, sum, y + row * width, head);
        });
    }
};

// body(h) over a row, after x has been added to the residual: rounded, as the norm sees what the next layer will read.
template <class T, class Body> inline void over_sum(const T* x, T* residual, int64_t width, Body body) {
    over_vectors(width, [&](int64_t i, int n) {
        if (residual) store_up_to(residual + i, load_up_to(x + i, n) + load_up_to(residual + i, n), n);
        body(load_up_to((residual ? residual : x) + i, n));
    });
}

template <class T>
void norm_row(const T* x, T* residual, const T* weight, T* y, int64_t width, float eps, float weight_offset) {
    Floats squares{};
    over_sum(x, residual, width, [&](Floats h) { squares += h * h; });
    const float scale = 1.0f / sqrtf(sum_of(squares) / float(width) + eps);
    const T* const h = residual ? residual : x;
    over_vectors(width, [&](int64_t i, int n) {
        store_up_to(y + i, load_up_to(h + i, n) * scale * (load_up_to(weight + i, n) + weight_offset), n);
    });
}

template <class T>
void norm_rows(const T* x, T* residual, const T* weight, T* y, NormRows rows, float eps, float weight_offset) {
    rows.each(x, residual, y, [&](const T* from, T* sum, T* to, int64_t) {
        norm_row(from, sum, weight, to, rows.width, eps, weight_offset);
    });
}

// The spread is that of the centred row, in a pass of its own: a sum of squares less the mean's would cancel. What lies
// past a row's end must not count there, hence the loop of its own for the last lanes.
template <class T> inline float spread_of(const T* h, float mean, int64_t width) {
    Floats squares{};
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        const Floats centred = load(h + i) - mean;
        squares += centred * centred;
    }
    float rest = 0.0f;
    for (; i < width; ++i) rest += (to_float(h[i]) - mean) * (to_float(h[i]) - mean);
    return (sum_of(squares) + rest) / float(width);
}

template <class T>
void layer_norm_row(const T* x, T* residual, const T* weight, const T* bias, T* y, int64_t width, float eps) {
    Floats total{};
    over_sum(x, residual, width, [&](Floats h) { total += h; });
    const T* const h = residual ? residual : x;
    const float mean = sum_of(total) / float(width);
    const float scale = 1.0f / sqrtf(spread_of(h, mean, width) + eps);
    over_vectors(width, [&](int64_t i, int n) {
        Floats value = (load_up_to(h + i, n) - mean) * scale;
        if (weight) value *= load_up_to(weight + i, n);
        if (bias) value += load_up_to(bias + i, n);
        store_up_to(y + i, value, n);
    });
}

template <class T>
void layer_norm_rows(const T* x, T* residual, const T* weight, const T* bias, T* y, NormRows rows,
                     int64_t weight_stride, int64_t bias_stride, float eps) {
    rows.each(x, residual, y, [&](const T* from, T* sum, T* to, int64_t head) {
        const T* const factor = weight ? weight + head * weight_stride : nullptr;
        const T* const added = bias ? bias + head * bias_stride : nullptr;
        layer_norm_row(from, sum, factor, added, to, rows.width, eps);
    });
}

}  // namespace

// x: strided rows; residual (or null) and y: dense rows. The residual becomes the sum.
EXPORT(int, add_rms_norm)(int is_bf16, const void* x, void* residual, const void* weight, void* y, int64_t tokens,
                          int64_t heads, int64_t width, int64_t token_stride, int64_t head_stride, float eps,
                          float weight_offset) {
    const NormRows rows{tokens, heads, width, token_stride, head_stride};
    if (is_bf16)
        norm_rows((const bf16*)x, (bf16*)residual, (const bf16*)weight, (bf16*)y, rows, eps, weight_offset);
    else
        norm_rows((const float*)x, (float*)residual, (const float*)weight, (float*)y, rows, eps, weight_offset);
    return OK;
}

// As above; weight and bias are dense rows of each head, or one row where their stride is 0, or null.
EXPORT(int, add_layer_norm)(int is_bf16, const void* x, void* residual, const void* weight, const void* bias, void* y,
                            int64_t tokens, int64_t heads, int64_t width, int64_t token_stride, int64_t head_stride,
                            int64_t weight_stride, int64_t bias_stride, float eps) {
    const NormRows rows{tokens, heads, width, token_stride, head_stride};
    if (is_bf16)
        layer_norm_rows((const bf16*)x, (bf16*)residual, (const bf16*)weight, (const bf16*)bias, (bf16*)y, rows,
                        weight_stride, bias_stride, eps);
    else
        layer_norm_rows((const float*)x, (float*)residual, (const float*)weight, (const float*)bias, (float*)y, rows,
                        weight_stride, bias_stride, eps);
    return OK;
}
