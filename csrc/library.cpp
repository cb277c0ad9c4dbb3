// The table of contents: every C++ operator, torch.ops.llmfast.<name>, and the file its glue and its kernel are in.
//
//   op                      tensors                    kernel
//   causal_attention        attention_ops.cpp          attention.inl, attention_decode.inl, attention_backward.inl
//   layer_norm, add_...     layer_norm_ops.cpp         layer_norm.inl
//   gelu                    linear_ops.cpp             gelu.inl
//   linear                  linear_ops.cpp             linear.inl on matmul.inl
//   linear_cross_entropy    cross_entropy_ops.cpp      cross_entropy.inl on matmul.inl
//
// Only CPU kernels are registered here; fake kernels and autograd formulas come from llmfast/backends/registered.py,
// for these operators and for the Triton ones of the same schemas alike.

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace llmfast {

std::string cpu_isa() { return kernels().name; }

}  // namespace llmfast

STABLE_TORCH_LIBRARY(llmfast, m) {
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? dropout_seed, "
      "Tensor? kv_lengths) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
      "float dropout_p, Tensor? dropout_seed, Tensor? kv_lengths) -> (Tensor, Tensor, Tensor)");
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
  m.def("gelu(Tensor x, str approximate) -> Tensor");
  m.def("gelu_backward(Tensor grad_out, Tensor x, str approximate) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_preactivation) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor preactivation, str activation, bool need_dx, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
      "int ignore_index) -> (Tensor, Tensor)");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&llmfast::causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&llmfast::causal_attention_backward));
  m.impl("layer_norm", TORCH_BOX(&llmfast::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&llmfast::layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&llmfast::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&llmfast::add_layer_norm_backward));
  m.impl("gelu", TORCH_BOX(&llmfast::gelu));
  m.impl("gelu_backward", TORCH_BOX(&llmfast::gelu_backward));
  m.impl("linear", TORCH_BOX(&llmfast::linear));
  m.impl("linear_backward", TORCH_BOX(&llmfast::linear_backward));
  m.impl("linear_cross_entropy", TORCH_BOX(&llmfast::linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&llmfast::linear_cross_entropy_backward));
}

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&llmfast::cpu_isa));
}
