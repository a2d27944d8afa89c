// The scores of one attention tile, in float32: its query rows against a chunk of keys.
//
// A tile holds up to TILE query rows (query tokens x the heads of one KV group) and meets the keys CHUNK at a time, PART
// rows after PART rows, so that the first cache holds what passes between scores and values. For many rows PAIR keys at
// a time are transposed, so that a lane is a key and a score needs no sum across lanes. A few rows are not worth that:
// each meets the keys as they lie, four units of R rows in one vector.
#pragma once

#include "../dot.hpp"
#include "../tiles.hpp"

namespace {

constexpr int TILE = 256, PART = 16, CHUNK = 64, PAIR = 2 * W;
constexpr int R = W / 4;         // rows of which one vector holds four units each
constexpr int FEW_ROWS = 2 * R;  // up to so many, keys are not transposed
// Keys that are met together, so that none waits for its own last product: 32 vector registers on AVX-512, 16 elsewhere.
constexpr int KEYS = W == 16 ? 8 : 4;
constexpr int STEP = 16;         // units that a row's storage is rounded up to
// Rows whose accumulators stay in registers: 32 vector registers on AVX-512, 16 elsewhere.
constexpr int SCORE_ROWS = W == 16 ? 8 : 4;

// Asks memory for the rows that come next while others are read: pages lie anywhere, so that the hardware's own
// prefetch stops at each one's end. A line at a time between arithmetic, for many at once would fill the queue and hold
// up the loads; and in the order in which they lie, whatever the order of reading.
template <class T> struct Ahead {
    const T* const* rows;
    int left;  // rows
    int64_t row_bytes;
    const char *at, *end;

    Ahead() : rows(nullptr), left(0), row_bytes(0), at(nullptr), end(nullptr) {}
    Ahead(const T* const* rows, int count, int64_t width)
        : rows(rows), left(count), row_bytes(width * int64_t(sizeof(T))), at(nullptr), end(nullptr) {}

    void ask() {
        if (at >= end) {
            if (!left) return;
            --left;
            at = (const char*)*rows++;
            end = at + row_bytes;
        }
        ask_ahead(at);
        at += 64;
    }
    // For as many lines as `count` numbers from d on of a row begin.
    void keep_up_with(int64_t d, int count) {
        if (count * sizeof(T) < 64 && d * sizeof(T) % 64) return;
        for (size_t done = 0; done < count * sizeof(T); done += 64) ask();
    }
};

// Asks for the first lines of so many numbers that lie together, well before `Ahead` comes there: with the first one the
// processor looks up where their page is, for which the others would wait.
template <class T> void open_run(const T* from, int64_t count) {
    const int64_t most = PASSES_BY ? 1024 : 512;
    const int64_t bytes = smaller<int64_t>(most, count * int64_t(sizeof(T)));
    for (int64_t at = 0; at < bytes; at += 64) ask_ahead((const char*)from + at);
}

// Four numbers, again and again.
inline Floats load_fours(const float* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from));
#elif defined(__AVX2__)
    return (Floats)_mm256_broadcast_ps((const __m128*)from);
#else
    return load(from);
#endif
}
inline Floats load_fours(const bf16* from) {
    typedef uint64_t Longs __attribute__((vector_size(2 * W)));
    return (Floats)(widen((Halves)(Longs{} + read_as<uint64_t>(from))) << 16);
}

// How q meets k. A unit is what one lane multiplies at once: a float, or a pair of bfloat16 where the machine has it.
template <class T> struct Dot {
    static constexpr int per_unit = 1;
    static Floats load_four(const T* from) { return load_fours(from); }
    static Floats load_units(const T* from) { return load(from); }
    static Floats load_units_part(const T* from, int n) { return load_part(from, n); }
    static float unit(const T* from) { return to_float(*from); }
    static Floats multiply_add(Floats k, float q, Floats sum) { return sum + k * q; }
    static Floats multiply_add(Floats k, Floats q, Floats sum) { return sum + k * q; }
};

#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
    static constexpr int per_unit = 2;
    static Floats load_four(const bf16* from) { return load_fours((const float*)from); }
    static Floats load_units(const bf16* from) { return read_as<Floats>(from); }
    static Floats load_units_part(const bf16* from, int n) {
        bf16 whole[2 * W] = {};
        memcpy(whole, from, size_t(n) * sizeof(bf16));
        return read_as<Floats>(whole);
    }
    static float unit(const bf16* from) { return read_as<float>(from); }
    static Floats multiply_add(Floats k, float q, Floats sum) { return multiply_add(k, splat_bits(q), sum); }
    static Floats multiply_add(Floats k, Floats q, Floats sum) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)k, (__m512bh)q);
    }
    static Floats splat_bits(float q) { return (Floats)_mm512_set1_ps(q); }  // a copy, never arithmetic on the pair
};
#endif

