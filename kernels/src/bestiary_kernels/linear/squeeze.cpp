// Squeezes a packed weight of bfloat16 into twelve bits, and makes all of it, or some of its rows, wide again.
#include "squeezed.hpp"

#if defined(__AVX512BF16__)

namespace {
namespace squeezed {

// The code of every exponent, 15 for those that have none.
struct Codes {
    __m512i quarters[4];
    explicit Codes(const uint8_t* exponents) {
        uint8_t all[256];
        memset(all, 15, sizeof all);
        for (int code = 0; code < 15; ++code) all[exponents[code]] = uint8_t(code);
        for (int quarter = 0; quarter < 4; ++quarter) quarters[quarter] = _mm512_loadu_si512(all + quarter * 64);
    }
    __m512i of(__m512i exponents) const {
        const __m512i lower = _mm512_permutex2var_epi8(quarters[0], exponents, quarters[1]);
        const __m512i upper = _mm512_permutex2var_epi8(quarters[2], exponents, quarters[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(exponents), lower, upper);
    }
};

// Half a step: 64 weights as bytes of sign and mantissa, and their codes. Returns which of them no code stands for.
inline uint64_t squeeze_half(const char* from, const Codes& table, __m512i& rest, __m512i& codes) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64), byte = _mm512_set1_epi16(255);
    const auto pack = [](__m512i low, __m512i high) { return _mm512_packus_epi16(low, high); };
    const auto exponent = [&](__m512i x) { return _mm512_and_si512(_mm512_srli_epi16(x, 7), byte); };
    // Bit 7 is the sign, the others the mantissa.
    const auto other = [&](__m512i x) {
        const __m512i sign = _mm512_srli_epi16(x, 8), mantissa = _mm512_set1_epi16(127);
        return _mm512_and_si512(_mm512_ternarylogic_epi64(mantissa, x, sign, 0xca), byte);
    };
    const __m512i exponents = pack(exponent(a), exponent(b));
    rest = pack(other(a), other(b));
    codes = table.of(exponents);
    return _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(15)) & _mm512_test_epi8_mask(exponents, exponents);
}

// The place among 64 weights of the byte that holds it.
inline int place_of(int byte) { return byte % 16 < 8 ? byte / 16 * 8 + byte % 16 : 32 + byte / 16 * 8 + byte % 16 - 8; }

// A tile's codes, and its exceptions; returns how many these are. Null: they are only counted.
inline int32_t squeeze_tile(const char* from, const Codes& table, int64_t steps, char* to, uint32_t* exceptions) {
    int32_t found = 0;
    for (int64_t step = 0; step < steps; ++step) {
        __m512i rest[2], codes[2];
        for (int half = 0; half < 2; ++half) {
            const char* const at = from + step * 2 * WEIGHTS + half * 128;
            uint64_t strange = squeeze_half(at, table, rest[half], codes[half]);
            if (!exceptions) {
                found += __builtin_popcountll(strange);
                continue;
            }
            for (; strange; strange &= strange - 1) {
                const int place = place_of(__builtin_ctzll(strange));
                exceptions[found++] = uint32_t(step * WEIGHTS + half * 64 + place) << 16 | ((const uint16_t*)at)[place];
            }
        }
        if (!exceptions) continue;
        for (int half = 0; half < 2; ++half) _mm512_storeu_si512(to + step * BYTES + half * 64, rest[half]);
        _mm512_storeu_si512(to + step * BYTES + WEIGHTS, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
    }
    return found;
}

}  // namespace squeezed
}  // namespace

// With counts: counts[blocks * tiles] of the exceptions of each tile of `packed`. Without: codes and exceptions, where
// `call` says that they shall lie.
EXPORT(int, squeeze)(const SqueezedCall* call, const void* packed, int32_t* counts) {
    const int64_t steps = call->steps(), tiles = squeezed::tiles(steps);
    const squeezed::Codes table(call->exponents);
    share(call->blocks() * tiles, 64, steps > 0, [&](int64_t tile) {
        const int64_t step = tile / tiles * steps + tile % tiles * squeezed::TILE;
        const int64_t n = smaller(squeezed::TILE, steps - tile % tiles * squeezed::TILE);
        const char* const from = (const char*)packed + step * 2 * squeezed::WEIGHTS;
        char* const to = (char*)call->codes + step * squeezed::BYTES;
        if (counts)
            counts[tile] = squeezed::squeeze_tile(from, table, n, nullptr, nullptr);
        else
            squeezed::squeeze_tile(from, table, n, to, (uint32_t*)call->exceptions + call->starts[tile]);
    });
    return OK;
}

// packed [blocks][steps][64][2] gets the weight as it was.
EXPORT(int, unsqueeze)(const SqueezedCall* call, void* packed) {
    const int64_t steps = call->steps(), tiles = squeezed::tiles(steps);
    const squeezed::Tables tables(call->exponents);
    share(call->blocks() * tiles, 64, steps > 0, [&](int64_t tile) {
        const int64_t block = tile / tiles, first = tile % tiles * squeezed::TILE;
        char* const to = (char*)packed + (block * steps + first) * 2 * squeezed::WEIGHTS;
        squeezed::widen(*call, tables, block, first, smaller(steps, first + squeezed::TILE), to);
    });
    return OK;
}

// y [ids, K] gets the rows `ids`.
EXPORT(int, embedding_squeezed)(const SqueezedCall* call, const int64_t* ids, void* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= call->outputs) return BAD_ROW;
    const int64_t steps = call->steps();
    const squeezed::Tables tables(call->exponents);
    share(count, 1, count * steps > 4096, [&](int64_t i) {
        alignas(64) char tile[squeezed::TILE * 2 * squeezed::WEIGHTS];
        const int64_t block = ids[i] / 64, column = ids[i] % 64;
        uint32_t* to = (uint32_t*)y + i * steps;
        const uint32_t* const pairs = (const uint32_t*)tile + column;
        for (int64_t first = 0; first < steps; first += squeezed::TILE) {
            const int64_t end = smaller(steps, first + squeezed::TILE);
            squeezed::widen(*call, tables, block, first, end, tile);
            for (int64_t step = first; step < end; ++step) *to++ = pairs[(step - first) * 64];
        }
    });
    return OK;
}

#endif
