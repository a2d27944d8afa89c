// Reads memory as fast as it can: the floor that every bandwidth-bound operation is compared with.
#include "simd.hpp"

// Sums `size` bytes (a multiple of 4 KiB) in one contiguous span per thread; the sum keeps the loads alive.
EXPORT(uint32_t, read_memory)(const char* memory, int64_t size, int threads) {
    uint32_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int64_t pages = size / 4096, thread = omp_get_thread_num(), count = omp_get_num_threads();
        const char* const end = memory + pages * (thread + 1) / count * 4096;
        Words sums[8] = {};
        for (const char* at = memory + pages * thread / count * 4096; at < end; at += sizeof sums)
            for (int i = 0; i < 8; ++i) sums[i] += read_as<Words>(at + i * sizeof(Words));
        for (int i = 0; i < 8; ++i)
            for (int lane = 0; lane < W; ++lane) total += sums[i][lane];
    }
    return total;
}
