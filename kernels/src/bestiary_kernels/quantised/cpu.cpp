// Product of rows with a weight of small whole numbers and scales: a source of weights for the walk of linear/walk.hpp.
//
// Codes are read in a straight line and made wide where they meet x, in registers for one row or few, else in a room in
// the first cache over which all rows take turns. Products of codes are exact in float32; the scale of an int8 output
// waits for the end of its sum, those of int4 for the end of their group.
#include "codes.hpp"

namespace {

struct QuantisedCall {
    const void *weight, *scales, *bias;  // the bias has N elements of x's type, or is null
    int64_t outputs, inputs;             // inputs are even: x has a column of zeros where the weight has an odd number
    int64_t bits, group, is_bf16;        // int8: a float a row; int4: a bfloat16 a group of inputs, [blocks][groups][64]
};

namespace quantised {

// The codes of a matrix that rows of T meet.
template <int bits, class T> struct Matrix {
    const QuantisedCall& call;
    typedef Codes<bits> Coded;
    static constexpr int STEP_BYTES = Coded::BYTES;
    static constexpr bool IS_WIDE = false, ALWAYS_AHEAD = false;
    // How far ahead codes are asked for, so that a room comes while the rows take their turns over the one before; and
    // once more for the first cache, by the kernels that read them there byte by byte.
    static constexpr int64_t AHEAD = 4096, NEAR = 1024;
    static constexpr int64_t ALONE_ROWS = Alone<T>::MOST_ROWS;
    static constexpr int64_t NEAR_STEPS = ALONE_ROWS == 1 ? 32 : TURN_STEPS;

    const char* codes(int64_t block, int64_t step) const {
        return (const char*)call.weight + (block * (call.inputs / 2) + step) * Coded::BYTES;
    }
    // The step before which a sum is cut, since others have other scales.
    int64_t end_of_scales(int64_t step) const {
        return bits == 8 ? INT64_MAX : (step / (call.group / 2) + 1) * (call.group / 2);
    }
    auto to(Sums* sums, int64_t block, int64_t step) const {
        if constexpr (bits == 8) {
            return GoOn{sums};
        } else {
            const int64_t groups = (call.inputs + call.group - 1) / call.group;
            const bf16* const from = (const bf16*)call.scales + (block * groups + 2 * step / call.group) * COLUMNS;
            Scaled to{sums, {}};
            for (int c = 0; c < VECTORS; ++c) to.scales[c] = load(from + c * W);
            return to;
        }
    }
    Floats settled(const Sums& sums, int vector, int64_t column) const {
        const Floats sum = Coded::in_order(sums, vector);
        return bits == 8 ? sum * load((const float*)call.scales + column) : sum;
    }

    struct Reader {
        const char* at;
        template <class Use> __attribute__((always_inline)) void pairs(Use use) {
            Coded::pairs(at, use);
            at += Coded::BYTES;
        }
        template <class Use> __attribute__((always_inline)) void floats(Use use) {
            Coded::floats(at, use);
            at += Coded::BYTES;
        }
    };
    Reader reader(int64_t block, int64_t step) const { return {codes(block, step)}; }

    Near bring(int64_t block, int64_t first, int64_t end, char* room) const {
        Keeping steps{Asking{reader(block, first), AskTwice<Matrix>{codes(block, first)}}, room};
        for (int64_t step = first; step < end; ++step) steps.pairs([](int, Words) {});
        return {room, codes(block, end)};
    }
};

template <class T> int multiply(const QuantisedCall& call, const T* x, T* y, int64_t rows) {
    return call.bits == 8 ? multiply_any_rows(Matrix<8, T>{call}, x, call.inputs, y, rows)
                          : multiply_any_rows(Matrix<4, T>{call}, x, call.inputs, y, rows);
}

}  // namespace quantised
}  // namespace

// x [rows, K] and y [rows, N], both dense; K is not 0.
EXPORT(int, quantised_linear)(const QuantisedCall* call, const void* x, void* y, int64_t rows) {
    return call->is_bf16 ? quantised::multiply(*call, (const bf16*)x, (bf16*)y, rows)
                         : quantised::multiply(*call, (const float*)x, (float*)y, rows);
}
