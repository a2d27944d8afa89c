// Product of a few rows with a packed weight, and rows read back out of it.
//
// bfloat16: [ceil(N / 64)][K / 2][64][2], the layout that oneDNN's packing gives on AVX-512-bf16 machines; every step
// over K/2 reads 256 consecutive bytes, so each thread walks memory in one straight line.
// The same in twelve bits: squeezed.hpp, from which the near steps are made wide before they are met.
// float32: rows [N][K] as they are.
#include "direct.hpp"
#include "many.hpp"

namespace {

struct PackedCall {
    const void *weight, *bias;  // the bias has N elements of the weight's type, or is null
    int64_t outputs, inputs;
};

// Where a block's weights come from: as they lie.
struct Packed : Unscaled {
    const PackedCall& call;
    explicit Packed(const PackedCall& call) : call(call) {}
    static constexpr int STEP_BYTES = Wide::BYTES;
    static constexpr bool IS_WIDE = true, ALWAYS_AHEAD = true;
    static constexpr int64_t AHEAD = 4096, NEAR_STEPS = Meeting<bf16>::NEAR_STEPS;
    // None where one row alone would not gain: nothing is made wide.
    static constexpr int64_t ALONE_ROWS = Alone<bf16>::MOST_ROWS > 1 ? Alone<bf16>::MOST_ROWS : 0;
    const char* codes(int64_t block, int64_t step) const {
        return (const char*)call.weight + (block * (call.inputs / 2) + step) * Wide::BYTES;
    }
    Near bring(int64_t block, int64_t first, int64_t, char*) const {
        const char* const at = codes(block, first);
        return {at, at + AHEAD};
    }
    WideReader reader(int64_t block, int64_t step) const { return {codes(block, step)}; }
};

#if defined(__AVX2__)

// Or made wide: in registers, or a tile of them in a room in the first cache.
struct Squeezed : Unscaled {
    const SqueezedCall& call;
    explicit Squeezed(const SqueezedCall& call) : call(call) {}
    squeezed::Tables tables{call.exponents};
    static constexpr int STEP_BYTES = squeezed::BYTES;
    static constexpr bool IS_WIDE = false, ALWAYS_AHEAD = false;
    static constexpr int64_t ALONE_ROWS = Alone<bf16>::MOST_ROWS;
    // How far ahead lines come to the second cache, and to the first.
    static constexpr int64_t AHEAD = ALONE_ROWS == 1 ? 4096 : squeezed::AHEAD, NEAR = 1536;
    static constexpr int64_t NEAR_STEPS = squeezed::TILE;
    const char* codes(int64_t block, int64_t step) const {
        return (const char*)call.codes + (block * call.steps() + step) * squeezed::BYTES;
    }
    Near bring(int64_t block, int64_t first, int64_t end, char* room) const {
        for (int64_t step = first, next; step < end; step = next) {
            next = smaller(end, (step / squeezed::TILE + 1) * squeezed::TILE);
            squeezed::widen(call, tables, block, step, next, room + (step - first) * Wide::BYTES);
        }
        return {room, codes(block, end)};
    }
    squeezed::Reader reader(int64_t block, int64_t step) const { return {call, tables, block, step}; }
};

#endif

// Four outputs at a time share the loads of x; a thread walks its outputs' weights in one straight line.
constexpr int TOGETHER = 4;

template <int rows>
inline void multiply_rows(const PackedCall& call, const float* x, int64_t x_stride, float* y, int64_t first,
                          int outputs) {
    const int64_t inputs = call.inputs;
    const float* weight[TOGETHER];
    for (int c = 0; c < TOGETHER; ++c)
        weight[c] = (const float*)call.weight + (first + (c < outputs ? c : 0)) * inputs;
    Floats sums[rows][TOGETHER] = {};
    const auto add = [&](int64_t k, int n) {
        Floats w[TOGETHER];
#pragma GCC unroll 4
        for (int c = 0; c < TOGETHER; ++c) w[c] = load_up_to(weight[c] + k, n);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Floats v = load_up_to(x + r * x_stride + k, n);
#pragma GCC unroll 4
            for (int c = 0; c < TOGETHER; ++c) sums[r][c] += v * w[c];
        }
    };
    int64_t k = 0;
    for (; k + W <= inputs; k += W) add(k, W);
    if (k < inputs) add(k, int(inputs - k));
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < outputs; ++c) {
            const float bias = call.bias ? ((const float*)call.bias)[first + c] : 0.0f;
            y[r * call.outputs + first + c] = sum_of(sums[r][c]) + bias;
        }
}

