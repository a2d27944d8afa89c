// What recurrent operations share: where each sequence of a ragged batch has its tokens, and the slots of its state.
#pragma once

#include "simd.hpp"

namespace {

struct Sequences {
    const int64_t *read, *write;
    const int32_t* starts;
    const uint8_t* fresh;
};

// The slots to read of sequences that only begin are not looked at.
inline int check_sequences(const Sequences& given, int64_t sequences, int64_t tokens, int64_t slots) {
    if (given.starts[0] != 0 || given.starts[sequences] != tokens) return BAD_RAGGED;
    for (int64_t s = 0; s < sequences; ++s) {
        if (given.starts[s] > given.starts[s + 1]) return BAD_RAGGED;
        const int64_t read = given.fresh[s] ? given.write[s] : given.read[s];
        if (smaller(read, given.write[s]) < 0 || read >= slots || given.write[s] >= slots) return BAD_SLOT;
    }
    return OK;
}

// The channels that one thread takes at a time: whole cache lines of a token's row, and few enough for the first cache.
constexpr int64_t CHANNELS = 64;

// Calls body(sequence, first channel, channels) for all; where there is little to do for each, a thread takes several
// that lie side by side, as memory is read quickest in its order.
template <class Body>
inline void share_channels(int64_t sequences, int64_t tokens, int64_t channels, int64_t work, Body body) {
    const int64_t chunk = tokens <= 2 * sequences ? 8 : 1;
    const int64_t pieces = (channels + CHANNELS - 1) / CHANNELS;
    share(pieces * sequences, chunk, work > 32768, [&](int64_t item) {
        const int64_t first = item % pieces * CHANNELS;
        body(item / pieces, first, smaller(CHANNELS, channels - first));
    });
}

}  // namespace
