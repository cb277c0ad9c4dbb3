// The kernels compiled for 64-bit Arm, whose baseline has NEON: vectors of four floats, and twice the registers of SSE2,
// so larger tiles than the generic table's.

#if defined(__aarch64__)

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../encoder/encoder.h"

#define LLMFAST_VECTOR_WIDTH 4
#define LLMFAST_TILE_ROWS 6
#define LLMFAST_TILE_VECTORS 4
#define LLMFAST_BF16_DOT 0
#define LLMFAST_INT8_DOT 0
#define LLMFAST_ISA_NAME "neon"
#define LLMFAST_KERNELS neon_kernels
#include "all_kernels.inl"

#endif
