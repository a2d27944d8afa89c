// Experts whose matrices are squeezed: the rows of each go together through its matrix, block by block. Included after
// activation/cpu.cpp, linear/cpu.cpp, moe/cpu.cpp and moe/linear.cpp, of which it uses the activations, the source of
// wide weights and the calls.
#include "chosen.hpp"

#if defined(__AVX2__)

namespace {
namespace squeezed {

// A matrix of every expert, all of one shape.
struct Matrices {
    const SqueezedCall* all;

    // y [choices, N] of x [choices, K], both in the order of the experts; with two halves, of whole blocks each, the
    // first one gates: [choices, N / 2].
    template <int halves> int multiply(const Buckets& buckets, const bf16* x, bf16* y, int kind = AS_IT_IS) const {
        const int64_t blocks = all->blocks() / halves, few = few_first(buckets);
        share(few * blocks, 1, true, [&](int64_t item) {
            const Bucket& bucket = buckets.all[item / blocks];
            const Squeezed source{all[bucket.expert]};
            const int64_t passes = (bucket.count + MOST_ROWS - 1) / MOST_ROWS;
            for (int64_t pass = 0; pass < passes; ++pass) {
                const int64_t begin = bucket.count * pass / passes, end = bucket.count * (pass + 1) / passes;
                multiply_rows<halves>(source, item % blocks, bucket.first + begin, end - begin, x, y, kind);
            }
        });
#if defined(__AMX_BF16__)
        return multiply_many<halves>(buckets, few, x, y, kind);
#else
        return OK;
#endif
    }

  private:
    // Brings the experts of few rows to the front, and says how many they are; squares are better for the others.
    int64_t few_first(const Buckets& buckets) const {
#if defined(__AMX_BF16__)
        if (all->inputs % tiles::SQUARE) return buckets.count;
        int64_t few = 0;
        for (int64_t i = 0; i < buckets.count; ++i) {
            const Bucket bucket = buckets.all[i];
            if (bucket.count > MOST_ROWS) continue;
            buckets.all[i] = buckets.all[few];
            buckets.all[few++] = bucket;
        }
        return few;
#else
        return buckets.count;
#endif
    }

#if defined(__AMX_BF16__)
    // The buckets from `few` on: a group of blocks after the other, each with all rows.
    template <int halves>
    int multiply_many(const Buckets& buckets, int64_t few, const bf16* x, bf16* y, int kind) const {
        typedef ManyRows<Squeezed, halves> Many;
        const int64_t inputs = all->inputs, width = all->outputs / halves;
        const auto over = [&](int64_t i, auto run) {
            const Bucket& bucket = buckets.all[i];
            const Squeezed source{all[bucket.expert]};
            return run(Many{source, x + bucket.first * inputs, inputs, y + bucket.first * width, bucket.count, kind});
        };
        if (few == buckets.count) return OK;
        const int64_t groups = over(few, [](const Many& many) { return many.least_groups(); });
        int missed = 0;
        share((buckets.count - few) * groups, 1, true, [&](int64_t item) {
            over(few + item / groups, [&](const Many& many) {
                for (int64_t part = 0; part < many.parts; ++part)
                    if (!many.run(part, item % groups, groups)) __atomic_store_n(&missed, 1, __ATOMIC_RELAXED);
            });
        });
        return missed ? NO_MEMORY : OK;
    }
#endif

    template <int halves>
    static void multiply_rows(const Squeezed& source, int64_t block, int64_t first, int64_t rows, const bf16* x,
                              bf16* y, int kind) {
        const int64_t inputs = source.call.inputs, width = source.call.outputs / halves;
        Floats sums[halves][MOST_ROWS][VECTORS];
        for (int half = 0; half < halves; ++half) {
            memset(sums[half], 0, size_t(rows) * sizeof(Sums));
            const int64_t at = block + half * source.call.blocks() / halves;
            multiply_groups(source, at, x + first * inputs, inputs, rows, 0, inputs / 2, sums[half]);
        }
        y += first * width;
        if constexpr (halves == 1) return write_block(source, block, sums[0], rows, y);
        const Sums *const gate = sums[0], *const up = sums[halves - 1];
        of_kind(kind, [&](auto of) {
            for (int64_t r = 0; r < rows; ++r)
                for (int c = 0; c < VECTORS; ++c)
                    store(y + r * width + block * COLUMNS + c * W, gated<of.KIND>(gate[r][c], up[r][c]));
        });
    }
};

// Rows brought into the order of the experts, and back into that of the choices.
struct Ordered {
    const Buckets& buckets;
    int64_t choices;

