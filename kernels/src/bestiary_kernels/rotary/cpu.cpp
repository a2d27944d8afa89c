// Rotary embedding: of q and k in place with the write of k and v into their cache slots, or into memory of its own.
#include "../simd.hpp"

namespace {

struct RotaryCall {
    int64_t tokens, q_heads, kv_heads, width, rotary_width;
    int64_t q_stride, k_stride, v_stride;        // elements from one token to the next
    int64_t k_block_stride, v_block_stride;      // elements from one cache block to the next
    int64_t blocks, block_size, max_position;
    int interleaved;
};

// `from` and `to` are one head, which may be the same.
template <class T> inline void rotate_halves(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
    over_vectors(half, [&](int64_t i, int n) {
        const Floats a = load_up_to(from + i, n), b = load_up_to(from + half + i, n);
        const Floats c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
        store_up_to(to + i, a * c - b * s, n);
        store_up_to(to + half + i, b * c + a * s, n);
    });
}

// Pairs sit side by side: turned through two short buffers, so that the arithmetic is the one above.
template <class T> inline void rotate_pairs(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
    over_vectors(half, [&](int64_t i, int n) {
        T turned[2 * W] = {};
        for (int j = 0; j < n; ++j) turned[j] = from[2 * (i + j)], turned[W + j] = from[2 * (i + j) + 1];
        const Floats a = load(turned), b = load(turned + W);
        const Floats c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
        store(turned, a * c - b * s);
        store(turned + W, b * c + a * s);
        for (int j = 0; j < n; ++j) to[2 * (i + j)] = turned[j], to[2 * (i + j) + 1] = turned[W + j];
    });
}

template <class T>
inline void rotate_head(const T* from, T* to, const float* cos_sin, int64_t rotary_width, bool interleaved) {
    const int64_t half = rotary_width / 2;
    if (interleaved)
        rotate_pairs(from, to, cos_sin, cos_sin + half, half);
    else
        rotate_halves(from, to, cos_sin, cos_sin + half, half);
}

template <class T> void rotate_heads(T* x, int64_t heads, const RotaryCall& call, const float* cos_sin) {
    for (int64_t head = 0; head < heads; ++head, x += call.width)
        rotate_head(x, x, cos_sin, call.rotary_width, call.interleaved);
}

template <class T>
void write_heads(const T* from, T* cache, int64_t block_stride, int64_t slot, const RotaryCall& call) {
    const int64_t block = slot / call.block_size, offset = slot % call.block_size;
    T* to = cache + block * block_stride + offset * call.width;
    for (int64_t head = 0; head < call.kv_heads; ++head)
        memcpy(to + head * call.block_size * call.width, from + head * call.width, size_t(call.width) * sizeof(T));
}

// Everything is looked at before anything is written, so that a refused call changes nothing.
int check_rotary(const RotaryCall& call, bool rotates, const int64_t* positions, const int64_t* slots) {
    for (int64_t token = 0; token < call.tokens; ++token) {
        if (slots[token] >= call.blocks * call.block_size) return BAD_SLOT;
        if (rotates && (positions[token] < 0 || positions[token] >= call.max_position)) return BAD_POSITION;
    }
    return OK;
}

template <class T>
void rotate_and_write(const RotaryCall& call, T* q, T* k, const T* v, const float* cos_sin, const int64_t* positions,
                      const int64_t* slots, T* k_cache, T* v_cache) {
    const bool parallel = call.tokens * (call.q_heads + 2 * call.kv_heads) * call.width > 65536;
    share(call.tokens, 4, parallel, [&](int64_t token) {
        T* const k_row = k + token * call.k_stride;
        if (cos_sin) {
            const float* const angles = cos_sin + positions[token] * call.rotary_width;
            rotate_heads(q + token * call.q_stride, call.q_heads, call, angles);
            rotate_heads(k_row, call.kv_heads, call, angles);
        }
        if (slots[token] < 0) return;
        write_heads(k_row, k_cache, call.k_block_stride, slots[token], call);
        write_heads(v + token * call.v_stride, v_cache, call.v_block_stride, slots[token], call);
    });
}

// Heads of any strides, each dense, into others; what is not rotated is copied.
struct RotaryCopy {
    int64_t tokens, heads, width, rotary_width, token_stride, head_stride, y_stride, y_head_stride;
    int interleaved;

    template <class T> void run(const T* x, const float* cos_sin, const int64_t* positions, T* y) const {
        share(tokens, 4, tokens * heads * width > 65536, [&](int64_t token) {
            const float* const angles = cos_sin + positions[token] * rotary_width;
            for (int64_t head = 0; head < heads; ++head) {
                const T* const from = x + token * token_stride + head * head_stride;
                T* const to = y + token * y_stride + head * y_head_stride;
                rotate_head(from, to, angles, rotary_width, interleaved);
                memcpy(to + rotary_width, from + rotary_width, size_t(width - rotary_width) * sizeof(T));
            }
        });
    }
};

}  // namespace

// cos_sin: [max_position, 2, rotary_width / 2] or null for no rotation; a negative slot is not written.
EXPORT(int, rotary_cache_write)(int is_bf16, void* q, void* k, const void* v, const float* cos_sin,
                                const int64_t* positions, const int64_t* slots, void* k_cache, void* v_cache,
                                const RotaryCall* call) {
    const int status = check_rotary(*call, cos_sin != nullptr, positions, slots);
    if (status != OK) return status;
    if (is_bf16)
        rotate_and_write(*call, (bf16*)q, (bf16*)k, (const bf16*)v, cos_sin, positions, slots, (bf16*)k_cache,
                         (bf16*)v_cache);
    else
        rotate_and_write(*call, (float*)q, (float*)k, (const float*)v, cos_sin, positions, slots, (float*)k_cache,
                         (float*)v_cache);
    return OK;
}

// y [tokens, heads, width], its heads dense, gets the rotated x; cos_sin [max_position, 2, rotary_width / 2].
EXPORT(int, rotary)(int is_bf16, const void* x, const float* cos_sin, const int64_t* positions, void* y, int64_t tokens,
                    int64_t heads, int64_t width, int64_t rotary_width, int64_t token_stride, int64_t head_stride,
                    int64_t y_stride, int64_t y_head_stride, int64_t max_position, int interleaved) {
    for (int64_t token = 0; token < tokens; ++token)
        if (positions[token] < 0 || positions[token] >= max_position) return BAD_POSITION;
    const RotaryCopy copy{tokens,      heads,    width,         rotary_width, token_stride,
                          head_stride, y_stride, y_head_stride, interleaved};
    if (is_bf16)
        copy.run((const bf16*)x, cos_sin, positions, (bf16*)y);
    else
        copy.run((const float*)x, cos_sin, positions, (float*)y);
    return OK;
}
