// Squeezes a packed weight of bfloat16 into twelve bits, and makes all of it, or some of its rows, wide again.
#include "squeezed.hpp"

#if defined(__AVX2__)

namespace {
namespace squeezed {

typedef uint8_t Eights __attribute__((vector_size(4 * W)));
typedef uint16_t Sixteens __attribute__((vector_size(4 * W)));
constexpr int PARTS = 64 / sizeof(Eights);  // of half a step

// The lower bytes of two vectors, as `decode_bytes` takes them apart.
inline Eights lower_bytes(Sixteens a, Sixteens b) {
#if defined(__AVX512F__)
    return (Eights)_mm512_packus_epi16((__m512i)(a & 255), (__m512i)(b & 255));
#else
    return (Eights)_mm256_packus_epi16((__m256i)(a & 255), (__m256i)(b & 255));
#endif
}

// Bytes of sign and mantissa of some weights, their codes, and 255 where no code stands for one.
struct Part {
    Eights rest, codes, strange;

    Part(Sixteens a, Sixteens b, const uint8_t* exponents) {
        const auto other = [](Sixteens x) { return (x >> 8 & 128) | (x & 127); };
        const Eights found = lower_bytes(a >> 7, b >> 7);
        rest = lower_bytes(other(a), other(b));
        codes = Eights{} + 15;
        for (int code = 0; code < 15; ++code) codes ^= (Eights)(found == exponents[code]) & uint8_t(code ^ 15);
        strange = (Eights)(codes == 15) & (Eights)(found != 0);
    }
    bool has_strange() const {
        const Words words = (Words)strange;
        uint32_t any = 0;
        for (int i = 0; i < W; ++i) any |= words[i];
        return any;
    }
};

// The place among 64 weights of the byte that holds it.
inline int place_of(int byte) { return byte % 16 < 8 ? byte / 16 * 8 + byte % 16 : 32 + byte / 16 * 8 + byte % 16 - 8; }

// A step's codes; tell(place, bits) of each exception.
template <class Tell> inline void squeeze_step(const uint16_t* from, const uint8_t* exponents, char* to, Tell tell) {
    for (int part = 0; part < PARTS; ++part) {
        Eights codes[2];
        for (int half = 0; half < 2; ++half) {
            const uint16_t* const at = from + half * 64;
            const int far = part * int(sizeof(Eights) / 2);
            const Part made(read_as<Sixteens>(at + far), read_as<Sixteens>(at + 32 + far), exponents);
            codes[half] = made.codes;
            if (to) memcpy(to + half * 64 + part * sizeof(Eights), &made.rest, sizeof(Eights));
            if (!made.has_strange()) continue;
            for (int byte = 0; byte < int(sizeof(Eights)); ++byte) {
                const int place = place_of(part * int(sizeof(Eights)) + byte);
                if (made.strange[byte]) tell(half * 64 + place, at[place]);
            }
        }
        const Eights both = codes[0] | codes[1] << 4;
        if (to) memcpy(to + WEIGHTS + part * sizeof(Eights), &both, sizeof both);
    }
}

// A tile's codes, and its exceptions; returns how many these are. Null: they are only counted.
inline int32_t squeeze_tile(const char* from, const uint8_t* exponents, int64_t steps, char* to, uint32_t* exceptions) {
    int32_t found = 0;
    for (int64_t step = 0; step < steps; ++step)
        squeeze_step((const uint16_t*)from + step * WEIGHTS, exponents, exceptions ? to + step * BYTES : nullptr,
                     [&](int place, uint16_t bits) {
                         if (exceptions) exceptions[found] = uint32_t(step * WEIGHTS + place) << 16 | bits;
                         ++found;
                     });
    return found;
}

}  // namespace squeezed
}  // namespace

// With counts: counts[blocks * tiles] of the exceptions of each tile of `packed`. Without: codes and exceptions, where
// `call` says that they shall lie.
EXPORT(int, squeeze)(const SqueezedCall* call, const void* packed, int32_t* counts) {
    const int64_t steps = call->steps(), tiles = squeezed::tiles(steps);
    share(call->blocks() * tiles, 64, steps > 0, [&](int64_t tile) {
        const int64_t step = tile / tiles * steps + tile % tiles * squeezed::TILE;
        const int64_t n = smaller(squeezed::TILE, steps - tile % tiles * squeezed::TILE);
        const char* const from = (const char*)packed + step * 2 * squeezed::WEIGHTS;
        char* const to = (char*)call->codes + step * squeezed::BYTES;
        if (counts)
            counts[tile] = squeezed::squeeze_tile(from, call->exponents, n, nullptr, nullptr);
        else
            squeezed::squeeze_tile(from, call->exponents, n, to, (uint32_t*)call->exceptions + call->starts[tile]);
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