    template <class Move> void over(int64_t width, Move move) const {
        share(choices, 1, choices * width > 32768, [&](int64_t i) { move(i, buckets.order[i]); });
    }
    // `each` choices share a row of x.
    void gather(const bf16* x, int64_t each, int64_t stride, int64_t width, bf16* to) const {
        over(width, [&](int64_t i, int64_t choice) {
            memcpy(to + i * width, x + choice / each * stride, size_t(width) * sizeof *to);
        });
    }
    void scatter(const bf16* from, int64_t width, bf16* y) const {
        over(width, [&](int64_t i, int64_t choice) {
            memcpy(y + choice * width, from + i * width, size_t(width) * sizeof *y);
        });
    }
};

// What the experts say of each token, weighed and added in the order of the experts.
inline void combine(const MoeCall& call, const Buckets& buckets, const float* weights, const bf16* said,
                    int64_t* places, bf16* y) {
    int64_t* const found = places + call.tokens * call.top_k;  // of each token
    memset(found, 0, size_t(call.tokens) * sizeof *found);
    for (int64_t i = 0; i < call.tokens * call.top_k; ++i) {
        const int64_t token = buckets.order[i] / call.top_k;
        places[token * call.top_k + found[token]++] = i;
    }
    share(call.tokens, 1, call.tokens * call.top_k * call.width > 32768, [&](int64_t token) {
        const int64_t* const own = places + token * call.top_k;
        over_vectors(call.width, [&](int64_t at, int n) {
            Floats sum{};
            for (int64_t k = 0; k < call.top_k; ++k)
                sum += load_up_to(said + own[k] * call.width + at, n) * weights[buckets.order[own[k]]];
            store_up_to(y + token * call.width + at, sum, n);
        });
    });
}

// Bytes that the numbers between the products may take: of more tokens some go after the others.
constexpr int64_t MOST_BYTES = 128 << 20;

// body(first, count) for runs of tokens of nearly equal size, until one fails.
template <class Body> inline int by_runs(int64_t tokens, int64_t bytes_each, Body body) {
    const int64_t runs = 1 + tokens * bytes_each / MOST_BYTES;
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t first = tokens * run / runs, end = tokens * (run + 1) / runs;
        if (const int status = body(first, end - first)) return status;
    }
    return OK;
}

struct Mixture {
    int kind;
    Matrices gate_up, down;

    int run(const MoeCall& call, const bf16* x, const float* weights, const int64_t* experts, bf16* y) const {
        const int64_t choices = call.tokens * call.top_k, width = call.width;
        const size_t sorting = Buckets::bytes(call.experts, choices);
        const size_t counting = size_t(choices + call.tokens) * sizeof(int64_t);
        char* const memory = (char*)scratch(sorting + counting + size_t(choices * numbers(call)) * sizeof(bf16));
        if (!memory) return NO_MEMORY;
        const Buckets buckets = Buckets::sorted(memory, call.experts, experts, choices);
        bf16 *const rows = (bf16*)(memory + sorting + counting), *const hidden = rows + choices * width;
        bf16* const said = hidden + choices * call.inner;
        Ordered{buckets, choices}.gather(x, call.top_k, call.x_stride, width, rows);
        if (const int status = gate_up.multiply<2>(buckets, rows, hidden, kind)) return status;
        if (const int status = down.multiply<1>(buckets, hidden, said)) return status;
        combine(call, buckets, weights, said, (int64_t*)(memory + sorting), y);
        return OK;
    }

    // Of one choice: its row, what is between the products, and what the expert says.
    static int64_t numbers(const MoeCall& call) { return 2 * call.width + call.inner; }
};

}  // namespace squeezed
}  // namespace

// As `moe` of bfloat16, of an expert's matrices the calls: gate_up [experts] of 2 inner x width, down [experts]; `inner`
// in whole blocks.
EXPORT(int, moe_squeezed)(int kind, const void* x, const SqueezedCall* gate_up, const SqueezedCall* down,
                          const float* weights, const int64_t* experts, void* y, const MoeCall* call) {
    if (!are_experts(experts, call->tokens * call->top_k, call->experts)) return BAD_EXPERT;
    if (call->inner % COLUMNS) return BAD_PARTS;
    const squeezed::Mixture mixture{kind, {gate_up}, {down}};
    const int64_t bytes = call->top_k * squeezed::Mixture::numbers(*call) * int64_t(sizeof(bf16));
    return squeezed::by_runs(call->tokens, bytes, [&](int64_t first, int64_t count) {
        MoeCall some = *call;
        some.tokens = count;
        const int64_t choice = first * call->top_k;
        return mixture.run(some, (const bf16*)x + first * call->x_stride, weights + choice, experts + choice,
                           (bf16*)y + first * call->width);
    });
}

// As `experts_linear` of bfloat16.
EXPORT(int, experts_squeezed)(const void* x, const SqueezedCall* matrices, const int64_t* experts, void* y,
                              const ExpertsCall* call) {
    if (!are_experts(experts, call->choices, call->experts)) return BAD_EXPERT;
    const int64_t inputs = call->inputs, outputs = call->outputs, each = call->each;
    const int64_t bytes = each * (inputs + outputs) * int64_t(sizeof(bf16));
    return squeezed::by_runs(each ? call->choices / each : 0, bytes, [&](int64_t first, int64_t count) {
        const int64_t choices = count * each;
        const size_t sorting = Buckets::bytes(call->experts, choices);
        char* const memory = (char*)scratch(sorting + size_t(choices * (inputs + outputs)) * sizeof(bf16));
        if (!memory) return int(NO_MEMORY);
        const Buckets buckets = Buckets::sorted(memory, call->experts, experts + first * each, choices);
        bf16 *const rows = (bf16*)(memory + sorting), *const made = rows + choices * inputs;
        const squeezed::Ordered ordered{buckets, choices};
        ordered.gather((const bf16*)x + first * call->x_stride, each, call->x_stride, inputs, rows);
        if (const int status = squeezed::Matrices{matrices}.multiply<1>(buckets, rows, made)) return status;
        ordered.scatter(made, outputs, (bf16*)y + first * each * outputs);
        return int(OK);
    });
}

#endif
