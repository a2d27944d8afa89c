// The product of one row with squeezed weights that are made wide in registers only. Adds up as AMX's tiles do.
//
// A tile takes as long for one row as for sixteen, and while it multiplies nobody asks memory for more. Intel's
// Instruction Set Reference says how TDPBF16PS sums: over the sixteen steps of a tile the first and the second inputs
// apart, each fused, then both together, then with what the tiles before gave. So a row comes out alike in any company.
#pragma once

#include "squeezed.hpp"
#include "walk.hpp"

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
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    for (int64_t begin = from, end; begin < to; begin = end) {
        end = smaller<int64_t>(to, begin + tiles::STEPS);
        float inputs[2 * tiles::STEPS];
        over_vectors(2 * (end - begin), [&](int64_t i, int n) { store(inputs + i, load_up_to(x + 2 * begin + i, n)); });
        Floats first[VECTORS] = {}, second[VECTORS] = {};
        for (int64_t step = begin; step < end; ++step, at += BYTES) {
            for (int line = 0; line < BYTES; line += 64) {
                ask_once(at + FAR + line);
                __builtin_prefetch(at + NEAR + line);
            }
            __m512i w[VECTORS];
            decode(at, tables, w);
            if (step == exceptions.next) exceptions.put(w);
            const float* const pair = inputs + 2 * (step - begin);
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) {
                first[c] += (Floats)_mm512_slli_epi32(w[c], 16) * pair[0];
                second[c] += (Floats)_mm512_and_si512(w[c], upper) * pair[1];
            }
        }
        for (int c = 0; c < VECTORS; ++c) sums[c] += first[c] + second[c];
    }
}

}  // namespace squeezed
}  // namespace

#endif
