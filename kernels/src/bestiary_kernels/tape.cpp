// Runs a list of recorded calls, so that a step costs one call from Python however many operations it has.
#include "simd.hpp"
#include <utility>  // index_sequence: a type only, no function that two variants could share

namespace {

// One argument as `tape.py` writes it.
union Slot {
    int64_t integer;
    double number;
    void* pointer;
};

struct Recorded {
    int64_t operation;
    const Slot* arguments;
};

template <class T> inline T as(const Slot& slot) {
    if constexpr (__is_same(T, float))
        return float(slot.number);
    else if constexpr (__is_class(T) || sizeof(T) == 0)
        static_assert(sizeof(T) == 0, "an argument is a number or a pointer");
    else
        return (T)slot.integer;
}

template <class... A, size_t... I>
inline int spread(int (*function)(A...), const Slot* arguments, std::index_sequence<I...>) {
    return function(as<A>(arguments[I])...);
}

template <class... A> inline int call(int (*function)(A...), const Slot* arguments) {
    return spread(function, arguments, std::index_sequence_for<A...>{});
}

inline int run(const Recorded& entry) {
    // The numbers are places in `_OPERATIONS` of tape.py.
    switch (entry.operation) {
        case 0: return call(VARIANT_NAME(VARIANT, add_rms_norm), entry.arguments);
        case 1: return call(VARIANT_NAME(VARIANT, gated_activation), entry.arguments);
        case 2: return call(VARIANT_NAME(VARIANT, rotary_cache_write), entry.arguments);
        case 3: return call(VARIANT_NAME(VARIANT, paged_attention), entry.arguments);
        case 4: return call(VARIANT_NAME(VARIANT, embedding), entry.arguments);
        case 5: return call(VARIANT_NAME(VARIANT, embedding_packed), entry.arguments);
        case 6: return call(VARIANT_NAME(VARIANT, linear_rows), entry.arguments);
#if defined(__AVX512BF16__)
        case 7: return call(VARIANT_NAME(VARIANT, linear_packed), entry.arguments);
#endif
        case 8: return call(VARIANT_NAME(VARIANT, lora), entry.arguments);
        case 9: return call(VARIANT_NAME(VARIANT, add_layer_norm), entry.arguments);
        case 10: return call(VARIANT_NAME(VARIANT, activation), entry.arguments);
        case 11: return call(VARIANT_NAME(VARIANT, rotary), entry.arguments);
        case 12: return call(VARIANT_NAME(VARIANT, cache_write), entry.arguments);
        case 13: return call(VARIANT_NAME(VARIANT, route), entry.arguments);
        case 14: return call(VARIANT_NAME(VARIANT, moe), entry.arguments);
        case 15: return call(VARIANT_NAME(VARIANT, causal_conv), entry.arguments);
        case 16: return call(VARIANT_NAME(VARIANT, selective_scan), entry.arguments);
        case 17: return call(VARIANT_NAME(VARIANT, quantised_linear), entry.arguments);
        case 18: return call(VARIANT_NAME(VARIANT, add), entry.arguments);
        case 19: return call(VARIANT_NAME(VARIANT, scaled), entry.arguments);
        case 20: return call(VARIANT_NAME(VARIANT, heads_linear), entry.arguments);
        case 23: return call(VARIANT_NAME(VARIANT, experts_linear), entry.arguments);
        case 24: return call(VARIANT_NAME(VARIANT, greedy), entry.arguments);
#if defined(__AVX512BF16__)
        case 21: return call(VARIANT_NAME(VARIANT, linear_squeezed), entry.arguments);
        case 22: return call(VARIANT_NAME(VARIANT, embedding_squeezed), entry.arguments);
        case 25: return call(VARIANT_NAME(VARIANT, moe_squeezed), entry.arguments);
        case 26: return call(VARIANT_NAME(VARIANT, experts_squeezed), entry.arguments);
#endif
#if defined(__AMX_BF16__)
        case 27: return call(VARIANT_NAME(VARIANT, linear_packed_many), entry.arguments);
        case 28: return call(VARIANT_NAME(VARIANT, linear_squeezed_many), entry.arguments);
#endif
    }
    return BAD_ROW;
}

}  // namespace

// Stops at the first call that fails, whose place `*at` then is, and returns its status. The threads stay together from
// the first call to the last: a region for each loop would wait at its end for threads that have nothing to do.
EXPORT(int, replay)(const Recorded* entries, int64_t count, int64_t* at) {
    int status = OK;
    Crew::run([&] {
        for (*at = 0; *at < count; ++*at)
            if ((status = run(entries[*at])) != OK) return;
    });
    return status;
}
