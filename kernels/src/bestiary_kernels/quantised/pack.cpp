// Rounds a weight to whole numbers and lays them as codes.hpp says. What it gives is the reference's, bit by bit.
#include "codes.hpp"

namespace {
namespace quantised {

struct Source {
    const void* weight;  // [outputs, inputs], dense
    void *codes, *scales;
    int64_t outputs, inputs, group;

    int64_t steps() const { return (inputs + 1) / 2; }
};

inline uint32_t magnitude(float value) { return read_as<uint32_t>(&value) & 0x7fffffffu; }

// The whole number nearest to value / scale, the even one of two. Adding the large number leaves no room for a fraction.
inline Floats nearest(Floats value, Floats scale) {
    const float rounder = 12582912.0f;  // 1.5 * 2^23
    return (value / scale + rounder) - rounder;
}

// As integers, so that a NaN is the largest of all.
template <class T> uint32_t largest_magnitude(const T* from, int64_t n) {
    Words most{};
    over_vectors(n, [&](int64_t i, int some) {
        const Words bits = (Words)load_up_to(from + i, some) & 0x7fffffffu;
        most = most > bits ? most : bits;
    });
    uint32_t found = 0;
    for (int i = 0; i < W; ++i) found = found > most[i] ? found : most[i];
    return found;
}

// to[n] gets the nearest numbers, which int8 holds but for NaN.
template <class T> void round_all(const T* from, int64_t n, float scale, float below, float above, int8_t* to) {
    const Floats low = splat(below), high = splat(above), by = splat(scale == 0.0f ? 1.0f : scale);
    over_vectors(n, [&](int64_t i, int some) {
        Floats whole = nearest(load_up_to(from + i, some), by);
        whole = whole < low ? low : whole;
        whole = whole > high ? high : whole;
        const Ints codes = __builtin_convertvector(whole == whole ? whole : Floats{}, Ints);
        for (int lane = 0; lane < some; ++lane) to[i + lane] = int8_t(codes[lane]);
    });
}

// Puts the codes of one output of a block of 64 in their places, where zeros are.
template <int bits> void lay(const Source& to, int64_t output, const int8_t* row) {
    const Place place = Codes<bits>::place(int(output % 64));
    uint8_t* at = (uint8_t*)to.codes + output / 64 * to.steps() * Codes<bits>::BYTES + place.byte;
    for (int64_t step = 0; step < to.steps(); ++step, at += Codes<bits>::BYTES)
        for (int i = 0; i < 2; ++i) at[i * place.second] |= uint8_t(Codes<bits>::laid(row[2 * step + i]) << place.shift);
}

// `row` has room for an output's codes and the zero behind an odd number of them.
template <class T> void round_row8(const Source& to, int64_t output, const T* from, int8_t* row) {
    const uint32_t most = largest_magnitude(from, to.inputs);
    const float scale = read_as<float>(&most) / 127.0f;
    ((float*)to.scales)[output] = scale;
    round_all(from, to.inputs, scale, -127.0f, 127.0f, row);
}

template <class T> void round_row4(const Source& to, int64_t output, const T* from, int8_t* row) {
    const int64_t groups = (to.inputs + to.group - 1) / to.group, block = output / 64;
    bf16* const scales = (bf16*)to.scales + block * groups * 64 + output % 64;
    for (int64_t g = 0; g < groups; ++g) {
        const T* const some = from + g * to.group;
        const int64_t n = smaller(to.group, to.inputs - g * to.group);
        float farthest = 0.0f;
        for (int64_t i = 0; i < n; ++i)
            if (magnitude(to_float(some[i])) > magnitude(farthest)) farthest = to_float(some[i]);
        bf16 rounded[W];
        store(rounded, splat(farthest / -8.0f));
        scales[g * 64] = rounded[0];
        round_all(some, n, to_float(rounded[0]), -8.0f, 7.0f, row + g * to.group);
    }
}

template <class T, int bits> int pack(const Source& to) {
    const int64_t blocks = (to.outputs + 63) / 64, groups = (to.inputs + to.group - 1) / to.group;
    const int64_t code_bytes = to.steps() * Codes<bits>::BYTES, scale_bytes = bits == 8 ? 256 : groups * 128;
    int8_t* const rows = (int8_t*)scratch(size_t(blocks * 2 * to.steps()));
    if (!rows) return NO_MEMORY;
    share(blocks, 1, to.outputs * to.inputs > 65536, [&](int64_t block) {
        int8_t* const row = rows + block * 2 * to.steps();
        row[2 * to.steps() - 1] = 0;
        memset((char*)to.codes + block * code_bytes, 0, size_t(code_bytes));
        memset((char*)to.scales + block * scale_bytes, 0, size_t(scale_bytes));
        for (int64_t output = block * 64; output < smaller(to.outputs, block * 64 + 64); ++output) {
            const T* const from = (const T*)to.weight + output * to.inputs;
            if constexpr (bits == 8)
                round_row8(to, output, from, row);
            else
                round_row4(to, output, from, row);
            lay<bits>(to, output, row);
        }
    });
    return OK;
}

}  // namespace quantised
}  // namespace

// weight [N, K] to codes [blocks of 64, steps of two inputs, ...] and scales [blocks, groups, 64]; see codes.hpp.
EXPORT(int, quantise)(int is_bf16, int bits, const void* weight, void* codes, void* scales, int64_t outputs,
                      int64_t inputs, int64_t group) {
    const quantised::Source to{weight, codes, scales, outputs, inputs, group};
    if (inputs == 0) return OK;
    if (is_bf16) return bits == 8 ? quantised::pack<bf16, 8>(to) : quantised::pack<bf16, 4>(to);
    return bits == 8 ? quantised::pack<float, 8>(to) : quantised::pack<float, 4>(to);
}