// W x W transpose: log2(W) rounds of a perfect shuffle of the rows.
inline void transpose(Floats rows[W]) {
    const Ints low = (lanes() >> 1) + (lanes() & 1) * W, high = low + W / 2;
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        Floats shuffled[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; ++i) {
            shuffled[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
            shuffled[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = shuffled[i];
    }
}

// Adds the products of `fours` times four units of some keys and of R rows each to sums[key].
template <class T, int fours, class Key> inline void meet_fours(const Floats* q, Key key, Floats sums[KEYS]) {
    Floats held[fours];
    for (int i = 0; i < fours; ++i) held[i] = q[i];
#pragma GCC unroll 8
    for (int t = 0; t < KEYS; ++t) {
        const T* const k = key(t);
#pragma GCC unroll 4
        for (int i = 0; i < fours; ++i)
            sums[t] = Dot<T>::multiply_add(Dot<T>::load_four(k + i * 4 * Dot<T>::per_unit), held[i], sums[t]);
    }
}

// From keys[four][row][key of four] to keys[row][key]: a transpose of fours, as `transpose` is of lanes.
inline void turn_fours(Floats keys[R]) {
    Ints low{}, high{};
    for (int i = 0; i < W; ++i) low[i] = i / 8 * 4 + i % 4 + i / 4 % 2 * W, high[i] = low[i] + W / 2;
#pragma GCC unroll 2
    for (int round = 1; round < R; round *= 2) {
        Floats shuffled[R];
#pragma GCC unroll 2
        for (int i = 0; i < R / 2; ++i) {
            shuffled[2 * i] = __builtin_shuffle(keys[i], keys[i + R / 2], low);
            shuffled[2 * i + 1] = __builtin_shuffle(keys[i], keys[i + R / 2], high);
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) keys[i] = shuffled[i];
    }
}

// keys[four keys] of R rows' scores with some keys as they lie; q[four][row][unit of four]. The lanes of a sum are four
// parts of each row's score.
template <class T>
inline void score_some(const Floats* q, const T* const* k_rows, int64_t width, Ahead<T>& ahead, Floats keys[KEYS / 4]) {
    constexpr int four = 4 * Dot<T>::per_unit;
    Floats sums[KEYS] = {};
    int64_t d = 0;
    for (; d + 4 * four <= width; d += 4 * four, q += 4)
        meet_fours<T, 4>(q, [&](int t) { return ahead.keep_up_with(d, 4 * four), k_rows[t] + d; }, sums);
    for (; d + four <= width; d += four, ++q)
        meet_fours<T, 1>(q, [&](int t) { return ahead.keep_up_with(d, four), k_rows[t] + d; }, sums);
    if (d < width) {
        T rest[KEYS][four] = {};
        for (int t = 0; t < KEYS; ++t) memcpy(rest[t], k_rows[t] + d, size_t(width - d) * sizeof(T));
        meet_fours<T, 1>(q, [&](int t) { return rest[t]; }, sums);
    }
#pragma GCC unroll 2
    for (int i = 0; i < KEYS / 4; ++i)
        keys[i] = sums_of_fours(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
}

// scores[row][key] of R rows and W keys, before any scale.
template <class T>
SEPARATE void score_few(const Floats* q, const T* const* k_rows, int64_t width, float* scores, Ahead<T>& to_come) {
    Ahead<T> ahead = to_come;
    Floats keys[R];
    for (int i = 0; i < W; i += KEYS) score_some(q, k_rows + i, width, ahead, keys + i / 4);
    to_come = ahead;
    turn_fours(keys);
    for (int r = 0; r < R; ++r) store(scores + r * CHUNK, keys[r]);
}

// keys_units[unit][half][lane] of PAIR keys; the lanes of absent keys hold whatever their row pointer shows.
template <class T> SEPARATE void turn_keys(const T* const* k_rows, int64_t width, Floats* turned) {
    constexpr int step = W * Dot<T>::per_unit;
    for (int half = 0; half < 2; ++half) {
        for (int64_t d = 0; d < width; d += step) {
            Floats rows[W];
            const int n = int(smaller<int64_t>(step, width - d));
            if (n == step)
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) rows[i] = Dot<T>::load_units(k_rows[half * W + i] + d);
            else
                for (int i = 0; i < W; ++i) rows[i] = Dot<T>::load_units_part(k_rows[half * W + i] + d, n);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) turned[2 * (d / Dot<T>::per_unit + i) + half] = rows[i];
        }
    }
}

template <class T, int rows>
SEPARATE void score_rows(const float* q, int64_t q_stride, const Floats* turned, int64_t units, float* scores) {
    Floats sums[rows][2] = {};
    for (int64_t u = 0; u < units; ++u) {
        const Floats k0 = turned[2 * u], k1 = turned[2 * u + 1];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            sums[r][0] = Dot<T>::multiply_add(k0, q[r * q_stride + u], sums[r][0]);
            sums[r][1] = Dot<T>::multiply_add(k1, q[r * q_stride + u], sums[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        store(scores + r * CHUNK, sums[r][0]);
        store(scores + r * CHUNK + W, sums[r][1]);
    }
}

template <class T>
void score_tile(int rows, const float* q, int64_t q_stride, const Floats* turned, int64_t units, float* scores) {
    for (int left = rows; left > 0;) {
        int taken = SCORE_ROWS;
        if (left >= SCORE_ROWS)
            score_rows<T, SCORE_ROWS>(q, q_stride, turned, units, scores);
        else if (left >= 4)
            score_rows<T, 4>(q, q_stride, turned, units, scores), taken = 4;
        else if (left == 3)
            score_rows<T, 3>(q, q_stride, turned, units, scores), taken = 3;
        else if (left == 2)
            score_rows<T, 2>(q, q_stride, turned, units, scores), taken = 2;
        else
            score_rows<T, 1>(q, q_stride, turned, units, scores), taken = 1;
        left -= taken;
        q += taken * q_stride;
        scores += taken * CHUNK;
    }
}

#if defined(__AMX_BF16__)
// The same on tiles, as many rows as they hold: those that are none get scores that nobody reads.
template <>
inline void score_tile<bf16>(int rows, const float* q, int64_t q_stride, const Floats* turned, int64_t units,
                             float* scores) {
    for (int row = 0; row < rows; row += tiles::ROWS) {
        float* const to = scores + row * CHUNK;
        tiles::multiply<2>({(const char*)(q + row * q_stride), q_stride * int64_t(sizeof(float)), (const char*)turned,
                            2 * sizeof(Floats), (char*)to, CHUNK * sizeof(float)},
                           units, true, [](int64_t) {});
    }
}
#endif

}  // namespace
