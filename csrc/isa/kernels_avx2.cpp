// The kernels compiled for AVX2 with FMA.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define LLMFAST_VECTOR_WIDTH 8
#define LLMFAST_TILE_ROWS 6
#define LLMFAST_TILE_VECTORS 2
#define LLMFAST_BF16_DOT 0
#define LLMFAST_INT8_DOT 0
#define LLMFAST_ISA_NAME "avx2"
#define LLMFAST_KERNELS avx2_kernels
#include "all_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
