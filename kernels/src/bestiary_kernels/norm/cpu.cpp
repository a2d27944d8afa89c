// Residual sum and RMS norm of each row in one pass over memory: the row is read again from the first-level cache.
#include "../simd.hpp"

namespace {

// A row of [tokens, heads, width] views; a matrix has one head.
struct NormRows {
    int64_t tokens, heads, width, token_stride, head_stride;
};

template <class T>
void norm_row(const T* x, T* residual, const T* weight, T* y, int64_t width, float eps, float weight_offset) {
    Floats squares{};
    over_vectors(width, [&](int64_t i, int n) {
        Floats h = load_up_to(x + i, n);
        if (residual) {
            store_up_to(residual + i, h + load_up_to(residual + i, n), n);
            h = load_up_to(residual + i, n);  // rounded: the norm sees what the next layer will read
        }
        squares += h * h;
    });
    const float scale = 1.0f / sqrtf(sum_of(squares) / float(width) + eps);
    const T* const h = residual ? residual : x;
    over_vectors(width, [&](int64_t i, int n) {
        store_up_to(y + i, load_up_to(h + i, n) * scale * (load_up_to(weight + i, n) + weight_offset), n);
    });
}

template <class T>
void norm_rows(const T* x, T* residual, const T* weight, T* y, NormRows rows, float eps, float weight_offset) {
    const int64_t count = rows.tokens * rows.heads;
    share(count, 8, count * rows.width > 32768, [&](int64_t row) {
        const T* const from = x + row / rows.heads * rows.token_stride + row % rows.heads * rows.head_stride;
        T* const sum = residual ? residual + row * rows.width : nullptr;
        norm_row(from, sum, weight, y + row * rows.width, rows.width, eps, weight_offset);
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
