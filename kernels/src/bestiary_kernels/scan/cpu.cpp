// Selective scan: each sequence's state moves on token by token. The numbers of a channel's state lie side by side and
// fill vectors; what is read off them is summed for W channels at once.
#include "../states.hpp"

namespace {

struct ScanCall {
    int64_t tokens, sequences, channels, numbers, slots, softplus;
    int64_t x_stride, dt_stride, b_stride, c_stride, gate_stride;  // elements from one row to the next
};

template <class T> struct ScanInputs {
    const T *x, *dt, *b, *c, *gate;  // gate: null for none
    const float *a, *d;
};

// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|, and log(1 + u) = 2 artanh(s), s = u / (2 + u) <= 1/3. The
// polynomial is our own least-squares fit of 2 artanh(s) / s over s^2 (relative error 1e-10).
inline Floats softplus(Floats x) {
    const Floats u = exp_of(x < 0.0f ? x : -x);
    const Floats s = u / (2.0f + u), z = s * s;
    Floats p = z * 2.439757063e-1f + 2.139754692e-1f;
    p = p * z + 2.862030548e-1f;
    p = p * z + 3.999870738e-1f;
    p = p * z + 6.666667908e-1f;
    p = p * z + 2.0f;
    return larger(x, Floats{}) + s * p;
}

// Lane i becomes the sum of row i: at each step two rows become one, which has half the lanes of each.
template <int half = W / 2> inline Floats sums_of(Floats* rows) {
    const Ints index = lanes(), is_second = (index & half) != 0;
    const Ints near = index + (is_second & (W - half)), far = (index ^ half) + (is_second & (W + half));
    for (int i = 0; i < half; ++i) {
        const Floats a = rows[i], b = rows[i + half];
        rows[i] = __builtin_shuffle(a, b, near) + __builtin_shuffle(a, b, far);
    }
    if constexpr (half > 1) return sums_of<half / 2>(rows);
    return rows[0];
}

// `known`: vectors of a channel's state where the compiler knows how many, else 0.
template <class T, int known> struct Scan {
    const ScanCall& call;
    const Sequences& sequences;
    const ScanInputs<T>& in;
    float* states;
    T* y;

    int parts() const { return known ? known : int((call.numbers + W - 1) / W); }
    bool is_whole() const { return call.numbers % W == 0; }

    // The next state of up to W channels, and what is read off it. `brought`: dt x.
    Floats next(const float* from, float* to, const float* a, const Floats* b, const Floats* c, Floats dt,
                Floats brought, int channels) const {
        const int count = parts();
        float steps[W], weights[W];
        store(steps, dt * 1.44269504f);  // e^(dt a) = 2^(dt a / ln 2)
        store(weights, brought);
        Floats sums[W];
        for (int i = 0; i < channels; ++i) {
            Floats sum{};
            for (int part = 0; part < count; ++part) {
                const int at = (i * count + part) * W;
                const Floats h = power_of_two(load(a + at) * steps[i]) * load(from + at) + weights[i] * b[part];
                store(to + at, h);
                sum += h * c[part];
            }
            sums[i] = sum;
        }
        for (int i = channels; i < W; ++i) sums[i] = Floats{};
        return sums_of(sums);
    }

    // One token, of some channels.
    void token(int64_t t, const float* from, float* to, const float* a, Floats* b, int64_t first,
               int64_t channels) const {
        const int count = parts();
        Floats* const c = b + count;
        for (int part = 0; part < count; ++part) {
            const int n = int(smaller<int64_t>(W, call.numbers - part * W));
            b[part] = load_up_to(in.b + t * call.b_stride + part * W, n);
            c[part] = load_up_to(in.c + t * call.c_stride + part * W, n);
        }
        over_vectors(channels, [&](int64_t i, int n) {
            const int64_t channel = first + i, at = i * count * W;
            const Floats x = load_up_to(in.x + t * call.x_stride + channel, n);
            Floats dt = load_up_to(in.dt + t * call.dt_stride + channel, n);
            if (call.softplus) dt = softplus(dt);
            Floats found = next(from + at, to + at, a + at, b, c, dt, dt * x, n);
            found += load_up_to(in.d + channel, n) * x;
            if (in.gate) found *= silu(load_up_to(in.gate + t * call.gate_stride + channel, n));
            store_up_to(y + t * call.channels + channel, found, n);
        });
    }

    void tokens(int64_t sequence, const float* from, float* to, const float* a, Floats* b, int64_t first,
                int64_t channels) const {
        for (int64_t t = sequences.starts[sequence]; t < sequences.starts[sequence + 1]; ++t, from = to)
            token(t, from, to, a, b, first, channels);
    }

    // Rows of numbers to rows of whole vectors and back.
    void spread(const float* from, float* to, int64_t rows) const {
        for (int64_t i = 0; i < rows; ++i) {
            float* const row = to + i * parts() * W;
            memcpy(row, from + i * call.numbers, size_t(call.numbers) * sizeof *row);
            for (int64_t n = call.numbers; n < parts() * W; ++n) row[n] = 0.0f;
        }
    }
    void gather(const float* from, float* to, int64_t rows) const {
        for (int64_t i = 0; i < rows; ++i)
            memcpy(to + i * call.numbers, from + i * parts() * W, size_t(call.numbers) * sizeof *to);
    }

    size_t scratch_size() const { return size_t(parts()) * W * sizeof(float) * size_t(2 + 2 * CHANNELS); }

    // `own`: memory of this thread.
    void channels(int64_t sequence, int64_t first, int64_t count, void* own) const {
        const int64_t in_slot = first * call.numbers, slot = call.channels * call.numbers;
        float* const to = states + sequences.write[sequence] * slot + in_slot;
        const float* from = states + sequences.read[sequence] * slot + in_slot;
        const size_t size = size_t(count * call.numbers) * sizeof *to;
        if (sequences.fresh[sequence]) {
            memset(to, 0, size);
            from = to;
        } else if (sequences.starts[sequence] == sequences.starts[sequence + 1] && from != to) {
            memcpy(to, from, size);
        }
        Floats* const b = (Floats*)own;
        if (is_whole()) {
            tokens(sequence, from, to, in.a + in_slot, b, first, count);
            return;
        }
        float *const a = (float*)(b + 2 * parts()), *const h = a + CHANNELS * parts() * W;
        spread(in.a + in_slot, a, count);
        spread(from, h, count);
        tokens(sequence, h, h, a, b, first, count);
        gather(h, to, count);
    }

    int run() const {
        bool has_memory = true;
        share_channels(call.sequences, call.tokens, call.channels, call.tokens * call.channels * call.numbers,
                       [&](int64_t sequence, int64_t first, int64_t count) {
                           if (void* const own = scratch(scratch_size()))
                               channels(sequence, first, count, own);
                           else
                               has_memory = false;
                       });
        return has_memory ? OK : NO_MEMORY;
    }
};

template <class T>
int scan(const ScanCall& call, const Sequences& sequences, const ScanInputs<T>& in, float* states, T* y) {
    switch ((call.numbers + W - 1) / W) {
        case 1: return Scan<T, 1>{call, sequences, in, states, y}.run();
        case 2: return Scan<T, 2>{call, sequences, in, states, y}.run();
        case 4: return Scan<T, 4>{call, sequences, in, states, y}.run();
        default: return Scan<T, 0>{call, sequences, in, states, y}.run();
    }
}

}  // namespace

// x, dt, b, c and gate (or null): strided rows of one type. a [channels, numbers], d, states [slots, channels, numbers]
// and y: dense, and float but for y. Slots and starts are looked at before anything is written.
EXPORT(int, selective_scan)(int is_bf16, const void* x, const void* dt, const float* a, const void* b, const void* c,
                            const float* d, const void* gate, float* states, const int64_t* read,
                            const int64_t* write, const int32_t* starts, const uint8_t* fresh, void* y,
                            const ScanCall* call) {
    const Sequences sequences{read, write, starts, fresh};
    const int status = check_sequences(sequences, call->sequences, call->tokens, call->slots);
    if (status != OK) return status;
    if (is_bf16) {
        typedef const bf16* In;
        return scan<bf16>(*call, sequences, {(In)x, (In)dt, (In)b, (In)c, (In)gate, a, d}, states, (bf16*)y);
    }
    typedef const float* In;
    return scan<float>(*call, sequences, {(In)x, (In)dt, (In)b, (In)c, (In)gate, a, d}, states, (float*)y);
}
