// Reads squeezed weights a step at a time, straight from their codes.
#pragma once

#include "squeezed.hpp"
#include "alone.hpp"

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
    __attribute__((always_inline)) void put(Words (&weights)[VECTORS]) {
        for (const int64_t step = next; next == step; ++at, find()) {
            const int place = int(all[at] >> 16) % WEIGHTS;
            // Its bits in both halves of a pair, and the half that they take.
            const uint32_t twice = (all[at] & 0xffff) * 0x10001, half = place % 2 ? 0xffff0000 : 0xffff;
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; ++c) {
                const Words bits = (Words)(lanes() + c * W == place / 2) & half;
                weights[c] = (weights[c] & ~bits) | (bits & twice);
            }
        }
    }

  private:
    __attribute__((always_inline)) void find() {
        while (tile < count && at >= starts[tile + 1]) ++tile;
        next = tile < count ? tile * TILE + int64_t((all[at] >> 16) / WEIGHTS) : INT64_MAX;
    }

    const int32_t* const starts;
    const uint32_t* const all;
    const int64_t count;
    int64_t tile;
    int32_t at;
};

// The steps of a block from one on, for rows of bfloat16.
class Reader {
  public:
    Reader(const SqueezedCall& call, const Tables& tables, int64_t block, int64_t first)
        : tables(tables), exceptions(call, block, first), step(first),
          at((const char*)call.codes + (block * call.steps() + first) * BYTES) {}

    template <class Use> __attribute__((always_inline)) void pairs(Use use) {
        Words weights[VECTORS];
        decode(at, read_anew(tables), [&](int c, Words pairs) __attribute__((always_inline)) { weights[c] = pairs; });
        if (__builtin_expect(step == exceptions.next, 0)) exceptions.put(weights);
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) use(c, weights[c]);
        at += BYTES, ++step;
    }
    template <class Use> __attribute__((always_inline)) void floats(Use use) { pairs(of_pairs(use)); }

  private:
    const Tables tables;
    Exceptions exceptions;
    int64_t step;
    const char* at;
};

}  // namespace squeezed
}  // namespace

#endif
