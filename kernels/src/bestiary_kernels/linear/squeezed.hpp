// Weights of bfloat16 in twelve bits, exactly, and how some of them are made wide again. Knows no product.
//
// Of a weight's eight bits of exponent four say as much: fifteen exponents cover all but some ten thousandths of a
// trained matrix. A step is 192 bytes: of 64 pairs of weights the signs and mantissas, a byte each, then the exponents'
// codes, half a byte each. Code 15 is exponent 0, and what no code stands for: such weights are listed beside, tile by
// tile, whole.
#pragma once

#include "../simd.hpp"

namespace {

struct SqueezedCall {
    const void* codes;  // [blocks][steps][192]
    const void* bias;   // N elements of bfloat16, or null
    int64_t outputs, inputs;
    const int32_t* starts;       // [blocks * tiles + 1]: each tile's first exception
    const uint32_t* exceptions;  // place in the tile << 16 | bits of the weight
    uint8_t exponents[16];       // of each code; the last is 0

    int64_t steps() const { return inputs / 2; }
    int64_t blocks() const { return (outputs + 63) / 64; }
};

#if defined(__AVX512BF16__)

namespace squeezed {

// Steps of a tile, bytes of a step, weights of a step.
constexpr int64_t TILE = 32, BYTES = 192, WEIGHTS = 128;
// How far ahead memory is asked: at 80 GB/s 4096 would be too late; at 40 it would do, and costs a hundredth less.
constexpr int64_t AHEAD = 8192;

inline int64_t tiles(int64_t steps) { return (steps + TILE - 1) / TILE; }

// The upper and the lower byte of a bfloat16 that exponents bring, for each code.
struct Tables {
    __m512i high, low;
    explicit Tables(const uint8_t* exponents) {
        const __m128i all = _mm_loadu_si128((const __m128i*)exponents);
        high = _mm512_broadcast_i32x4(_mm_and_si128(_mm_srli_epi16(all, 1), _mm_set1_epi8(127)));
        low = _mm512_broadcast_i32x4(_mm_and_si128(_mm_slli_epi16(all, 7), _mm_set1_epi8(-128)));
    }
};

// w[4] gets a step's weights as they lie in a packed weight.
inline void decode(const char* at, const Tables& tables, __m512i* w) {
    const __m512i sign = _mm512_set1_epi8(-128), nibble = _mm512_set1_epi8(15);
    const __m512i both = _mm512_loadu_si512(at + WEIGHTS);
    const __m512i codes[2] = {_mm512_and_si512(both, nibble), _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i rest = _mm512_loadu_si512(at + half * 64);
        // high | (rest & sign), low | (rest & ~sign).
        const __m512i high = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(tables.high, codes[half]), rest, sign, 0xf8);
        const __m512i low = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(tables.low, codes[half]), rest, sign, 0xf4);
        w[2 * half] = _mm512_unpacklo_epi8(low, high);
        w[2 * half + 1] = _mm512_unpackhi_epi8(low, high);
    }
}

// to[128] gets them.
inline void widen_step(const char* at, const Tables& tables, char* to) {
    __m512i w[4];
    decode(at, tables, w);
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * 64, w[i]);
}

// to[end - first][128] gets the weights of these steps of a block, all of one tile.
inline void widen(const SqueezedCall& call, const Tables& tables, int64_t block, int64_t first, int64_t end, char* to) {
    const int64_t steps = call.steps();
    const char* at = (const char*)call.codes + (block * steps + first) * BYTES;
    for (int64_t step = first; step < end; ++step, at += BYTES) {
        for (int line = 0; line < BYTES; line += 64) ask_once(at + AHEAD + line);
        widen_step(at, tables, to + (step - first) * 2 * WEIGHTS);
    }
    const int64_t tile = block * tiles(steps) + first / TILE, before = first % TILE * WEIGHTS;
    for (int32_t i = call.starts[tile]; i < call.starts[tile + 1]; ++i) {
        const int64_t place = int64_t(call.exceptions[i] >> 16) - before;
        if (place >= 0 && place < (end - first) * WEIGHTS) ((uint16_t*)to)[place] = uint16_t(call.exceptions[i]);
    }
}

}  // namespace squeezed

#endif

}  // namespace
