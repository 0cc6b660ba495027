/* Attention on CPUs with quantized operands: a C ABI that knows nothing of its host.
 *
 *     score[i, j] = cap(scale * q_i . k_j) + mask[i, j]        cap(x) = softcap * tanh(x / softcap)
 *     o_i         = sum over visible j of softmax(score[i])_j * v_j
 *
 * docs/numerics.md defines the recipes, docs/cpu-kernel.md the design. Shapes: batch B, query heads
 * H, key/value heads Hkv (H a multiple of it; query head h uses key/value head h / (H / Hkv)),
 * lengths Lq and Lk, head_dim D, value head_dim Dv.
 *
 * No function keeps state, allocates, or starts a thread: the caller owns the memory and lends its
 * threads. All may be called from several threads at once. The results of a call depend on its
 * arguments and the instruction set alone, not on the number of workers.
 */
#ifndef SAGE_CPU_H
#define SAGE_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SAGE_CPU_ABI_VERSION 1

#if defined(_WIN32)
#define SAGE_CPU_EXPORT __declspec(dllexport)
#else
#define SAGE_CPU_EXPORT __attribute__((visibility("default")))
#endif

/* Element types. BOOL (one byte, nonzero: visible) is for masks only. */
enum { SAGE_CPU_FLOAT32 = 0, SAGE_CPU_BFLOAT16 = 1, SAGE_CPU_FLOAT16 = 2, SAGE_CPU_BOOL = 3 };

/* Recipes: INT8 Q and K with V in INT8 and P in 8 or 16 bits; or float32 arithmetic. */
enum { SAGE_CPU_INT8_INT8 = 0, SAGE_CPU_INT8_INT16 = 1, SAGE_CPU_FLOAT = 2 };

/* What a query row that sees no key yields. With Lk == 0 it is always zero. */
enum { SAGE_CPU_DEAD_ZERO = 0, SAGE_CPU_DEAD_NAN = 1 };

/* Instruction sets. AUTO: the one that the environment variable SAGE_CPU_ISA names, else the best
 * that this machine has. */
enum {
    SAGE_CPU_ISA_AUTO = 0,
    SAGE_CPU_ISA_PORTABLE = 1,
    SAGE_CPU_ISA_AVX2 = 2,
    SAGE_CPU_ISA_AVXVNNI = 3,
    SAGE_CPU_ISA_AVX512VNNI = 4
};

/* Every function that can fail returns one of these; sage_cpu_describe says it in words. */
enum {
    SAGE_CPU_OK = 0,
    SAGE_CPU_BAD_STRUCT_SIZE,
    SAGE_CPU_BAD_ISA,
    SAGE_CPU_BAD_RECIPE,
    SAGE_CPU_BAD_DTYPE,
    SAGE_CPU_BAD_SIZES,
    SAGE_CPU_BAD_HEADS,
    SAGE_CPU_BAD_HEAD_DIM,
    SAGE_CPU_BAD_VALUE_HEAD_DIM,
    SAGE_CPU_BAD_KV_CAPACITY,
    SAGE_CPU_BAD_SCALE,
    SAGE_CPU_BAD_SOFTCAP,
    SAGE_CPU_BAD_DEAD_ROWS,
    SAGE_CPU_BAD_MASK_DTYPE,
    SAGE_CPU_BAD_QUERY,
    SAGE_CPU_BAD_KEY,
    SAGE_CPU_BAD_VALUE,
    SAGE_CPU_BAD_OUTPUT,
    SAGE_CPU_BAD_FIRST,
    SAGE_CPU_BAD_HOST,
    SAGE_CPU_BAD_PACKED,
    SAGE_CPU_BAD_WORKSPACE,
    SAGE_CPU_ERROR_COUNT
};

/* Strides in elements, of (batch, heads, length, head_dim); any value, 0 and negative included. */
typedef struct {
    void* data;
    int64_t stride[4];
} sage_cpu_tensor;

