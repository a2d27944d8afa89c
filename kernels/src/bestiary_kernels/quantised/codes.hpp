// How small whole numbers lie in memory, and a step of them as bfloat16 or as floats, both of which hold each exactly.
//
// A step has 64 outputs and two inputs. Where pairs of bfloat16 are multiplied a step of int8 is [64][2] bytes, each a
// sign and a magnitude: a Zen 4 takes magnitudes where it multiplies. A step of int4 is 32 words of four codes there:
// code j of word 2 c + i is that of output 16 j + c and input i. Elsewhere the two inputs of int8 lie apart, [2][64]; and
// int4 is [32][2] bytes, in each output c and output 32 + c, of every sixteen outputs the first four, the third, the
// second and the last: so that halves of registers fall into their places.
#pragma once

#include "../bytes.hpp"
#include "../linear/alone.hpp"

namespace {
namespace quantised {

// Where an output's code for the first input lies: the byte, how far that for the second is behind it, and the shift
// within both. `laid` says as which bits a code lies.
struct Place {
    int byte, second, shift;
};

// floats(at, use) says use(c, first, second) of every vector c of W outputs, of the weights of the first input and the
// second; pairs(at, use) says use(c, pairs). `in_order` is a vector of sums in the order of the outputs.
template <int bits> struct Codes;

#if defined(__AVX512BF16__)

// 0 .. 127 in bfloat16: the lower bytes of all, and the upper ones.
struct Numbers {
    uint8_t all[2][128];
    constexpr Numbers() : all{} {
        for (int number = 1; number < 128; ++number) {
            int exponent = 0;
            while (number >> (exponent + 1)) ++exponent;
            const int bits = (127 + exponent) << 7 | (number << (7 - exponent) & 127);
            all[0][number] = uint8_t(bits), all[1][number] = uint8_t(bits >> 8);
        }
    }
    // Of a code seven bits are looked at.
    __m512i look_up(int which, __m512i codes) const {
        const uint8_t* const table = all[which];
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
    }
};
alignas(64) constexpr Numbers NUMBERS;

// A sign and seven bits of magnitude, of which the lower byte and the upper one are looked up.
template <> struct Codes<8> {
    static constexpr int BYTES = 2 * COLUMNS;
    static Place place(int output) { return {2 * output, 1, 0}; }
    static uint8_t laid(int8_t code) { return uint8_t(code < 0 ? 128 - code : code); }

    template <class Use> __attribute__((always_inline)) static void pairs(const char* at, Use use) {
        const Numbers& numbers = read_anew(NUMBERS);
        const __m512i sign = _mm512_set1_epi8(-128);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512i codes = _mm512_loadu_si512(at + half * 64);
            const __m512i low = numbers.look_up(0, codes), magnitude = numbers.look_up(1, codes);
            const __m512i high = bytes::with_those(magnitude, codes, sign);
            use(2 * half, (Words)_mm512_unpacklo_epi8(low, high));
            use(2 * half + 1, (Words)_mm512_unpackhi_epi8(low, high));
        }
    }
    template <class Use> __attribute__((always_inline)) static void floats(const char* at, Use use) {
        pairs(at, of_pairs(use));
    }

    // Bytes are interleaved within a register's quarters, so that of eight outputs the first four go to one vector, the
    // others to the next. Sums stay so until the end.
    static Floats in_order(const Sums& sums, int vector) {
        const int first = vector % 2 * 4, pair = vector / 2 * 2;
        const __m512i order = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11));
        return (Floats)_mm512_permutex2var_epi64((__m512i)sums[pair], order, (__m512i)sums[pair + 1]);
    }
};

template <> struct Codes<4> {
    static constexpr int BYTES = COLUMNS;
    static Place place(int output) { return {output % 16 * 4 + output / 32, 2, output / 16 % 2 * 4}; }
    static uint8_t laid(int8_t code) { return code & 15; }

    template <class Use> __attribute__((always_inline)) static void pairs(const char* at, Use use) {
        // 0 .. 7, -8 .. -1 in bfloat16. Of an index the instruction looks at five bits: the table has each twice.
        const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, int16_t(0xc100), int16_t(0xc0e0),
            int16_t(0xc0c0), int16_t(0xc0a0), int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80)));
        const __m512i words = _mm512_loadu_si512(at);
