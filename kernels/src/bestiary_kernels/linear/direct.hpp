// The product of one row with squeezed weights, straight from their codes.
#pragma once

#include "squeezed.hpp"
#include "one.hpp"

#if defined(__AMX_BF16__)

namespace {
namespace squeezed {

// The exceptions of a block from a step on, one step that has any after the other.
class Exceptions {
  public:
    int64_t next;  // that step

    Exceptions(const SqueezedCall& call, int64_t block, int64_t step)
        : starts(call.starts + block * tiles(call.steps())), all(call.exceptions), count(tiles(call.steps())),
          tile(step / TILE), at(starts[tile]) {
        for (find(); next < step; find()) ++at;
    }

    // Puts that step's in their places of w.
    void put(__m512i* w) {
        for (const int64_t step = next; next == step; ++at, find()) {
            const uint32_t place = (all[at] >> 16) % WEIGHTS;
            const __m512i weight = _mm512_set1_epi16(short(all[at]));
#pragma GCC unroll 4
            for (uint32_t c = 0; c < uint32_t(VECTORS); ++c)
                w[c] = _mm512_mask_mov_epi16(w[c], place / 32 == c ? 1u << place % 32 : 0, weight);
        }
    }

  private:
    void find() {
        while (tile < count && at >= starts[tile + 1]) ++tile;
        next = tile < count ? tile * TILE + int64_t((all[at] >> 16) / WEIGHTS) : INT64_MAX;
    }

    const int32_t* const starts;
    const uint32_t* const all;
    const int64_t count;
    int64_t tile;
    int32_t at;
};

// How far ahead lines come to the second cache, and to the first.
constexpr int64_t FAR = 4096, NEAR = 1536;

// sums[64] += x * the weights of a block's steps.
inline void multiply_one(const SqueezedCall& call, const Tables& tables, int64_t block, const bf16* x, int64_t from,
                         int64_t to, Floats* sums) {
    const char* at = (const char*)call.codes + (block * call.steps() + from) * BYTES;
    Exceptions exceptions(call, block, from);
    multiply_one_row(x + 2 * from, to - from, sums, [&](int64_t step, __m512i* w) {
        for (int line = 0; line < BYTES; line += 64) {
            ask_once(at + FAR + line);
            __builtin_prefetch(at + NEAR + line);
        }
        decode(at, tables, w);
        if (from + step == exceptions.next) exceptions.put(w);
        at += BYTES;
    });
}

}  // namespace squeezed
}  // namespace

#endif
