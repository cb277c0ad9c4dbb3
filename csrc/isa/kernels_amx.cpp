// The kernels compiled for AVX-512 with BF16 and VNNI and for AMX, whose tile registers multiply bfloat16 and bytes.
//
// The instruction set is switched on by a pragma after the system headers, so that no build flag is needed and no
// header function is compiled for it.

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../encoder/encoder.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                            \
    __attribute__((target(                                                                                               \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,avx2,fma,f16c,bmi,bmi2")
#endif

#define LLMFAST_VECTOR_WIDTH 16
#define LLMFAST_TILE_ROWS 6
#define LLMFAST_TILE_VECTORS 4
#define LLMFAST_BF16_DOT 1
#define LLMFAST_INT8_DOT 1
#define LLMFAST_TILE_REGISTERS 1
#define LLMFAST_ISA_NAME "amx"
#define LLMFAST_KERNELS amx_kernels
#include "all_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
