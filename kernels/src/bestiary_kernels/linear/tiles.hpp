// Products on the tile registers of AMX. Knows no source of weights.
//
// A tile is up to 16 rows of 64 bytes. A block's steps, two inputs of 64 outputs each, lie in memory as four tiles of
// weights side by side, sixteen steps high. However few rows x has, they take the same way, so that a row comes out
// alike in any company: a tile of one row costs little more than the vector instructions that would do it.
#pragma once

#include "../simd.hpp"

#if defined(__AMX_BF16__)

namespace {
namespace tiles {

constexpr int ROWS = 16, STEPS = 16;

// Tile 0 to 3: sums of four vectors; 4: sixteen steps of x, 5: their weights; 6 and 7: the same of steps that are left.
// Their numbers stand in the code since they become part of the instructions.

// GCC's intrinsics do not say that they read memory: what was written there is so from here on.
inline void is_written(const void* at) { __asm__ volatile("" ::"r"(at) : "memory"); }

// The shapes of the tiles, which the processor keeps until they are released.
class Shapes {
  public:
    ~Shapes() {
        if (rows) _tile_release();
    }
    void set(int64_t rows_now, int64_t left_now) {
        if (rows == rows_now && left == left_now) return;
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

// sums[row][64] += x[row] * weights, in `steps` steps, of at most 16 rows; `ahead` asks for what comes after a step.
template <class Ahead>
inline void multiply(Shapes& shapes, const char* weights, const bf16* x, int64_t x_stride, int64_t rows, int64_t steps,
                     Floats (*sums)[4], Ahead ahead) {
    constexpr int64_t step_bytes = 256, sum_bytes = sizeof *sums;
    const int64_t whole = steps / STEPS * STEPS, x_bytes = x_stride * int64_t(sizeof *x);
    shapes.set(rows, steps - whole);
    char* const to = (char*)sums;
    is_written(to), is_written(weights), is_written(x);
    _tile_loadd(0, to, sum_bytes); _tile_loadd(1, to + 64, sum_bytes);
    _tile_loadd(2, to + 128, sum_bytes); _tile_loadd(3, to + 192, sum_bytes);
    const char* at = weights;
    for (int64_t step = 0; step < whole; step += STEPS, at += STEPS * step_bytes) {
        for (int i = 0; i < STEPS; ++i) ahead(step + i);
        _tile_loadd(4, x + 2 * step, x_bytes);
        _tile_loadd(5, at, step_bytes); _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, at + 64, step_bytes); _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(5, at + 128, step_bytes); _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, at + 192, step_bytes); _tile_dpbf16ps(3, 4, 5);
    }
    if (whole < steps) {
        for (int64_t step = whole; step < steps; ++step) ahead(step);
        _tile_loadd(6, x + 2 * whole, x_bytes);
        _tile_loadd(7, at, step_bytes); _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, at + 64, step_bytes); _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, at + 128, step_bytes); _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(7, at + 192, step_bytes); _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, to, sum_bytes); _tile_stored(1, to + 64, sum_bytes);
    _tile_stored(2, to + 128, sum_bytes); _tile_stored(3, to + 192, sum_bytes);
}

}  // namespace tiles
}  // namespace

#endif
