// Says what the machine can run. Compiled without instruction set flags, so that asking is safe everywhere.

// 0: portable only, 1: AVX2 with FMA, 2: AVX-512 (F, BW, DQ, VL), 3: the same with bfloat16 dot products and bytes
// looked up in registers (VBMI), which every machine but the first with such products has.
extern "C" __attribute__((visibility("default"))) int bestiary_cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? 3 : 2;
#else
    return 0;
#endif
}