template <int rows> int multiply_all_rows(const PackedCall& call, const float* x, int64_t x_stride, float* y) {
    const int64_t groups = (call.outputs + TOGETHER - 1) / TOGETHER;
    share(groups, 16, call.outputs * call.inputs > 32768, [&](int64_t group) {
        const int64_t first = group * TOGETHER;
        multiply_rows<rows>(call, x, x_stride, y, first, int(smaller<int64_t>(TOGETHER, call.outputs - first)));
    });
    return OK;
}

}  // namespace

// x [rows, K] of any stride between rows and y [rows, N], dense.
EXPORT(int, linear_packed)(const PackedCall* call, const void* x, void* y, int64_t rows, int64_t x_stride) {
    return multiply_any_rows(Packed{*call}, (const bf16*)x, x_stride, (bf16*)y, rows);
}

#if defined(__AVX2__)

// The same of a squeezed weight, to the bit.
EXPORT(int, linear_squeezed)(const SqueezedCall* call, const void* x, void* y, int64_t rows, int64_t x_stride) {
    return multiply_any_rows(Squeezed{*call}, (const bf16*)x, x_stride, (bf16*)y, rows);
}

#endif

#if defined(__AMX_BF16__)

// The same two of many rows, and what a kind of activation makes of them, plain or gated; to the bit what they give one
// after the other.
EXPORT(int, linear_packed_many)(const PackedCall* call, const void* x, void* y, int64_t rows, int64_t x_stride,
                                int kind, int gated) {
    return multiply_many(Packed{*call}, x, y, rows, x_stride, kind, gated);
}

EXPORT(int, linear_squeezed_many)(const SqueezedCall* call, const void* x, void* y, int64_t rows, int64_t x_stride,
                                  int kind, int gated) {
    return multiply_many(Squeezed{*call}, x, y, rows, x_stride, kind, gated);
}

#endif

// The same for float32, whose rows lie as they are.
EXPORT(int, linear_rows)(const PackedCall* call, const float* x, float* y, int64_t rows, int64_t x_stride) {
    switch (rows) {
        case 0: return OK;
        case 1: return multiply_all_rows<1>(*call, x, x_stride, y);
        case 2: return multiply_all_rows<2>(*call, x, x_stride, y);
        case 3: return multiply_all_rows<3>(*call, x, x_stride, y);
        case 4: return multiply_all_rows<4>(*call, x, x_stride, y);
        case 5: return multiply_all_rows<5>(*call, x, x_stride, y);
        case 6: return multiply_all_rows<6>(*call, x, x_stride, y);
    }
    return BAD_ROW;
}

// y [ids, K] gets the rows `ids` of a bfloat16 weight in the packed layout.
EXPORT(int, embedding_packed)(const PackedCall* call, const int64_t* ids, void* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= call->outputs) return BAD_ROW;
    const int64_t steps = call->inputs / 2;
    share(count, 1, count * steps > 4096, [&](int64_t i) {
        const uint32_t* const from =
            (const uint32_t*)call->weight + ids[i] / COLUMNS * steps * COLUMNS + ids[i] % COLUMNS;
        uint32_t* const to = (uint32_t*)y + i * steps;
        for (int64_t step = 0; step < steps; ++step) to[step] = from[step * COLUMNS];
    });
    return OK;
}
