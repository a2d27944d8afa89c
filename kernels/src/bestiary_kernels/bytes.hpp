// Vectors of bytes as wide as the machine's: small tables that are looked up, and the bytes of two side by side.
#pragma once

#include "simd.hpp"

#if defined(__AVX2__)

namespace {
namespace bytes {

// `look_up` takes codes of four bits, a byte each; all bits of a word but CODE_BITS are to be zeros.
#if defined(__AVX512F__)
typedef __m512i Bytes;
inline Bytes spread(__m128i sixteen) { return _mm512_broadcast_i32x4(sixteen); }
#if defined(__AVX512VBMI__)
// Six bits of a code are looked at, and the table has all sixteen bytes four times: the others may be anything.
constexpr uint32_t CODE_BITS = ~0u;
inline Bytes look_up(Bytes table, Bytes codes) { return _mm512_permutexvar_epi8(codes, table); }
#else
constexpr uint32_t CODE_BITS = 0x0f0f0f0fu;
inline Bytes look_up(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }
#endif
inline Bytes mixed_low(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes mixed_high(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
// a | (b & c), and a | (b & ~c).
inline Bytes with_those(Bytes a, Bytes b, Bytes c) { return _mm512_ternarylogic_epi64(a, b, c, 0xf8); }
inline Bytes with_others(Bytes a, Bytes b, Bytes c) { return _mm512_ternarylogic_epi64(a, b, c, 0xf4); }
#else
typedef __m256i Bytes;
constexpr uint32_t CODE_BITS = 0x0f0f0f0fu;
inline Bytes spread(__m128i sixteen) { return _mm256_broadcastsi128_si256(sixteen); }
inline Bytes look_up(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
inline Bytes mixed_low(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes mixed_high(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes with_those(Bytes a, Bytes b, Bytes c) { return a | (b & c); }
inline Bytes with_others(Bytes a, Bytes b, Bytes c) { return a | (b & ~c); }
#endif

}  // namespace bytes
}  // namespace

#endif
