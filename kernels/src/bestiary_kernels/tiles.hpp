// Products on the tile registers of AMX, of up to 16 rows of 16 pairs of bfloat16 with up to 64 columns of as many pairs.
//
// Columns' pairs lie side by side, step after step: four tiles of 16 columns, 16 steps high. However few rows there are,
// a tile of one costs little more than the vector instructions that would do it.
#pragma once

#include "simd.hpp"

#if defined(__AMX_BF16__)

namespace {
namespace tiles {

constexpr int ROWS = 16, STEPS = 16;
// The rows and the columns that `multiply_square` meets at a time.
constexpr int SQUARE = 2 * ROWS;

// Tile 0 to 3: sums; 4: sixteen pairs of each row, 5: sixteen steps of sixteen columns; 6 and 7: of steps that are left.
// Their numbers stand in the code since they become part of the instructions.

// GCC's intrinsics do not say that they read memory: what was written there is so from here on, and what is yet to be
// written is not before.
inline void is_written(const void* at) { __asm__ volatile("" ::"r"(at) : "memory"); }

// The shapes of the tiles, which the processor keeps until they are released.
class Shapes {
  public:
    ~Shapes() {
        if (rows) _tile_release();
    }
    bool are(int64_t rows_now, int64_t left_now) const { return rows == rows_now && left == left_now; }
    void set(int64_t rows_now, int64_t left_now) {  // what is in the tiles is gone, where they change
        if (are(rows_now, left_now)) return;
        rows = rows_now, left = left_now;
        struct alignas(64) Config {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } config = {};
        config.palette = 1;
        const auto shape = [&](int tile, int64_t height, int64_t steps) {
            config.rows[tile] = uint8_t(height), config.bytes[tile] = uint16_t(4 * steps);
        };
        for (int tile = 0; tile < 5; ++tile) shape(tile, rows, STEPS);
        shape(5, STEPS, STEPS);
        if (left) shape(6, rows, left), shape(7, left, STEPS);
        is_written(&config);
        _tile_loadconfig(&config);
    }

  private:
    int64_t rows = 0, left = 0;
};

// Rows of pairs, steps of columns of pairs, and rows of sums; how many bytes each row is from the next.
struct Operands {
    const char* rows;
    int64_t row_bytes;
    const char* columns;
    int64_t step_bytes;
    char* sums;
    int64_t sum_bytes;
};

// Adds the products of the rows at x with the columns at w; a macro, since tiles' numbers are part of instructions.
#define MEET_ON_TILES(of_rows, of_columns)                  \
    do {                                                    \
        _tile_loadd(of_rows, x, of.row_bytes);              \
        _tile_loadd(of_columns, w, of.step_bytes);          \
        _tile_dpbf16ps(0, of_rows, of_columns);             \
        if constexpr (tiles > 1) {                          \
            _tile_loadd(of_columns, w + 64, of.step_bytes); \
            _tile_dpbf16ps(1, of_rows, of_columns);         \
        }                                                   \
        if constexpr (tiles > 2) {                          \
            _tile_loadd(of_columns, w + 128, of.step_bytes); \
            _tile_dpbf16ps(2, of_rows, of_columns);         \
        }                                                   \
        if constexpr (tiles > 3) {                          \
            _tile_loadd(of_columns, w + 192, of.step_bytes); \
            _tile_dpbf16ps(3, of_rows, of_columns);         \
        }                                                   \
    } while (0)

// The sums of `tiles` times 16 columns: from memory, or zeros.
template <int tiles> inline void load_sums(const char* sums, int64_t row_bytes) {
    is_written(sums);
    _tile_loadd(0, sums, row_bytes);
    if constexpr (tiles > 1) _tile_loadd(1, sums + 64, row_bytes);
    if constexpr (tiles > 2) _tile_loadd(2, sums + 128, row_bytes);
    if constexpr (tiles > 3) _tile_loadd(3, sums + 192, row_bytes);
}
template <int tiles> inline void clear_sums() {
    _tile_zero(0);
    if constexpr (tiles > 1) _tile_zero(1);
    if constexpr (tiles > 2) _tile_zero(2);
    if constexpr (tiles > 3) _tile_zero(3);
}
template <int tiles> inline void store_sums(char* sums, int64_t row_bytes) {
    _tile_stored(0, sums, row_bytes);
    if constexpr (tiles > 1) _tile_stored(1, sums + 64, row_bytes);
    if constexpr (tiles > 2) _tile_stored(2, sums + 128, row_bytes);
    if constexpr (tiles > 3) _tile_stored(3, sums + 192, row_bytes);
}

// Such sums += the products of rows and columns over `steps` steps; `ahead` asks for what comes after a step. The shapes
// fit.
template <int tiles, class Ahead> inline void add_products(const Operands& of, int64_t steps, Ahead ahead) {
    const char *x = of.rows, *w = of.columns;
    is_written(x), is_written(w);
    int64_t step = 0;
    for (; step + STEPS <= steps; step += STEPS, x += 64, w += STEPS * of.step_bytes) {
        for (int i = 0; i < STEPS; ++i) ahead(step + i);
        MEET_ON_TILES(4, 5);
    }
    if (step < steps) {
        for (; step < steps; ++step) ahead(step);
        MEET_ON_TILES(6, 7);
    }
    is_written(w);
}

#undef MEET_ON_TILES

// All of it: sums that lie in memory, after or without a zero.
template <int tiles, class Ahead>
inline void multiply(const Operands& of, int64_t steps, bool from_zero, Ahead ahead) {
    if (from_zero)
        clear_sums<tiles>();
    else
        load_sums<tiles>(of.sums, of.sum_bytes);
    add_products<tiles>(of, steps, ahead);
    store_sums<tiles>(of.sums, of.sum_bytes);
}

// sums[32][32] (+)= rows[32] * columns[32] over whole tiles of steps: each tile that is loaded meets two. The shapes are
// those of whole tiles.
inline void multiply_square(const Operands& of, int64_t steps, bool from_zero) {
    const char *x = of.rows, *w = of.columns;
    char* const lower = of.sums + ROWS * of.sum_bytes;
    is_written(of.sums), is_written(x), is_written(w);
    if (from_zero) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, of.sums, of.sum_bytes);
        _tile_loadd(1, of.sums + 64, of.sum_bytes);
        _tile_loadd(2, lower, of.sum_bytes);
        _tile_loadd(3, lower + 64, of.sum_bytes);
    }
    for (int64_t step = 0; step < steps; step += STEPS, x += 64, w += STEPS * of.step_bytes) {
        _tile_loadd(4, x, of.row_bytes);
        _tile_loadd(5, w, of.step_bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(7, w + 64, of.step_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, x + ROWS * of.row_bytes, of.row_bytes);
        _tile_dpbf16ps(2, 6, 5);
        _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, of.sums, of.sum_bytes);
    _tile_stored(1, of.sums + 64, of.sum_bytes);
    _tile_stored(2, lower, of.sum_bytes);
    _tile_stored(3, lower + 64, of.sum_bytes);
    is_written(of.sums);
}

}  // namespace tiles
}  // namespace

#endif
