// Vector helpers that every operation shares: lane types, bfloat16, exp and scratch memory.
//
// One source serves every instruction set through GCC's vector extensions; the lane count W follows the -m flags.
// Everything but the exported functions lives in an anonymous namespace and no standard library template is used:
// one shared library holds the same source compiled several times, and a function that two variants share by name
// would be kept once, for the wrong machine.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "threads.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOIN_NAMES(variant, name) bestiary_##variant##_##name
#define VARIANT_NAME(variant, name) JOIN_NAMES(variant, name)
#define EXPORT(type, name) extern "C" __attribute__((visibility("default"))) type VARIANT_NAME(VARIANT, name)

namespace {

// What a function answers; `library.py` turns each number into the same exception.
enum Status : int {
    OK = 0,
    BAD_BLOCK = 1,
    BAD_SLOT = 2,
    BAD_POSITION = 3,
    BAD_RAGGED = 4,
    NO_MEMORY = 5,
    BAD_ROW = 6,
    BAD_ADAPTER = 7,
    BAD_RANK = 8,
    BAD_PARTS = 9,
    BAD_EXPERT = 20,
};

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

template <class V> inline V read_as(const void* from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

// For a loop whose sums take the registers: the compiler would put in them what it has read once, and spill others.
template <class T> __attribute__((always_inline)) inline const T& read_anew(const T& what) {
    const T* at = &what;
    __asm__ volatile("" : "+r"(at) : "m"(what));
    return *at;
}

inline Floats splat(float value) { return Floats{} + value; }

inline Ints lanes() {
    Ints index{};
    for (int i = 0; i < W; ++i) index[i] = i;
    return index;
}

// Of a NaN and a number the second one, as the machine's own instructions have it.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
inline Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    return read_as<float>(&bits);
}

inline Floats load(const float* from) { return read_as<Floats>(from); }

// One instruction where the compiler's own conversion of a vector makes four.
inline Words widen(Halves halves) {
#if defined(__AVX512F__)
    // The form with a mask: the plain one starts from a value that GCC warns about.
    return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
    return __builtin_convertvector(halves, Words);
#endif
}
inline Floats load(const bf16* from) { return (Floats)(widen(read_as<Halves>(from)) << 16); }

// The first and the second of each pair of bfloat16: its bits are a float's upper half.
template <int which> inline Floats one_of(Words pairs) { return (Floats)(which ? pairs & 0xffff0000u : pairs << 16); }

// The first n lanes from memory, zeros in the rest; never reads past from + n.
template <class T> inline Floats load_part(const T* from, int n) {
    T whole[W] = {};
    memcpy(whole, from, size_t(n) * sizeof(T));
    return load(whole);
}

inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }

// Round to nearest, ties to even, as torch does; a NaN becomes the quiet NaN of its sign.
#if defined(__AVX512BF16__)
// Numbers below the smallest normal one become zero.
inline Floats rounded(Floats value) {
    return (Floats)(widen((Halves)_mm512_cvtneps_pbh((__m512)value)) << 16);
}
inline void store(bf16* to, Floats value) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &halves, sizeof halves);
}
#else
inline Words upper_half(Floats value) {
    const Words bits = (Words)value;
    const Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value == value ? nearest : (bits >> 16) | 0x40u;
}
inline Floats rounded(Floats value) { return (Floats)(upper_half(value) << 16); }
inline void store(bf16* to, Floats value) {
    const Halves halves = __builtin_convertvector(upper_half(value), Halves);
    memcpy(to, &halves, sizeof halves);
}
#endif

template <class T> inline void store_part(T* to, Floats value, int n) {
    T whole[W];
    store(whole, value);
    memcpy(to, whole, size_t(n) * sizeof(T));
}

// Calls body(offset, lanes_used) over n values: whole vectors with a constant W, then one part.
template <class Body> inline void over_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, W);
    if (i < n) body(i, int(n - i));
}

template <class T> inline Floats load_up_to(const T* from, int n) { return n == W ? load(from) : load_part(from, n); }
template <class T> inline void store_up_to(T* to, Floats value, int n) {
    if (n == W)
        store(to, value);
    else
        store_part(to, value, n);
}

