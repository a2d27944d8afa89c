// Weights of bfloat16 in twelve bits, exactly, and how some of them are made wide again. Knows no product.
//
// Of a weight's eight bits of exponent four say as much: fifteen exponents cover all but some ten thousandths of a
// trained matrix. A step is 192 bytes: of 64 pairs of weights the signs and mantissas, a byte each, then the exponents'
// codes, half a byte each. Code 15 is exponent 0, and what no code stands for: such weights are listed beside, tile by
// tile, whole.
#pragma once

#include "../bytes.hpp"

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

#if defined(__AVX2__)

namespace squeezed {

// Steps of a tile, bytes of a step, weights of a step.
constexpr int64_t TILE = 32, BYTES = 192, WEIGHTS = 128;
// How far ahead memory is asked: at 80 GB/s 4096 would be too late; at 40 it would do, and costs a hundredth less.
constexpr int64_t AHEAD = 8192;

inline int64_t tiles(int64_t steps) { return (steps + TILE - 1) / TILE; }

using namespace bytes;

// The upper and the lower byte of a bfloat16 that exponents bring, for each code.
struct Tables {
    Bytes high, low;
    explicit Tables(const uint8_t* exponents) {
        const __m128i all = _mm_loadu_si128((const __m128i*)exponents);
        high = spread(_mm_and_si128(_mm_srli_epi16(all, 1), _mm_set1_epi8(127)));
        low = spread(_mm_and_si128(_mm_slli_epi16(all, 7), _mm_set1_epi8(-128)));
    }
};

// Of 4 W weights' signs and mantissas and their codes the weights: W pairs, and those 32 weights farther on.
inline void decode_bytes(Words rest, Words codes, const Tables& tables, Words& low_pairs, Words& high_pairs) {
    const Bytes sign = (Bytes)(Words{} + 0x80808080u);
    const Bytes high = with_those(look_up(tables.high, (Bytes)codes), (Bytes)rest, sign);
    const Bytes low = with_others(look_up(tables.low, (Bytes)codes), (Bytes)rest, sign);
    low_pairs = (Words)mixed_low(low, high), high_pairs = (Words)mixed_high(low, high);
}

// use(place, pairs) of a step's weights: vector by vector, as they lie in a packed weight.
template <class Use>
__attribute__((always_inline)) inline void decode(const char* at, const Tables& tables, Use use) {
    constexpr int parts = 64 / sizeof(Words);  // of half a step
    const Words bits = Words{} + CODE_BITS;
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) {
        const Words both = read_as<Words>(at + WEIGHTS + part * sizeof(Words));
        const Words codes[2] = {both & bits, (both >> 4) & bits};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            Words near, far;
            decode_bytes(read_as<Words>(at + half * 64 + part * sizeof(Words)), codes[half], tables, near, far);
            use(2 * half * parts + part, near);
            use((2 * half + 1) * parts + part, far);
        }
    }
}

// to[end - first][128] gets the weights of these steps of a block, all of one tile.
inline void widen(const SqueezedCall& call, const Tables& tables, int64_t block, int64_t first, int64_t end, char* to) {
    const int64_t steps = call.steps();
    const char* at = (const char*)call.codes + (block * steps + first) * BYTES;
    for (int64_t step = first; step < end; ++step, at += BYTES) {
        for (int line = 0; line < BYTES; line += 64) ask_once(at + AHEAD + line);
        char* const wide = to + (step - first) * 2 * WEIGHTS;
        decode(at, tables, [&](int place, Words pairs) { memcpy(wide + place * sizeof pairs, &pairs, sizeof pairs); });
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