typedef struct {
    int32_t struct_size; /* sizeof(sage_cpu_problem): both sides must have the same one */
    int32_t isa;
    int32_t recipe;
    int32_t dtype; /* of query, key, value and output */
    int64_t batch, heads, kv_heads;
    int64_t query_length, key_length;
    int64_t head_dim, value_head_dim; /* each a multiple of 8 from 16 to 256 */
    int64_t kv_capacity;              /* keys that packed memory is laid out for; 0: key_length */
    /* Key j is visible to query i iff -left <= j - (i + diagonal) <= right; a negative side has no
     * limit. */
    int64_t window_left, window_right, diagonal;
    float scale;
    float softcap; /* 0: none */
    int32_t dead_rows;
    int32_t mask_dtype;
    sage_cpu_tensor query, key, value, output;
    sage_cpu_tensor mask; /* of (B, H, Lq, Lk), stride 0 where it broadcasts; data NULL: none */
    const float* sinks;   /* (H,): one more logit per head, in the denominator only; or NULL */
    float* lse;           /* (B, H, Lq), dense: natural log-sum-exp of the scores; or NULL */
} sage_cpu_problem;

/* The host's threads. parallel_for calls body(argument, index) once for every index below count,
 * in any order, on any thread, concurrently or one after the other, and returns after the last.
 * A NULL host, or one worker: everything runs on the caller's thread. */
typedef struct {
    void* context; /* handed to parallel_for */
    void (*parallel_for)(void* context, int64_t count, void (*body)(void* argument, int64_t index),
                         void* argument);
    int64_t workers; /* the count that parallel_for is called with, at most */
} sage_cpu_host;

/* A parallel_for for hosts whose own hands out ranges: context is a pointer to their function,
 * whose result is 0 unless it failed; then what it left undone runs on the caller's thread. */
typedef int32_t (*sage_cpu_range_pool)(int64_t begin, int64_t end, int64_t grain,
                                       void (*body)(int64_t begin, int64_t end, void* argument),
                                       void* argument);
SAGE_CPU_EXPORT void sage_cpu_parallel_for_ranges(void* range_pool, int64_t count,
                                                  void (*body)(void* argument, int64_t index),
                                                  void* argument);

SAGE_CPU_EXPORT int32_t sage_cpu_abi_version(void);

/* The name of an error code: the argument it is about and what is needed. Never NULL. */
SAGE_CPU_EXPORT const char* sage_cpu_describe(int32_t error);

/* The instruction set that AUTO stands for, or -1 when SAGE_CPU_ISA names none that this machine
 * and this build have. */
SAGE_CPU_EXPORT int32_t sage_cpu_isa(void);
/* Whether this machine and this build have it. */
SAGE_CPU_EXPORT int32_t sage_cpu_isa_available(int32_t isa);
/* "portable", "avx2", ...; NULL for an unknown number. */
SAGE_CPU_EXPORT const char* sage_cpu_isa_name(int32_t isa);

/* --- one call: pack and attend in one parallel region ----------------------------------------- */

/* Bytes of workspace that sage_cpu_attention needs with so many workers. */
SAGE_CPU_EXPORT int32_t sage_cpu_workspace_size(const sage_cpu_problem* problem, int64_t workers,
                                                int64_t* bytes);
/* workspace: aligned to 64 bytes; its contents do not matter before and after. */
SAGE_CPU_EXPORT int32_t sage_cpu_attention(const sage_cpu_problem* problem,
                                           const sage_cpu_host* host, void* workspace,
                                           int64_t bytes);

/* --- keys and values packed once, attended many times ----------------------------------------- */

/* Bytes of packed keys and values for kv_capacity tokens; query and mask are not looked at. */
SAGE_CPU_EXPORT int32_t sage_cpu_packed_size(const sage_cpu_problem* problem, int64_t* bytes);
/* Pack tokens first..key_length-1 into their places. Blocks of 256 tokens are packed whole, so
 * first is a multiple of 256, and key.data and value.data point at token first. To append to a
 * partial block, pack it again from its first token. */
SAGE_CPU_EXPORT int32_t sage_cpu_pack_kv(const sage_cpu_problem* problem, const sage_cpu_host* host,
                                         int64_t first, void* packed, int64_t bytes);
/* Bytes of workspace that sage_cpu_attend needs with so many workers. */
SAGE_CPU_EXPORT int32_t sage_cpu_attend_workspace_size(const sage_cpu_problem* problem,
                                                       int64_t workers, int64_t* bytes);
/* As sage_cpu_attention, on the first key_length packed tokens; key and value are not looked at.
 * isa, recipe, kv_capacity and the sizes of the tokens must be those that they were packed with. */
SAGE_CPU_EXPORT int32_t sage_cpu_attend(const sage_cpu_problem* problem, const sage_cpu_host* host,
                                        const void* packed, int64_t packed_bytes, void* workspace,
                                        int64_t bytes);

#ifdef __cplusplus
}
#endif

#endif
