// How threads share a loop: in a region of its own, or as a crew that stays together over many. Knows no loop's work.
#pragma once

#include <linux/futex.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// A loop's items in as many runs as there are threads. A thread goes through its own from the front, `chunk` at a time:
// what it reads lies in one line, and what it asks for ahead is what it reads next. One that is through takes from the
// end of another's, so that a core that another program borrows delays one chunk, not half the work.
class Turns {
  public:
    void deal(int64_t n, int64_t chunk) {
        const int threads = omp_get_max_threads();
        this->chunk = chunk, count = threads < MOST ? threads : MOST;
        for (int64_t i = 0; i < count; ++i)
            __atomic_store_n(&runs[i].rest, joined(n * i / count, n * (i + 1) / count), __ATOMIC_RELAXED);
    }

    template <class Body> void take(const Body& body) {
        const int own = omp_get_thread_num() % count;
        for (int i = 0; i < count; ++i) {
            Run& run = runs[(own + i) % count];
            for (int64_t begin, end; take_from(run, i == 0, begin, end);)
                for (; begin < end; ++begin) body(begin);
        }
    }

  private:
    static constexpr int MOST = 128;
    struct alignas(64) Run {
        uint64_t rest;  // the first that is left, and in the lower half the end
    };

    static uint64_t joined(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

    bool take_from(Run& run, bool from_front, int64_t& begin, int64_t& end) const {
        uint64_t rest = __atomic_load_n(&run.rest, __ATOMIC_RELAXED), left;
        do {
            begin = int64_t(rest >> 32), end = int64_t(rest & 0xffffffff);
            if (begin >= end) return false;
            const int64_t taken = end - begin < chunk ? end - begin : chunk;
            left = from_front ? joined(begin + taken, end) : joined(begin, end - taken);
            (from_front ? end : begin) = from_front ? begin + taken : end - taken;
        } while (!__atomic_compare_exchange_n(&run.rest, &rest, left, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        return true;
    }

    int64_t chunk;
    int count;
    Run runs[MOST];
};

inline void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// One thread leads: it goes through the program and opens a loop where it meets one. The others look for open loops and
// take turns in them; no loop opens another. The leader waits for those who are inside a loop, never for one who did
// not come, such as a thread whose core another program has. To come in is to say so and then to look again whether the
// loop is open; to close is to say so and then to look whether anyone is inside: one of the two sees the other.
//
// Waiting is short as a rule, and a thread that spins is there at once. Where it is long a core is shared with another
// program, or with the very thread that is waited for: then the leader yields and the others sleep.
class Crew {
  public:
    // The calling thread goes through `program`, and the loops that it opens are everybody's.
    template <class Program> static void run(Program program) {
        if (omp_get_max_threads() == 1) return program();
        Crew crew;
#pragma omp parallel
        if (omp_get_thread_num() == 0) {
            ours() = &crew;
            program();
            ours() = nullptr;
            crew.announce(ENDED);
        } else {
            crew.help();
        }
    }

    // The crew that the calling thread leads, or null.
    static Crew*& ours() {
        static __thread Crew* crew = nullptr;
        return crew;
    }

    template <class Body> void share(int64_t n, int64_t chunk, const Body& body) {
        take = [](Crew& crew) { crew.turns.take(*(const Body*)crew.body); };
        turns.deal(n, chunk), this->body = &body;
        number = number == LAST ? 1 : number + 1;
        announce(number);
        take(*this);
        __atomic_store_n(&open, CLOSED, __ATOMIC_SEQ_CST);
        for (int waited = 0; __atomic_load_n(&inside, __ATOMIC_SEQ_CST); ++waited) {
            if (waited < SPINS / 8)
                pause();
            else
                sched_yield();
        }
    }

  private:
    static constexpr int32_t CLOSED = 0, ENDED = -1, LAST = 0x7fffffff;
    static constexpr int SPINS = 2000;  // some 50 microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void announce(int32_t loop) {
        __atomic_store_n(&open, loop, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &open, FUTEX_WAKE_PRIVATE, LAST);
    }

    // What is announced once it is no more what it was.
    int32_t await(int32_t was) {
        for (int spins = 0; spins < SPINS; ++spins) {
            if (const int32_t now = __atomic_load_n(&open, __ATOMIC_ACQUIRE); now != was) return now;
            pause();
        }
        __atomic_fetch_add(&asleep, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &open, FUTEX_WAIT_PRIVATE, was, nullptr);
        __atomic_fetch_sub(&asleep, 1, __ATOMIC_RELAXED);
        return __atomic_load_n(&open, __ATOMIC_ACQUIRE);
    }

    void help() {
        for (int32_t seen = CLOSED, now = CLOSED; now != ENDED; now = await(now)) {
            if (now == CLOSED || now == seen) continue;
            __atomic_fetch_add(&inside, 1, __ATOMIC_SEQ_CST);
            if (seen = __atomic_load_n(&open, __ATOMIC_SEQ_CST); seen > CLOSED) take(*this);
            __atomic_fetch_sub(&inside, 1, __ATOMIC_RELEASE);
        }
    }

    // Each line of memory that several threads write to is its own.
    Turns turns;
    alignas(64) int32_t open = CLOSED;  // the number of the loop that is
    alignas(64) int32_t inside = 0;     // threads beside the leader
    alignas(64) int32_t asleep = 0;
    alignas(64) void (*take)(Crew&) = nullptr;  // what the open loop does, and with what
    const void* body = nullptr;
    int32_t number = 0;
};

// body(i) for i < n by all threads: the leader's crew, or a region of its own. Without `parallel` by this one alone,
// since the others cost time to reach.
template <class Body> void share(int64_t n, int64_t chunk, bool parallel, Body body) {
    if (!parallel || n <= chunk) {
        for (int64_t i = 0; i < n; ++i) body(i);
        return;
    }
    if (Crew* const crew = Crew::ours()) return crew->share(n, chunk, body);
    Turns turns;
    turns.deal(n, chunk);
#pragma omp parallel
    turns.take(body);
}

}  // namespace
