// Says what the machine can run. Compiled without instruction set flags, so that asking is safe everywhere.
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// By the processor's own words, which not every compiler has a name for.
static bool has_tiles() {
    unsigned a, b, c, d;
    constexpr unsigned TILES = 1u << 24, PRODUCTS = 1u << 22;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & PRODUCTS);
}

// AMX's registers are so large that a process must ask for them.
static bool may_use_tiles() {
    constexpr long REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}
#endif

// 0: portable only, 1: AVX2 with FMA, 2: AVX-512 (F, BW, DQ, VL), 3: the same with bfloat16 dot products and bytes
// looked up in registers (VBMI), which every machine but the first with such products has; 4: with AMX for bfloat16.
extern "C" __attribute__((visibility("default"))) int bestiary_cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi")) return 2;
#if defined(__linux__)
    if (has_tiles() && may_use_tiles()) return 4;
#endif
    return 3;
#else
    return 0;
#endif
}

// The level that is fastest. Intel's cores take four times as long for a product of pairs of bfloat16 as for one of
// floats, so that for them pairs pay on tiles alone.
extern "C" __attribute__((visibility("default"))) int bestiary_best_level() {
    const int level = bestiary_cpu_level();
#if defined(__x86_64__)
    if (level == 3 && !__builtin_cpu_is("amd")) return 2;
#endif
    return level;
}
