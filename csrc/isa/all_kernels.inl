// Every kernel, in the order they build on one another, and the table that exports them for one instruction set.

namespace llmfast {
namespace {

#include "../vector.h"
//
#include "../philox.h"
//
#include "../gemm/tile_registers.inl"
//
#include "../gemm/matmul.inl"
//
#include "../ops/gelu_table.inl"
//
#include "../ops/gelu.inl"
//
#include "../ops/activation.inl"
//
#include "../ops/linear.inl"
//
#include "../ops/gated_linear.inl"
//
#include "../ops/cross_entropy.inl"
//
#include "../ops/norm.inl"
//
#include "../ops/rotary.inl"
//
#include "../gemm/quantise.inl"
//
#include "../ops/attention.inl"
//
#include "../decoder/attention_decode.inl"
//
#include "../ops/attention_backward.inl"
//
#include "../gemm/packed.inl"
//
#include "../decoder/phases.inl"
//
#include "../decoder/adapter.inl"
//
#include "../decoder/decoder_step.inl"
//
#include "../encoder/encoder_step.inl"
//
#include "../ops/limits.inl"

}  // namespace

const Kernels& LLMFAST_KERNELS() {
  static constexpr Kernels table = [] {
    Kernels k{};
    k.name = LLMFAST_ISA_NAME;
    k.attention = attention;
    k.attention_backward = attention_backward;
    k.layer_norm = layer_norm;
    k.layer_norm_backward = layer_norm_backward;
    k.rms_norm = rms_norm;
    k.rms_norm_backward = rms_norm_backward;
    k.rotary = rotary;
    k.gelu = gelu;
    k.gelu_backward = gelu_backward;
    k.linear = linear;
    k.linear_backward = linear_backward;
    k.gated_linear = gated_linear;
    k.gated_linear_backward = gated_linear_backward;
    k.cross_entropy = cross_entropy;
    k.cross_entropy_backward = cross_entropy_backward;
    k.lanes = W;
    k.panel_columns = TILE_COLS;
    k.mlp_in_rows = mlp_in_rows;
    k.packed_bytes = packed_bytes;
    k.packs = packs;
    k.share_rows = share_rows;
    k.packed_row = packed_row;
    k.pack_weight = pack_weight;
    k.decoder_row_bytes = decoder_row_bytes;
    k.decoder_partial_floats = decoder_partial_floats;
    k.decoder_chunks = decoder_chunks;
    k.decoder_step = decoder_step;
    k.encode = encode;
    k.exp_of_scaled = exp_of_scaled;
    k.limit_read = limit_read;
    k.limit_arithmetic = limit_arithmetic;
    return k;
  }();
  return table;
}

}  // namespace llmfast
