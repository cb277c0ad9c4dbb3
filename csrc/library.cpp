// The table of contents: every C++ operator, torch.ops.llmfast.<name>, and the file its glue and its kernel are in.
//
//   op                      tensors                    kernel
//   causal_attention        attention_ops.cpp          attention.inl, attention_decode.inl, attention_backward.inl
//   layer_norm, rms_norm    norm_ops.cpp               norm.inl
//   rotary                  rotary_ops.cpp             rotary.inl
//   gelu                    linear_ops.cpp             gelu.inl
//   linear                  linear_ops.cpp             linear.inl on matmul.inl and activation.inl
//   gated_linear            gated_linear_ops.cpp       gated_linear.inl on matmul.inl and activation.inl
//   linear_cross_entropy    cross_entropy_ops.cpp      cross_entropy.inl on matmul.inl
//   native_...              native_decoder_ops.cpp     decoder_step.inl on packed.inl and phases.inl, in native_decoder.cpp
//   native_encode           native_encoder_ops.cpp     encoder_step.inl on packed.inl and attention.inl
//   sample                  native_decoder_ops.cpp     sampling.cpp
//   limit_read, limit_...   limits_ops.cpp             limits.inl
//
// Only CPU kernels are registered here; fake kernels and autograd formulas come from llmfast/backends/registered/,
// for these operators and for the Triton ones of the same schemas alike.

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace llmfast {

std::string cpu_isa() { return kernels().name; }

}  // namespace llmfast

STABLE_TORCH_LIBRARY(llmfast, m) {
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? dropout_seed, "
      "Tensor? kv_lengths, int window, bool causal) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
      "float dropout_p, Tensor? dropout_seed, Tensor? kv_lengths, int window, bool causal) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor rstd) "
      "-> (Tensor, Tensor)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
  m.def("rotary_backward(Tensor grad_out, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
  m.def("gelu(Tensor x, str approximate) -> Tensor");
  m.def("gelu_backward(Tensor grad_out, Tensor x, str approximate) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_preactivation) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor preactivation, str activation, bool need_dx, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, str activation, "
      "bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_linear_backward(Tensor grad_out, Tensor x, Tensor gate_weight, Tensor up_weight, Tensor gate, Tensor up, "
      "str activation, bool need_dx, bool need_dgate_weight, bool need_dup_weight, bool need_dgate_bias, "
      "bool need_dup_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
      "int ignore_index, bool need_dweight) -> (Tensor, Tensor)");
  m.def("limit_read(Tensor memory) -> int");
  m.def("limit_arithmetic(str kind, int tasks, int rounds) -> int");
  m.def("cpu_isa() -> str");
  m.def(
      "native_model(int[] sizes, float[] numbers, str norm, str activation, bool gated, float[] inverse_frequencies, "
      "int[] rotary, int[] windows, int[] blocks, str[] roles, int[] biases, int[] formats) -> int");
  m.def(
      "native_model_give(int model, int parameter, Tensor values, Tensor? scale, Tensor? minimum, Tensor? scale_code, "
      "Tensor? minimum_code, int threads) -> ()");
  m.def("native_model_bytes(int model) -> int");
  m.def("native_model_free(int model) -> ()");
  m.def("native_decoder(int model, int batch, int capacity, int most_rows, str cache_type) -> int");
  m.def(
      "native_step(int decoder, Tensor ids, int[] segments, bool all_rows, int vocabulary, int threads, "
      "Tensor(a!)? logits) -> Tensor");
  m.def("native_encode(int model, Tensor ids, int[] lengths, str pooling, int threads) -> Tensor");
  m.def("native_adapter(int model, int[] parameters, int rank, float scale, Tensor a, Tensor b, bool rounded) -> int");
  m.def("native_adapter_bytes(int adapter) -> int");
  m.def("native_adapter_free(int adapter) -> ()");
  m.def("native_decoder_adapt(int decoder, int[] adapters) -> ()");
  m.def("native_decoder_bytes(int decoder) -> int");
  m.def("native_decoder_free(int decoder) -> ()");
  m.def(
      "sample(Tensor logits, int vocabulary, float temperature, int top_k, float top_p, float min_p, Tensor? uniform, "
      "Tensor? masks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&llmfast::causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&llmfast::causal_attention_backward));
  m.impl("layer_norm", TORCH_BOX(&llmfast::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&llmfast::layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&llmfast::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&llmfast::add_layer_norm_backward));
  m.impl("rms_norm", TORCH_BOX(&llmfast::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&llmfast::rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&llmfast::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&llmfast::add_rms_norm_backward));
  m.impl("rotary", TORCH_BOX(&llmfast::rotary));
  m.impl("rotary_backward", TORCH_BOX(&llmfast::rotary_backward));
  m.impl("gelu", TORCH_BOX(&llmfast::gelu));
  m.impl("gelu_backward", TORCH_BOX(&llmfast::gelu_backward));
  m.impl("linear", TORCH_BOX(&llmfast::linear));
  m.impl("linear_backward", TORCH_BOX(&llmfast::linear_backward));
  m.impl("gated_linear", TORCH_BOX(&llmfast::gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&llmfast::gated_linear_backward));
  m.impl("linear_cross_entropy", TORCH_BOX(&llmfast::linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&llmfast::linear_cross_entropy_backward));
  m.impl("native_model_give", TORCH_BOX(&llmfast::native_model_give));
  m.impl("native_adapter", TORCH_BOX(&llmfast::native_adapter));
  m.impl("native_step", TORCH_BOX(&llmfast::native_step));
  m.impl("native_encode", TORCH_BOX(&llmfast::native_encode));
  m.impl("sample", TORCH_BOX(&llmfast::sample));
  m.impl("limit_read", TORCH_BOX(&llmfast::limit_read));
}

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("limit_arithmetic", TORCH_BOX(&llmfast::limit_arithmetic));
  m.impl("cpu_isa", TORCH_BOX(&llmfast::cpu_isa));
  m.impl("native_model", TORCH_BOX(&llmfast::native_model));
  m.impl("native_model_bytes", TORCH_BOX(&llmfast::native_model_bytes));
  m.impl("native_model_free", TORCH_BOX(&llmfast::native_model_free));
  m.impl("native_decoder", TORCH_BOX(&llmfast::native_decoder));
  m.impl("native_adapter_bytes", TORCH_BOX(&llmfast::native_adapter_bytes));
  m.impl("native_adapter_free", TORCH_BOX(&llmfast::native_adapter_free));
  m.impl("native_decoder_adapt", TORCH_BOX(&llmfast::native_decoder_adapt));
  m.impl("native_decoder_bytes", TORCH_BOX(&llmfast::native_decoder_bytes));
  m.impl("native_decoder_free", TORCH_BOX(&llmfast::native_decoder_free));
}
