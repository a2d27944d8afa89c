// Activation y = act(x), and gated activation y = act(gate) * up over rows that hold gate and up side by side.
#include "../simd.hpp"

namespace {

// The order of the kinds in activation/__init__.py; only the first four gate. Other operations may do without any.
enum Kind : int { AS_IT_IS = -1, SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, QUICK_GELU = 5 };

// x / (1 + e^-y). A division takes as long as all the rest: on AVX-512 it is an estimate of the reciprocal and Newton's
// step, which double its 14 bits. What is divided by is bounded where the estimate would have fewer.
inline Floats over_one_and_exp(Floats x, Floats y) {
    Floats d = 1.0f + exp_of(-y);
#if defined(__AVX512F__)
    d = lesser(splat(0x1p126f), d);  // in this order a NaN stays
    const Floats estimate = (Floats)_mm512_rcp14_ps((__m512)d);
    return x * (estimate * (2.0f - d * estimate));
#else
    return x / d;
#endif
}
inline Floats silu(Floats x) { return over_one_and_exp(x, x); }

inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }  // a NaN is not below zero and stays

// gelu is relu(x) - m erfc(m / sqrt 2) / 2 with m = |x|, so that the far negative tail keeps its digits.
#if defined(__AVX512F__)

// erfc(m / sqrt 2) / 2 in parts of 0.26 by our own fits in m (3e-6), the highest power first; from 8.06 on it is 0. A
// vector's lanes find their numbers among a table's 32 with one instruction.
constexpr float TAIL_PART = 0.26f;
alignas(64) constexpr float TAIL[7][32] = {
    {3.28264775e-7f, 8.33294507e-7f, 9.82396045e-7f, 7.57633416e-7f, 3.18191184e-7f, -1.12950453e-7f, -3.74096032e-7f,
     -4.25142957e-7f, -3.26394172e-7f, -1.74181679e-7f, -4.39028653e-8f, 3.2594432e-8f, 5.90700964e-8f, 5.49781625e-8f,
     3.93020763e-8f, 2.3646237e-8f, 1.24265016e-8f, 5.81478021e-9f, 2.45077825e-9f, 9.37401934e-10f, 3.27098182e-10f,
     1.04527338e-10f, 3.06795353e-11f, 8.28945246e-12f, 2.06563716e-12f, 4.75422978e-13f, 1.01190615e-13f,
     1.99381408e-14f, 3.63995723e-15f, 6.16174594e-16f, 9.67814221e-17f, 0},
    {-1.13150236e-5f, -7.70423048e-6f, -2.06090772e-6f, 3.32634386e-6f, 6.62373213e-6f, 7.20627168e-6f, 5.65343953e-6f,
     3.16268279e-6f, 8.50565186e-7f, -6.66709013e-7f, -1.3086368e-6f, -1.32103446e-6f, -1.02793638e-6f, -6.75407023e-7f,
     -3.88746429e-7f, -1.99747689e-7f, -9.26577073e-8f, -3.90869843e-8f, -1.50706008e-8f, -5.33059907e-9f,
     -1.73450843e-9f, -5.20320675e-10f, -1.44147735e-10f, -3.69312185e-11f, -8.76050881e-12f, -1.92590041e-12f,
     -3.92700656e-13f, -7.43217675e-14f, -1.30634715e-14f, -2.13361945e-15f, -3.23959292e-16f, 0},
    {-2.92108198e-5f, -7.81903727e-5f, -1.030282e-4f, -9.92311398e-5f, -7.31135442e-5f, -3.73183684e-5f,
     -4.42924193e-6f, 1.77565635e-5f, 2.75111161e-5f, 2.75405455e-5f, 2.22337294e-5f, 1.54430782e-5f, 9.49562582e-6f,
     5.24870939e-6f, 2.63256243e-6f, 1.20553955e-6f, 5.06217987e-7f, 1.95533431e-7f, 6.96423044e-8f, 2.29142252e-8f,
     6.97530833e-9f, 1.96685601e-9f, 5.14239484e-10f, 1.2476814e-10f, 2.81120995e-11f, 5.88566652e-12f, 1.14560824e-12f,
     2.0740091e-13f, 3.49374053e-14f, 5.47806488e-15f, 7.99749662e-16f, 0},
    {1.13921287e-3f, 9.18320147e-4f, 5.46369469e-4f, 1.32783593e-4f, -2.17433946e-4f, -4.39244555e-4f, -5.2009779e-4f,
     -4.89240454e-4f, -3.94822244e-4f, -2.82184948e-4f, -1.81576252e-4f, -1.06215601e-4f, -5.68372488e-5f,
     -2.79416454e-5f, -1.26584537e-5f, -5.29681074e-6f, -2.05077072e-6f, -7.35679578e-7f, -2.44799367e-7f,
     -7.5626474e-8f, -2.17071854e-8f, -5.79255977e-9f, -1.43781964e-9f, -3.32124717e-10f, -7.14216394e-11f,
     -1.43033198e-11f, -2.66839675e-12f, -4.63856004e-13f, -7.51509992e-14f, -1.13499425e-14f, -1.59822899e-15f, 0},
    {1.73820241e-3f, 4.87375027e-3f, 7.09570246e-3f, 8.1105167e-3f, 7.95719028e-3f, 6.93614874e-3f, 5.46410726e-3f,
     3.92788695e-3f, 2.59209075e-3f, 1.57663121e-3f, 8.86365364e-4f, 4.61508724e-4f, 2.22890929e-4f, 9.99673357e-5f,
     4.16750372e-5f, 1.61608787e-5f, 5.8328942e-6f, 1.96040901e-6f, 6.13805014e-7f, 1.79095593e-7f, 4.87121454e-8f,
     1.23536816e-8f, 2.92183988e-9f, 6.44612919e-10f, 1.32677036e-10f, 2.54805951e-11f, 4.56663266e-12f,
     7.63844012e-13f, 1.19255788e-13f, 1.73804113e-14f, 2.36473176e-15f, 0},
    {-1.0285221e-1f, -9.61292014e-2f, -8.39728117e-2f, -6.85588941e-2f, -5.2315522e-2f, -3.73111814e-2f,
     -2.48707663e-2f, -1.54946232e-2f, -9.02224425e-3f, -4.9100942e-3f, -2.49750703e-3f, -1.18731335e-3f,
     -5.27552504e-4f, -2.19082503e-4f, -8.50337674e-5f, -3.08472772e-5f, -1.04588507e-5f, -3.31430738e-6f,
     -9.81619905e-7f, -2.71728766e-7f, -7.03023133e-8f, -1.69998611e-8f, -3.84204846e-9f, -8.11562761e-10f,
     -1.60222363e-10f, -2.95641844e-11f, -5.09859472e-12f, -8.21820314e-13f, -1.23806971e-13f, -1.74323158e-14f,
     -2.29407164e-15f, 0},
    {4.48283225e-1f, 3.4826827e-1f, 2.57846117e-1f, 1.81411251e-1f, 1.21000484e-1f, 7.6358512e-2f, 4.55139764e-2f,
     2.55880598e-2f, 1.3552581e-2f, 6.75565284e-3f, 3.16671631e-3f, 1.39488722e-3f, 5.77025057e-4f, 2.2405335e-4f,
     8.16237734e-5f, 2.78884272e-5f, 8.93365632e-6f, 2.68229587e-6f, 7.54651523e-7f, 1.98907856e-7f, 4.91063865e-8f,
     1.13534817e-8f, 2.45786547e-9f, 4.9815585e-10f, 9.45141326e-11f, 1.67843517e-11f, 2.7896214e-12f, 4.3388993e-13f,
     6.3149796e-14f, 8.59983319e-15f, 1.09573198e-15f, 0},
};

