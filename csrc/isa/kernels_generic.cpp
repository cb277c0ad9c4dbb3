// The kernels compiled for the baseline every CPU of this architecture has (SSE2 on x86-64).

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../encoder/encoder.h"

#define LLMFAST_VECTOR_WIDTH 4
#define LLMFAST_TILE_ROWS 4
#define LLMFAST_TILE_VECTORS 2
#define LLMFAST_BF16_DOT 0
#define LLMFAST_INT8_DOT 0
#define LLMFAST_ISA_NAME "generic"
#define LLMFAST_KERNELS generic_kernels
#include "all_kernels.inl"
