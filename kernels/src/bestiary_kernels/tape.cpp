// Runs a list of recorded calls, so that a step costs one call from Python however many operations it has.
#include "simd.hpp"
#include <time.h>
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
        case 7: return call(VARIANT_NAME(VARIANT, linear_packed), entry.arguments);
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
#if defined(__AVX2__)
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

inline int run_all(const Recorded* entries, int64_t count, int64_t* at) {
    for (*at = 0; *at < count; ++*at)
        if (const int status = run(entries[*at]); status != OK) return status;
    return OK;
}

// Numbers of which each goes up by one from step to step, of 4 or 8 bytes.
struct Counter {
    void* numbers;
    int64_t bytes;
};

// As `tape.py` writes it: what makes a step's input the next one's, and when there is no next one.
struct Onward {
    int64_t rows;
    const int64_t* best;  // what a step finds
    int64_t* tokens;      // what the next one begins with
    const Counter* counters;
    int64_t num_counters;
    const int64_t* ends;  // each row's tokens that no step comes after
    int64_t num_ends, most, nanoseconds;
    int64_t* found;  // [most][rows]

    bool is_end(int64_t row) const {
        if (best[row] < 0) return true;
        for (int64_t i = row * num_ends; i < (row + 1) * num_ends; ++i)
            if (ends[i] == best[row]) return true;
        return false;
    }
    // Keeps what step `done` found; true if another one may come.
    bool take(int64_t done) const {
        bool goes_on = done + 1 < most;
        for (int64_t row = 0; row < rows; ++row) {
            found[done * rows + row] = best[row];
            goes_on = goes_on && !is_end(row);
        }
        return goes_on;
    }
    void advance() const {
        memcpy(tokens, best, size_t(rows) * sizeof(int64_t));
        for (int64_t i = 0; i < num_counters; ++i)
            for (int64_t row = 0; row < rows; ++row)
                if (counters[i].bytes == 4)
                    ++((int32_t*)counters[i].numbers)[row];
                else
                    ++((int64_t*)counters[i].numbers)[row];
    }
};

inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

}  // namespace

// Stops at the first call that fails, whose place `*at` then is, and returns its status. The threads stay together from
// the first call to the last: a region for each loop would wait at its end for threads that have nothing to do.
EXPORT(int, replay)(const Recorded* entries, int64_t count, int64_t* at) {
    int status = OK;
    Crew::run([&] { status = run_all(entries, count, at); });
    return status;
}

// Step after step, until there is none to come or the next one would likely end too late. Of one that fails and those
// after it nothing is said: *done counts the others.
EXPORT(int, replay_on)(const Recorded* entries, int64_t count, int64_t* at, const Onward* onward, int64_t* done) {
    int status = OK;
    *done = 0;
    Crew::run([&] {
        const int64_t begin = nanoseconds();
        for (bool goes_on = true; goes_on && (status = run_all(entries, count, at)) == OK;) {
            goes_on = onward->take((*done)++);
            const int64_t taken = nanoseconds() - begin;
            goes_on = goes_on && taken + taken / *done <= onward->nanoseconds;
            if (goes_on) onward->advance();
        }
    });
    return status;
}