inline Floats gelu(Floats x) {
    const Floats nothing{}, end = splat(31.5f * TAIL_PART);
    // In this order both let a NaN through.
    const Floats m = (Floats)_mm512_min_ps((__m512)end, _mm512_abs_ps((__m512)x));
    const Floats positive = (Floats)_mm512_max_ps((__m512)nothing, (__m512)x);
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the part's number in the low bits
    const Floats at = m * (1.0f / TAIL_PART) - 0.5f, shifted = at + rounder, u = at - (shifted - rounder);
    const Ints part = (Ints)shifted;
    const auto power = [&](int i) { return __builtin_shuffle(load(TAIL[i]), load(TAIL[i] + W), part); };
    Floats p = power(0);
#pragma GCC unroll 6
    for (int i = 1; i < 7; ++i) p = p * u + power(i);
    return positive - m * p;
}

#else

// erfc(z) / 2 is t e^(-z^2 + f(t)), t = 1 / (1 + z / 2); f is our own least-squares fit (8.5e-8), its last number
// lowered by ln 2, and its pairs are summed as a tree, which waits less. Infinity would meet t = 0, hence the bound,
// where the tail is 0.
inline Floats gelu(Floats x) {
    const Floats far = splat(1e4f);
    Floats m = (Floats)((Words)x & 0x7fffffffu);
    m = m > far ? far : m;
    const Floats t = 1.0f / (1.0f + 0.35355339f * m), t2 = t * t;
    const Floats high = (t * 1.787034552e-1f - 8.599416930e-1f) * t2 + (t * 1.565589974f - 1.221623523f);
    const Floats low = (t * 3.368944062e-1f - 2.101132605e-1f) * t2 + (t * 1.026416263e-1f + 3.732846628e-1f);
    const Floats f = (high * (t2 * t2) + low) * t2 + (t * 1.000077938f - 1.958660683f);
    return relu(x) - m * t * exp_of(f - 0.5f * m * m);
}

