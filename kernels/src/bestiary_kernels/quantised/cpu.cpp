// Product of rows with a weight of small whole numbers and scales.
//
// A weight lies in blocks of 64 outputs, in each the inputs two by two (a step). Of int8 a step is [64][2] bytes; of int4
// it is 32 words of four codes: code j of word 2 c + i is that of output 16 j + c and input i. A tile of some steps is
// widened where the first cache keeps it, and all rows take turns over it: memory is read once, and only the codes.
// Products are exact in float32 and so are the sums' order and places of rounding the same whatever the number of rows.
// int8 that meets bfloat16 in pairs goes the way of int8.hpp; int4 that does so meets AMX's tiles where they are.
#include "../linear/one.hpp"
#include "int8.hpp"

namespace {
namespace quantised {

// Steps of a tile, and rows that one pass over the weight takes.
constexpr int TILE = 32, PASS_ROWS = 128, DIRECT_ROWS = 6;
#if defined(__AMX_BF16__)
using tiles::Shapes;
constexpr bool ON_TILES = true;  // where weights and x meet in pairs
#else
struct Shapes {};
constexpr bool ON_TILES = false;
#endif
// Rows that go together.
constexpr int ROWS = TOGETHER_ROWS;
// Multiplications below which a region costs more than it gains.
constexpr int64_t WORTH_SHARING = 65536;
// Runs of units that a thread has at least, each one straight line of memory.
constexpr int64_t PIECES_EACH = 4;

// The weights of W outputs at a step, for both inputs. `vector` counts the block's vectors.
template <int bits> struct Codes;
template <> struct Codes<8> {
    static constexpr int BYTES = 128;
    static void take(const char* at, int vector, Floats& even, Floats& odd) {
        const Ints pairs = (Ints)widen(read_as<Halves>(at + vector * 2 * W));
        even = __builtin_convertvector((Ints)((Words)pairs << 24) >> 24, Floats);
        odd = __builtin_convertvector((Ints)((Words)pairs << 16) >> 24, Floats);
    }
};
template <> struct Codes<4> {
    static constexpr int BYTES = 64;
    static void take(const char* at, int vector, Floats& even, Floats& odd) {
        const int column = vector * W, code = column / 16;
        const Words words = read_as<Words>(at + column % 16 * 4);
        even = __builtin_convertvector((Ints)(words << (28 - 4 * code)) >> 28, Floats);
        odd = __builtin_convertvector((Ints)(words << (12 - 4 * code)) >> 28, Floats);
    }
};

// How weights of a step meet x: in float32 one input after the other.
template <class T> struct Meeting {
    typedef Floats Operand;
    static constexpr int PARTS = 2;
    template <int bits> static void widen_step(const char* at, Operand* to) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) Codes<bits>::take(at, v, to[v], to[VECTORS + v]);
    }
    typedef float Input;  // what is spread over all lanes
    static Input input(const T* x, int part) { return to_float(x[part]); }
    static Operand spread(Input x) { return splat(x); }
    static Floats add(Floats sum, Operand w, Operand x) { return sum + w * x; }
};

