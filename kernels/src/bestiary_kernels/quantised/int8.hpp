// A weight of int8 as a source of bfloat16 for the walk of linear/walk.hpp, which holds every code exactly.
#pragma once

#include "../linear/walk.hpp"

namespace {

struct QuantisedCall {
    const void *weight, *scales, *bias;  // the bias has N elements of x's type, or is null
    int64_t outputs, inputs;             // inputs are even: x has a column of zeros where the weight has an odd number
    int64_t bits, group, is_bf16;        // int8: a float a row; int4: a bfloat16 a group of inputs, [blocks][groups][64]
};

namespace quantised {

// Bytes that are asked for ahead of their use: a tile comes while the rows take their turns over the one before.
constexpr int64_t AHEAD = 4096;

#if defined(__AVX512BF16__)

// A step of codes, made wide in registers: each is looked up, its lower byte and its upper one.
struct Codes8 {
    static constexpr int BYTES = 2 * COLUMNS;
    static void take(const char* at, __m512bh* w) {
        const __m512i sign = _mm512_set1_epi8(-128);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512i codes = _mm512_loadu_si512(at + half * 64);
            const __m512i size = _mm512_abs_epi8(codes);
            const __m512i low = _mm512_permutex2var_epi8(table(0), size, table(1));
            // The sign's bit joins what the table says: high | (codes & sign).
            const __m512i high = _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(table(2), size, table(3)), codes,
                                                           sign, 0xf8);
            w[2 * half] = (__m512bh)_mm512_unpacklo_epi8(low, high);
            w[2 * half + 1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
        }
    }

    // Bytes are interleaved within a register's quarters, so that of eight outputs the first four go to one vector, the
    // others to the next. Sums stay so until the end: what belongs to the outputs of a vector, in their order.
    static Floats in_order(const Sums& sums, int vector) {
        const int first = vector % 2 * 4, pair = vector / 2 * 2;
        const __m512i order = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11));
        return (Floats)_mm512_permutex2var_epi64((__m512i)sums[pair], order, (__m512i)sums[pair + 1]);
    }

  private:
    // 0 .. 127 in bfloat16: the lower byte of each in two vectors, and the upper one.
    static __m512i table(int part) {
        struct Table {
            uint8_t bytes[4][64];
            constexpr Table() : bytes{} {
                for (int number = 1; number < 128; ++number) {
                    int exponent = 0;
                    while (number >> (exponent + 1)) ++exponent;
                    const int bits = (127 + exponent) << 7 | (number << (7 - exponent) & 127);
                    bytes[number / 64][number % 64] = uint8_t(bits);
                    bytes[2 + number / 64][number % 64] = uint8_t(bits >> 8);
                }
            }
        };
        alignas(64) static constexpr Table numbers;
        return _mm512_load_si512(numbers.bytes[part]);
    }
};

// For few rows codes go from memory to registers, for more a room is made wide first. An output's scale waits for the
// end of its sum.
struct Int8 {
    const QuantisedCall& call;
    typedef Codes8 Few;
    static constexpr int AHEAD_BYTES = Codes8::BYTES;
    static constexpr bool ALWAYS_AHEAD = false;
    static constexpr bool HAS_ONE = false;
    static constexpr int64_t ROOM_STEPS = USES_FEW ? 64 : 32;
    static int64_t near_steps(int64_t rows) { return USES_FEW && rows <= TOGETHER_ROWS ? INT64_MAX / 2 : ROOM_STEPS; }
    Floats settled(const Sums& sums, int vector, int64_t column) const {
        return Codes8::in_order(sums, vector) * load((const float*)call.scales + column);
    }
    Near bring(int64_t block, int64_t first, int64_t end, bool few, char* room) const {
        const char* at = (const char*)call.weight + (block * (call.inputs / 2) + first) * Codes8::BYTES;
        if (few) return {at, at + AHEAD};
        for (int64_t step = first; step < end; ++step, at += Codes8::BYTES) {
            for (int line = 0; line < Codes8::BYTES; line += 64) ask_once(at + AHEAD + line);
            __m512bh w[VECTORS];
            Codes8::take(at, w);
            for (int c = 0; c < VECTORS; ++c)
                _mm512_store_si512(room + (step - first) * Wide::BYTES + c * 64, (__m512i)w[c]);
        }
        return {room, at};
    }
};

#endif

}  // namespace quantised
}  // namespace