#endif

template <int kind> inline Floats activated(Floats x) {
    if constexpr (kind == AS_IT_IS) return x;
    if constexpr (kind == SILU) return silu(x);
    if constexpr (kind == RELU) return relu(x);
    if constexpr (kind == RELU2) return relu(x) * relu(x);
    if constexpr (kind == QUICK_GELU) return over_one_and_exp(x, 1.702f * x);
    if constexpr (kind == GELU) return gelu(x);
    // x (1 + tanh u) / 2 is x sigmoid(2u)
    return over_one_and_exp(x, 1.5957691216f * (x + 0.044715f * x * x * x));
}

// Calls `call` with the kind as a constant.
template <int kind> struct Of {
    static constexpr int KIND = kind;
};
template <class Call> inline void of_kind(int kind, Call call) {
    switch (kind) {
        case SILU: return call(Of<SILU>{});
        case GELU: return call(Of<GELU>{});
        case GELU_TANH: return call(Of<GELU_TANH>{});
        case RELU: return call(Of<RELU>{});
        case RELU2: return call(Of<RELU2>{});
        case QUICK_GELU: return call(Of<QUICK_GELU>{});
        default: return call(Of<AS_IT_IS>{});
    }
}

// Rows of x, or with `gated` of gate and up side by side.
struct ActivationRows {
    int64_t rows, width, row_stride;

    template <class T, int kind, bool gated> void run(const T* x, T* y) const {
        // A few thousand values are work enough to share; long rows are cut so that every thread finds a piece.
        constexpr int64_t piece = 2048;
        const int64_t pieces = (width + piece - 1) / piece;
        share(rows * pieces, 4, rows * width > 16384, [&](int64_t item) {
            const int64_t row = item / pieces, start = item % pieces * piece;
            const T* const from = x + row * row_stride + start;
            T* const to = y + row * width + start;
            over_vectors(smaller(piece, width - start), [&](int64_t i, int n) {
                Floats value = activated<kind>(load_up_to(from + i, n));
                if constexpr (gated) value *= load_up_to(from + width + i, n);
                store_up_to(to + i, value, n);
            });
        });
    }
};

template <bool gated, class T> void activate(int kind, const T* x, T* y, ActivationRows rows) {
    of_kind(kind, [&](auto of) { rows.run<T, of.KIND, gated>(x, y); });
}

}  // namespace

EXPORT(int, gated_activation)(int is_bf16, int kind, const void* gate_up, void* y, int64_t rows, int64_t width,
                              int64_t row_stride) {
    if (is_bf16)
        activate<true>(kind, (const bf16*)gate_up, (bf16*)y, {rows, width, row_stride});
    else
        activate<true>(kind, (const float*)gate_up, (float*)y, {rows, width, row_stride});
    return OK;
}

EXPORT(int, activation)(int is_bf16, int kind, const void* x, void* y, int64_t rows, int64_t width,
                        int64_t row_stride) {
    if (is_bf16)
        activate<false>(kind, (const bf16*)x, (bf16*)y, {rows, width, row_stride});
    else
        activate<false>(kind, (const float*)x, (float*)y, {rows, width, row_stride});
    return OK;
}
