// The write of latent rows to their cache slots, whatever their type: copied as bytes.
#include "../simd.hpp"

// rows: [tokens] of row_bytes, row_stride bytes apart; cache: [blocks] of block_size rows, block_stride and place_stride
// bytes apart. A negative slot is not written; every slot is looked at before anything is.
EXPORT(int, cache_write)(const char* rows, const int64_t* slots, char* cache, int64_t tokens, int64_t row_bytes,
                         int64_t row_stride, int64_t blocks, int64_t block_size, int64_t block_stride,
                         int64_t place_stride) {
    for (int64_t token = 0; token < tokens; ++token)
        if (slots[token] >= blocks * block_size) return BAD_SLOT;
    share(tokens, 8, tokens * row_bytes > 1 << 20, [&](int64_t token) {
        if (slots[token] < 0) return;
        char* const block = cache + slots[token] / block_size * block_stride;
        memcpy(block + slots[token] % block_size * place_stride, rows + token * row_stride, size_t(row_bytes));
    });
    return OK;
}
