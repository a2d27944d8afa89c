// Causal convolution of each channel by itself. Some channels' inputs, those kept and those that come, stand in a window
// of floats, a row for each token; kept inputs and weights are turned, as they have a row for each channel.
#include "../states.hpp"

namespace {

struct ConvCall {
    int64_t tokens, sequences, channels, taps, slots, act;  // act: a number of PLAIN_KINDS, or -1
    int64_t x_stride;                                        // elements from one row to the next
};

inline float rounded(float value, float) { return value; }
inline bf16 rounded(float value, bf16) {
    const uint32_t bits = read_as<uint32_t>(&value);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    return {uint16_t(value == value ? nearest : quiet)};
}

// to[j][i] = from[i][j], n numbers of each channel; `known` is n where the compiler knows it.
template <int known, class S>
inline void turn_known(const S* __restrict__ from, float* __restrict__ to, int64_t channels, int64_t n) {
    for (int64_t i = 0; i < channels; ++i)
        for (int64_t j = 0; j < (known ? known : n); ++j) to[j * CHANNELS + i] = to_float(from[i * (known ? known : n) + j]);
}
template <int known, class S>
inline void turn_back_known(const float* __restrict__ from, S* __restrict__ to, int64_t channels, int64_t n) {
    for (int64_t i = 0; i < channels; ++i)
        for (int64_t j = 0; j < (known ? known : n); ++j)
            to[i * (known ? known : n) + j] = rounded(from[j * CHANNELS + i], S{});
}
template <class S> SEPARATE void turn(const S* from, float* to, int64_t channels, int64_t n) {
    if (n == 3) return turn_known<3>(from, to, channels, n);
    if (n == 4) return turn_known<4>(from, to, channels, n);
    turn_known<0>(from, to, channels, n);
}
template <class S> SEPARATE void turn_back(const float* from, S* to, int64_t channels, int64_t n) {
    if (n == 3) return turn_back_known<3>(from, to, channels, n);
    turn_back_known<0>(from, to, channels, n);
}

inline Floats acted(int64_t act, Floats x) {
    of_kind(int(act), [&](auto of) { x = activated<of.KIND>(x); });
    return x;
}

// T: of inputs, weights and outputs; S: of states.
template <class T, class S> struct Convolution {
    // Tokens that stand in the window at once, beside those before them.
    static constexpr int64_t TOKENS = 16;

    const ConvCall& call;
    const Sequences& sequences;
    const T *x, *weight, *bias;  // bias: null for none
    S* states;
    T* y;

    int64_t memory() const { return call.taps - 1; }
    size_t scratch_size() const { return size_t(call.taps + memory() + TOKENS) * CHANNELS * sizeof(float); }

    // The outputs of one token, whose first input is the window's first row.
    void token(const float* weights, const float* window, T* to, int64_t first, int64_t channels) const {
        over_vectors(channels, [&](int64_t i, int n) {
            Floats sum = bias ? load_up_to(bias + first + i, n) : Floats{};
            for (int64_t tap = 0; tap < call.taps; ++tap)
                sum += load(weights + tap * CHANNELS + i) * load(window + tap * CHANNELS + i);
            store_up_to(to + i, acted(call.act, sum), n);
        });
    }

    // `own`: memory of this thread.
    void channels(int64_t sequence, int64_t first, int64_t count, float* own) const {
        const int64_t in_slot = first * memory(), slot = call.channels * memory();
        float *const weights = own, *const window = own + call.taps * CHANNELS;
        float* const next = window + memory() * CHANNELS;  // the rows of tokens that come
        turn(weight + first * call.taps, weights, count, call.taps);
        if (sequences.fresh[sequence])
            memset(window, 0, size_t(memory() * CHANNELS) * sizeof *window);
        else
            turn(states + sequences.read[sequence] * slot + in_slot, window, count, memory());
        const int64_t end = sequences.starts[sequence + 1];
        for (int64_t t = sequences.starts[sequence]; t < end; t += TOKENS) {
            const int64_t rows = smaller(TOKENS, end - t);
            for (int64_t row = 0; row < rows; ++row) {
                const T* const from = x + (t + row) * call.x_stride + first;
                over_vectors(count, [&](int64_t i, int n) {
                    store(next + row * CHANNELS + i, load_up_to(from + i, n));
                });
                token(weights, window + row * CHANNELS, y + (t + row) * call.channels + first, first, count);
            }
            memmove(window, window + rows * CHANNELS, size_t(memory() * CHANNELS) * sizeof *window);
        }
        turn_back(window, states + sequences.write[sequence] * slot + in_slot, count, memory());
    }

    int run() const {
        bool has_memory = true;
        share_channels(call.sequences, call.tokens, call.channels, call.tokens * call.channels * call.taps,
                       [&](int64_t sequence, int64_t first, int64_t count) {
                           if (void* const own = scratch(scratch_size()))
                               channels(sequence, first, count, (float*)own);
                           else
                               has_memory = false;
                       });
        return has_memory ? OK : NO_MEMORY;
    }
};

}  // namespace

// x: strided rows; weight [channels, taps], bias (or null), states [slots, channels, taps - 1] and y: dense. Slots and
// starts are looked at before anything is written.
EXPORT(int, causal_conv)(int is_bf16, int is_kept_bf16, const void* x, const void* weight, const void* bias,
                         void* states, const int64_t* read, const int64_t* write, const int32_t* starts,
                         const uint8_t* fresh, void* y, const ConvCall* call) {
    const Sequences sequences{read, write, starts, fresh};
    const int status = check_sequences(sequences, call->sequences, call->tokens, call->slots);
    if (status != OK) return status;
    const auto run = [&](auto of_x, auto of_states) {
        typedef decltype(of_x) T;
        typedef decltype(of_states) S;
        const T *const inputs = (const T*)x, *const weights = (const T*)weight, *const biases = (const T*)bias;
        return Convolution<T, S>{*call, sequences, inputs, weights, biases, (S*)states, (T*)y}.run();
    };
    if (is_bf16) return is_kept_bf16 ? run(bf16{}, bf16{}) : run(bf16{}, float{});
    return is_kept_bf16 ? run(float{}, bf16{}) : run(float{}, float{});
}
