/* The most that one thread can multiply and add: independent chains of one instruction, in
 * registers. Prints billions of operations per second, a product and a sum counting as two. */
#include <stdio.h>
#include <time.h>

#define ROUNDS 4000000L
#define REPEATS 5
#define CHAINS 14 /* more than the latency times the instructions per cycle of these */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The instruction on registers 0 to 13 (r: "x", "y" or "z"), register 15 as both inputs. */
#define ON(op, r, i) op " %%" r "mm15, %%" r "mm15, %%" r "mm" #i "\n"
// clang-format off
#define ON_ALL(op, r)                                                                 \
    ON(op, r, 0) ON(op, r, 1) ON(op, r, 2) ON(op, r, 3) ON(op, r, 4) ON(op, r, 5)      \
    ON(op, r, 6) ON(op, r, 7) ON(op, r, 8) ON(op, r, 9) ON(op, r, 10) ON(op, r, 11)    \
    ON(op, r, 12) ON(op, r, 13)
// clang-format on

#define MEASURE(name, op, r, operations)                                                           \
    do {                                                                                           \
        double best = 1e9;                                                                         \
        for (int repeat = 0; repeat < REPEATS; repeat++) {                                         \
            asm volatile("vpxor %%xmm15, %%xmm15, %%xmm15" ::: "xmm15");                           \
            double start = seconds();                                                              \
            for (long i = 0; i < ROUNDS; i++)                                                      \
                asm volatile(ON_ALL(op, r)::                                                       \
                                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13");            \
            double time = seconds() - start;                                                       \
            if (time < best) best = time;                                                          \
        }                                                                                          \
        printf("%-12s %7.1f\n", name, CHAINS * (operations) * (double)ROUNDS / best / 1e9);        \
    } while (0)

int main(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("fma")) MEASURE("fma_ymm", "vfmadd231ps", "y", 16);
    if (__builtin_cpu_supports("avx2")) MEASURE("pmaddwd_ymm", "vpmaddwd", "y", 32);
    if (__builtin_cpu_supports("avx512f")) MEASURE("fma_zmm", "vfmadd231ps", "z", 32);
    if (__builtin_cpu_supports("avx512vnni")) MEASURE("dpbusd_zmm", "vpdpbusd", "z", 128);
    return 0;
}