template <class Combine> inline float across(Floats value, Combine combine) {
    for (int step = W / 2; step; step /= 2) value = combine(value, __builtin_shuffle(value, lanes() ^ step));
    return value[0];
}
inline float sum_of(Floats value) {
    return across(value, [](Floats a, Floats b) { return a + b; });
}
inline float largest_of(Floats value) { return across(value, larger); }

// e^x = 2^n e^r with n = round(x / ln 2); the polynomial is our own least-squares fit of e^r on |r| <= ln2 / 2
// (relative error 2e-9). Below -88 the scale's bits are zero, so the answer is exactly 0; above 88.4 it is infinity.
// NaN passes both clamps and comes out of the polynomial.
__attribute__((always_inline)) inline Floats exp_of(Floats x) {
    x = lesser(splat(89.0f), larger(splat(-88.0f), x));
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
    const Floats shifted = x * 1.44269504f + rounder;
    const Floats n = shifted - rounder;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.382702277e-3f + 8.376434391e-3f;
    p = p * r + 4.166849710e-2f;
    p = p * r + 1.666640077e-1f;
    p = p * r + 4.999999042e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Floats)(((Words)shifted << 23) + 0x3f800000u);
}

// 2^x = 2^n 2^r with n = round(x); the polynomial is our own least-squares fit of 2^r on |r| <= 1/2 (relative error
// 2e-9). Zero where the true value is below the smallest normal number, or a number as small; NaN stays.
__attribute__((always_inline)) inline Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
    const Floats r = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats n = x - r;
#else
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
    x = x < -127.0f ? splat(-127.0f) : x;
    x = x > 128.0f ? splat(128.0f) : x;
    const Floats shifted = x + rounder, n = shifted - rounder, r = x - n;
#endif
    Floats p = r * 1.537070482e-4f + 1.339984829e-3f;
    p = p * r + 9.618373251e-3f;
    p = p * r + 5.550329035e-2f;
    p = p * r + 2.402264846e-1f;
    p = p * r + 6.931472056e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    return p * (Floats)(((Words)shifted << 23) + 0x3f800000u);
#endif
}

// Memory of this thread that outlives the call, so that a step never meets the allocator; null when there is none. What
// is part of another operation has one of its own.
enum class Whose { OPERATION, PART };
template <Whose = Whose::OPERATION> inline void* scratch(size_t size) {
    static __thread void* memory = nullptr;
    static __thread size_t held = 0;
    if (size > held) {
        free(memory);
        held = 0;
        if (posix_memalign(&memory, 64, size)) memory = nullptr;
        if (memory) held = size;
    }
    return memory;
}

inline bool is_amd() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

// Asks for a line of memory that is read once. On AMD's machines it passes by the outer caches, which otherwise must
// take what the inner ones drop: worth a twentieth of the bandwidth. Intel's have few such lines under way at a time, so
// that half of the bandwidth would be lost, and more on the way to the second cache than to the first: worth an eighth.
inline const bool PASSES_BY = is_amd();
inline void ask_once(const void* at) {
    if (PASSES_BY)
        __builtin_prefetch(at, 0, 0);
    else
        __builtin_prefetch(at, 0, 2);
}
// Whether the first cache holds what is met and what shall be met next beside it: Zen 5's 48 KiB do. In Zen 4's 32 what
// comes drives out what is there, and decode attention takes half as long again.
inline bool has_large_first_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    return sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
#else
    return false;
#endif
}

// As `ask_once` of a line that several rows read one after the other: a near cache keeps it, on AMD's machines the first
// where that is large.
inline const bool COMES_FIRST = PASSES_BY && has_large_first_cache();
inline void ask_ahead(const void* at) {
    if (COMES_FIRST)
        __builtin_prefetch(at);
    else
        __builtin_prefetch(at, 0, 2);
}

// Keeps the loops of one step from crowding another's registers.
#define SEPARATE __attribute__((noinline))

template <class T> inline T smaller(T a, T b) { return a < b ? a : b; }

}  // namespace