#if defined(__AVX512BF16__)
// Both inputs at once, as bfloat16, which holds every code exactly.
template <> struct Meeting<bf16> {
    typedef __m512bh Operand;
    static constexpr int PARTS = 1;
    template <int bits> static void widen_step(const char* at, Operand* to) {
        static_assert(bits == 4, "int8.hpp has the others");
        // Of an index the instruction looks at five bits: the table has every number twice.
        const __m512i table = table_of_codes(), words = _mm512_loadu_si512(at);
        to[0] = (Operand)_mm512_permutexvar_epi16(words, table);
        to[1] = (Operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
        to[2] = (Operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
        to[3] = (Operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
    }
    static __m512i table_of_codes() {
        // 0 .. 7, -8 .. -1 in bfloat16.
        const __m256i half = _mm256_setr_epi16(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                               int16_t(0xc100), int16_t(0xc0e0), int16_t(0xc0c0), int16_t(0xc0a0),
                                               int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80));
        return _mm512_broadcast_i64x4(half);
    }
    typedef int Input;
    static Input input(const bf16* x, int) { return read_as<int>(x); }
    static Operand spread(Input x) { return (Operand)_mm512_set1_epi32(x); }
    static Floats add(Floats sum, Operand w, Operand x) { return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
};
#endif

template <class T, int bits> struct Product {
    typedef Meeting<T> How;
    typedef typename How::Operand Operand;
    typedef typename How::Input Input;
    static constexpr int STEP_OPERANDS = How::PARTS * VECTORS;

    struct Tile {
        const Operand* at;
        template <int wide> void take(int64_t step, int part, int first, Operand* w) const {
#pragma GCC unroll 8
            for (int c = 0; c < wide; ++c) w[c] = at[step * STEP_OPERANDS + part * VECTORS + first + c];
        }
    };
    struct Direct {
        const char* at;
        template <int> void take(int64_t step, int, int, Operand* w) const {
            const char* const here = at + step * Codes<bits>::BYTES;
            for (int line = 0; line < Codes<bits>::BYTES; line += 64) ask_once(here + AHEAD + line);
            How::template widen_step<bits>(here, w);
        }
    };

    struct Rows {
        const T* at;
        int64_t stride;
        template <int some> Input take(int64_t step, int part, int row) const {
            return How::input(at + row * stride + 2 * step, part);
        }
    };
    struct Packed {
        const Input* at;
        template <int some> Input take(int64_t step, int part, int row) const {
            return at[(step * How::PARTS + part) * some + row];
        }
    };

    const QuantisedCall& call;
    const T* x;
    T* y;
    int64_t rows, steps, blocks, pieces;
    Input* inputs = nullptr;      // x by groups of rows, in each [steps, parts, rows], where it is not read as it is
    float* partial = nullptr;     // [blocks, pieces, rows, 64], where there are several pieces
    int32_t* finished = nullptr;  // pieces of each block

    int64_t span() const { return bits == 8 ? TILE : smaller<int64_t>(TILE, call.group / 2); }

    // sums[row] += scales * (x[row] . tile) over some steps that have their scales in common.
    template <int some, class Source, class From>
    void add_span(Source source, From from, int64_t n, const float* scales, float* sums) const {
        constexpr int wide = wide_for(some);
        for (int first = 0; first < VECTORS; first += wide) {
            Floats local[some][wide] = {};
            for (int64_t step = 0; step < n; ++step)
                for (int part = 0; part < How::PARTS; ++part) {
                    Operand w[wide];
                    source.template take<wide>(step, part, first, w);
#pragma GCC unroll 8
                    for (int r = 0; r < some; ++r) {
                        const Operand v = How::spread(from.template take<some>(step, part, r));
#pragma GCC unroll 8
                        for (int c = 0; c < wide; ++c) local[r][c] = How::add(local[r][c], w[c], v);
                    }
                }
            for (int r = 0; r < some; ++r)
                for (int c = 0; c < wide; ++c) {
                    float* const sum = sums + r * COLUMNS + (first + c) * W;
                    store(sum, load(sum) + local[r][c] * load(scales + (first + c) * W));
                }
        }
    }

    template <class Source, class From>
    void add_rows(int64_t some, Source tile, From from, int64_t n, const float* scales, float* sums) const {
        switch (some) {
            case 1: return add_span<1>(tile, from, n, scales, sums);
            case 2: return add_span<2>(tile, from, n, scales, sums);
            case 3: return add_span<3>(tile, from, n, scales, sums);
            case 4: return add_span<4>(tile, from, n, scales, sums);
            case 5: return add_span<5>(tile, from, n, scales, sums);
            case 6: return add_span<6>(tile, from, n, scales, sums);
        }
    }

    // The scales of a block's steps from `step` on, for each span of a tile.
    const float* scales_of(int64_t block, int64_t step, int64_t spans, float* room) const {
        if constexpr (bits == 8) return (const float*)call.scales + block * COLUMNS;
        const int64_t groups = (call.inputs + call.group - 1) / call.group;
        const bf16* const from = (const bf16*)call.scales + (block * groups + 2 * step / call.group) * COLUMNS;
        for (int64_t i = 0; i < spans * COLUMNS; i += W) store(room + i, load(from + i));
        return room;
    }

#if defined(__AMX_BF16__)
    // sums[64] += scales * (x . the steps whose codes are at `at`), of one row; added up as tiles do.
    static void add_one(const char* at, const T* from, int64_t n, const float* scales, float* sums) {
        Floats local[VECTORS] = {};
        multiply_one_row(from, n, local, [&](int64_t step, auto use) {
            const char* const codes = at + step * Codes<bits>::BYTES;
            ask_once(codes + AHEAD);
            Operand w[VECTORS];
            How::template widen_step<bits>(codes, w);
#pragma GCC unroll 4
            for (int c = 0; c < VECTORS; ++c) use(c, (Words)w[c]);
        });
        for (int c = 0; c < VECTORS; ++c) store(sums + c * W, load(sums + c * W) + local[c] * load(scales + c * W));
    }

    // The same of all rows and a tile of weights, which begins with step `first`, on tile registers.
    void add_on_tiles(int64_t first, int64_t n, const Operand* tile, const float* scales, float* sums,
                      Shapes& shapes) const {
        alignas(64) float local[tiles::ROWS * COLUMNS];
        const int64_t groups = (rows + tiles::ROWS - 1) / tiles::ROWS;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t row = rows * group / groups, some = rows * (group + 1) / groups - row;
            const T* const from = x + row * call.inputs + 2 * first;
            shapes.set(some, n % tiles::STEPS);
            tiles::multiply<VECTORS>({(const char*)from, call.inputs * int64_t(sizeof(T)), (const char*)tile, Wide::BYTES,
                                      (char*)local, COLUMNS * sizeof(float)},
                                     n, true, [](int64_t) {});
            float* const to = sums + row * COLUMNS;
            for (int64_t i = 0; i < some * COLUMNS; i += W)
                store(to + i, load(to + i) + load(local + i) * load(scales + i % COLUMNS));
        }
    }
#endif

    // sums[rows][64] += the steps first .. end of a block, at most a tile.
    void add_tile(int64_t block, int64_t first, int64_t end, float* sums, Shapes& shapes) const {
        alignas(64) Operand tile[TILE * STEP_OPERANDS];
        alignas(64) float room[bits == 8 ? 1 : TILE / 4 * COLUMNS];
        const char* at = (const char*)call.weight + (block * steps + first) * Codes<bits>::BYTES;
        const int64_t width = span(), spans = (end - first + width - 1) / width;
        const float* const scales = scales_of(block, first, spans, room);
        // meet(first step of a span, steps, scales) for each, counted from the tile's first step.
        const auto over_spans = [&](auto meet) {
            for (int64_t s = 0, step = 0; s < spans; ++s, step += width)
                meet(step, smaller(width, end - first - step), scales + s * COLUMNS);
        };
        if constexpr (How::PARTS == 1 && !ON_TILES)
            if (rows <= DIRECT_ROWS)
                return over_spans([&](int64_t step, int64_t n, const float* scales) {
                    add_rows(rows, Direct{at + step * Codes<bits>::BYTES}, Rows{x + 2 * (first + step), call.inputs}, n,
                             scales, sums);
                });
#if defined(__AMX_BF16__)
        if constexpr (How::PARTS == 1)
            if (rows == 1)
                return over_spans([&](int64_t step, int64_t n, const float* scales) {
                    add_one(at + step * Codes<bits>::BYTES, x + 2 * (first + step), n, scales, sums);
                });
#endif
        for (int64_t step = 0; step < end - first; ++step) {
            const char* const here = at + step * Codes<bits>::BYTES;
            for (int line = 0; line < Codes<bits>::BYTES; line += 64) ask_once(here + AHEAD + line);
            How::template widen_step<bits>(here, tile + step * STEP_OPERANDS);
        }
#if defined(__AMX_BF16__)
        if constexpr (How::PARTS == 1)
            return over_spans([&](int64_t step, int64_t n, const float* scales) {
                add_on_tiles(first + step, n, tile + step * STEP_OPERANDS, scales, sums, shapes);
            });
#endif
        const int64_t groups = (rows + ROWS - 1) / ROWS;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t row = rows * group / groups, some = rows * (group + 1) / groups - row;
            over_spans([&](int64_t step, int64_t n, const float* scales) {
                add_rows(some, Tile{tile + step * STEP_OPERANDS},
                         Packed{inputs + (row * steps + (first + step) * some) * How::PARTS}, n, scales,
                         sums + row * COLUMNS);
            });
        }
    }

    void pack(int64_t group) const {
        const int64_t groups = (rows + ROWS - 1) / ROWS;
        const int64_t row = rows * group / groups, some = rows * (group + 1) / groups - row;
        Input* to = inputs + row * steps * How::PARTS;
        for (int64_t step = 0; step < steps; ++step)
            for (int part = 0; part < How::PARTS; ++part)
                for (int64_t r = 0; r < some; ++r) *to++ = How::input(x + (row + r) * call.inputs + 2 * step, part);
    }

    void write_block(int64_t block, const float* sums) const {
        const int64_t first = block * COLUMNS;
        over_vectors(smaller<int64_t>(COLUMNS, call.outputs - first), [&](int64_t column, int n) {
            Floats bias{};
            if (call.bias) bias = load_up_to((const T*)call.bias + first + column, n);
            for (int64_t r = 0; r < rows; ++r)
                store_up_to(y + r * call.outputs + first + column, load(sums + r * COLUMNS + column) + bias, n);
        });
    }

    // Adds up a block's pieces in their order, whoever made them.
    void write_pieces(int64_t block) const {
        float* const sums = partial + block * pieces * rows * COLUMNS;
        for (int64_t i = 0; i < rows * COLUMNS; i += W) {
            Floats sum = load(sums + i);
            for (int64_t piece = 1; piece < pieces; ++piece) sum += load(sums + piece * rows * COLUMNS + i);
            store(sums + i, sum);
        }
        write_block(block, sums);
    }

    void unit(int64_t number) const {
        alignas(64) float own[PASS_ROWS * COLUMNS];
        const int64_t block = number / pieces, piece = number % pieces, tiles = (steps + TILE - 1) / TILE;
        float* const sums = pieces == 1 ? own : partial + number * rows * COLUMNS;
        memset(sums, 0, size_t(rows) * COLUMNS * sizeof *sums);
        Shapes shapes;
        for (int64_t tile = tiles * piece / pieces; tile < tiles * (piece + 1) / pieces; ++tile)
            add_tile(block, tile * TILE, smaller(steps, (tile + 1) * TILE), sums, shapes);
        if (pieces == 1)
            write_block(block, sums);
        else if (__atomic_fetch_add(finished + block, 1, __ATOMIC_ACQ_REL) == pieces - 1)
            write_pieces(block);
    }

    // Few blocks are cut into pieces, so that every thread has its share; how many does not depend on the rows.
    int run() {
        const int64_t wanted = 8 * omp_get_max_threads(), tiles = (steps + TILE - 1) / TILE;
        pieces = blocks < wanted ? smaller((wanted + blocks - 1) / blocks, tiles) : 1;
        const bool packs = How::PARTS > 1 || (rows > DIRECT_ROWS && !ON_TILES);
        const int64_t num_inputs = packs ? rows * steps * How::PARTS : 0;
        const int64_t num_sums = pieces > 1 ? blocks * pieces * rows * COLUMNS : 0;
        partial = (float*)scratch(size_t(num_inputs + num_sums + blocks) * 4);
        if (!partial) return NO_MEMORY;
        inputs = (Input*)(partial + num_sums);
        finished = (int32_t*)(inputs + num_inputs);
        memset(finished, 0, size_t(blocks) * sizeof *finished);
        const Product& all = *this;
        if (packs)
            share((rows + ROWS - 1) / ROWS, 1, num_inputs > WORTH_SHARING / 8, [&](int64_t group) { all.pack(group); });
        const int64_t units = blocks * pieces, chunk = units / (PIECES_EACH * omp_get_max_threads()) + 1;
        share(units, chunk, blocks * steps * 2 * COLUMNS * rows > WORTH_SHARING, [&](int64_t number) { all.unit(number); });
        return OK;
    }
};

template <class T, int bits> int multiply(const QuantisedCall& call, const T* x, T* y, int64_t rows) {
    const int64_t steps = call.inputs / 2, blocks = (call.outputs + COLUMNS - 1) / COLUMNS;
    for (int64_t row = 0; row < rows; row += PASS_ROWS) {
        Product<T, bits> product{call, x + row * call.inputs, y + row * call.outputs, smaller<int64_t>(PASS_ROWS, rows - row),
                                 steps, blocks, 1};
        if (const int status = product.run()) return status;
    }
    return OK;
}

template <class T> int multiply_any(const QuantisedCall& call, const T* x, T* y, int64_t rows) {
    if (call.bits == 4) return multiply<T, 4>(call, x, y, rows);
#if defined(__AVX512BF16__)
    if constexpr (__is_same(T, bf16))
        return multiply_any_rows(Int8{call}, x, call.inputs, y, rows);
    else
#endif
        return multiply<T, 8>(call, x, y, rows);
}

}  // namespace quantised
}  // namespace

// x [rows, K] and y [rows, N], both dense.
EXPORT(int, quantised_linear)(const QuantisedCall* call, const void* x, void* y, int64_t rows) {
    if (rows < 0) return BAD_ROW;
    return call->is_bf16 ? quantised::multiply_any(*call, (const bf16*)x, (bf16*)y, rows)
                         : quantised::multiply_any(*call, (const float*)x, (float*)y, rows);
}
