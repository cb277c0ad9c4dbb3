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
#include "linear.inl"
//
#include "cross_entropy.inl"
//
#include "layer_norm.inl"
//
#include "attention.inl"
//
#include "attention_decode.inl"
//
#include "attention_backward.inl"

}  // namespace

const Kernels& LLMFAST_KERNELS() {
  static constexpr Kernels table = {
      LLMFAST_ISA_NAME, attention, attention_backward, layer_norm, layer_norm_backward, gelu, gelu_backward,
      linear, linear_backward, cross_entropy, cross_entropy_backward};
  return table;
}

}  // namespace llmfast
