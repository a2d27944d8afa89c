// The product of one row with squeezed weights, straight from their codes.
#pragma once

#include "squeezed.hpp"
#include "one.hpp"

#if defined(__AVX2__)

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

    // Puts that step's in their places of its weights.
    void put(uint16_t* weights) {
        for (const int64_t step = next; next == step; ++at, find())
            weights[(all[at] >> 16) % WEIGHTS] = uint16_t(all[at]);
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
    alignas(64) uint16_t weights[WEIGHTS];
    multiply_one_row(x + 2 * from, to - from, sums, [&](int64_t step, auto use) __attribute__((always_inline)) {
        for (int line = 0; line < BYTES; line += 64) {
            ask_once(at + FAR + line);
            __builtin_prefetch(at + NEAR + line);
        }
        if (__builtin_expect(from + step == exceptions.next, 0)) {
            widen_step(at, tables, (char*)weights);
            exceptions.put(weights);
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; ++c) of_pairs(use)(c, read_as<Words>(weights + 2 * c * W));
        } else {
            decode(at, tables, of_pairs(use));
        }
        at += BYTES;
    });
}

}  // namespace squeezed
}  // namespace

#endif