#pragma GCC unroll 4
        for (int c = 0; c < VECTORS; ++c)
            use(c, (Words)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * c), table));
    }
    template <class Use> __attribute__((always_inline)) static void floats(const char* at, Use use) {
        pairs(at, of_pairs(use));
    }
    static Floats in_order(const Sums& sums, int vector) { return sums[vector]; }
};

#else

// What takes the weights of the two inputs as pairs of bfloat16, of floats whose lower halves are zeros.
template <class Use> inline auto as_pairs(Use use) {
    return [use](int c, Floats first, Floats second)
               __attribute__((always_inline)) { use(c, (Words)first >> 16 | (Words)second); };
}

inline Floats from_bytes(const char* at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((__m128i*)at)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
#else
    typedef int8_t Signed __attribute__((vector_size(W)));
    return __builtin_convertvector(read_as<Signed>(at), Floats);
#endif
}

template <> struct Codes<8> {
    static constexpr int BYTES = 2 * COLUMNS;
    static Place place(int output) { return {output, COLUMNS, 0}; }
    static uint8_t laid(int8_t code) { return uint8_t(code); }

    template <class Use> __attribute__((always_inline)) static void floats(const char* at, Use use) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) use(c, from_bytes(at + c * W), from_bytes(at + COLUMNS + c * W));
    }
    template <class Use> __attribute__((always_inline)) static void pairs(const char* at, Use use) {
        floats(at, as_pairs(use));
    }
    static Floats in_order(const Sums& sums, int vector) { return sums[vector]; }
};

template <> struct Codes<4> {
    static constexpr int BYTES = COLUMNS;
    static Place place(int output) {
        const int sixteen = output % 32 / 16, four = output / 4 % 4;
        return {sixteen * 32 + (four % 2 * 2 + four / 2) * 8 + output % 4 * 2, 1, output / 32 * 4};
    }
    static uint8_t laid(int8_t code) { return code & 15; }
    static Floats in_order(const Sums& sums, int vector) { return sums[vector]; }

#if defined(__AVX2__)
    template <class Use> __attribute__((always_inline)) static void pairs(const char* at, Use use) {
        using namespace bytes;
        // The lower and the upper bytes of 0 .. 7, -8 .. -1 in bfloat16.
        const Bytes low_bytes =
            spread(_mm_setr_epi8(0, -128, 0, 64, -128, -96, -64, -32, 0, -32, -64, -96, -128, 64, 0, -128));
        const Bytes high_bytes =
            spread(_mm_setr_epi8(0, 63, 64, 64, 64, 64, 64, 64, -63, -64, -64, -64, -64, -64, -64, -65));
        constexpr int parts = BYTES / sizeof(Words);
        const Words bits = Words{} + CODE_BITS;
#pragma GCC unroll 2
        for (int part = 0; part < parts; ++part) {
            const Words both = read_as<Words>(at + part * sizeof(Words));
            const Words codes[2] = {both & bits, (both >> 4) & bits};
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const Bytes low = look_up(low_bytes, (Bytes)codes[half]);
                const Bytes high = look_up(high_bytes, (Bytes)codes[half]);
                const Bytes near = mixed_low(low, high), far = mixed_high(low, high);
                const int c = half * VECTORS / 2 + 2 * part;
#if defined(__AVX512F__)
                use(c, (Words)_mm512_shuffle_i64x2(near, far, 0x44));
                use(c + 1, (Words)_mm512_shuffle_i64x2(near, far, 0xee));
#else
                use(c, (Words)near);
                use(c + 1, (Words)far);
#endif
            }
        }
    }
    template <class Use> __attribute__((always_inline)) static void floats(const char* at, Use use) {
        pairs(at, of_pairs(use));
    }
#else
    template <class Use> static void floats(const char* at, Use use) {
        for (int c = 0; c < VECTORS; ++c) {
            const int half = c / (VECTORS / 2), four = c % (VECTORS / 2), swapped = four % 2 * 2 + four / 2 % 2;
            const Words words = widen(read_as<Halves>(at + (four / 4 * 4 + swapped) * 2 * W));
            use(c, __builtin_convertvector((Ints)(words << (28 - 4 * half)) >> 28, Floats),
                __builtin_convertvector((Ints)(words << (20 - 4 * half)) >> 28, Floats));
        }
    }
    template <class Use> static void pairs(const char* at, Use use) { floats(at, as_pairs(use)); }
#endif
};

#endif

}  // namespace quantised
}  // namespace
