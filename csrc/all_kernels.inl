// Every kernel, in the order they build on one another, and the table that exports them for one instruction set.

namespace llmfast {
namespace {

#include "vector.h"
//
#include "philox.h"
//
#include "matmul.inl"
//
#include "gelu_table.inl"
//
#include "gelu.inl"
//
#include "activation.inl"
//
#include "linear.inl"
//
#include "gated_linear.inl"
//
#include "cross_entropy.inl"
//
#include "norm.inl"
//
#include "rotary.inl"
//
#include "quantise.inl"
//
#include "attention.inl"
//
#include "attention_decode.inl"
//
#include "attention_backward.inl"
//
#include "packed.inl"
//
#include "phases.inl"
//
#include "decoder_step.inl"
//
#include "limits.inl"

}  // namespace

const Kernels& LLMFAST_KERNELS() {
  static constexpr Kernels table = {
      LLMFAST_ISA_NAME, attention, attention_backward, layer_norm, layer_norm_backward,
      rms_norm, rms_norm_backward, rotary, gelu, gelu_backward,
      linear, linear_backward, gated_linear, gated_linear_backward, cross_entropy, cross_entropy_backward,
      TILE_COLS, packed_bytes, pack_weight, decoder_row_bytes, decoder_partial_floats, decoder_chunks, decoder_step,
      exp_of_scaled, limit_read, limit_arithmetic};
  return table;
}

}  // namespace llmfast
