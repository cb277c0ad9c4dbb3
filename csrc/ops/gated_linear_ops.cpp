// gated_linear and its backward: checks and outputs for gated_linear.inl.

#include "../tensors.h"

namespace llmfast {
namespace {

GatedLinearArgs arguments(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                          const std::string& activation) {
  GatedLinearArgs a{};
  a.dtype = dtype_of(x, "x");
  check(gate_weight.dim() == 2, "gate_weight has shape ", shape(gate_weight), ", expected (N, K)");
  check_same_shape(up_weight, "up_weight", gate_weight, "gate_weight");
  check(x.dim() >= 1 && x.size(x.dim() - 1) == gate_weight.size(1), "x has shape ", shape(x), ", expected (..., ",
        gate_weight.size(1), ")");
  check_same_dtype(gate_weight, "gate_weight", x, "x");
  check_same_dtype(up_weight, "up_weight", x, "x");
  a.N = gate_weight.size(0), a.K = gate_weight.size(1), a.M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) a.M *= x.size(i);
  a.activation = activation_kind(activation);
  check(a.activation != Activation::none, "activation is '', expected 'silu', 'gelu' or 'gelu_tanh'");
  return a;
}

}  // namespace

Tensors3 gated_linear(const Tensor& x_, const Tensor& gate_weight_, const Tensor& up_weight_, const MaybeTensor& gate_bias,
                      const MaybeTensor& up_bias, std::string activation, bool save) {
  GatedLinearArgs a = arguments(x_, gate_weight_, up_weight_, activation);
  const Tensor x = dense(x_), weight[2] = {dense(gate_weight_), dense(up_weight_)};
  const MaybeTensor* given[2] = {&gate_bias, &up_bias};
  const char* names[2] = {"gate_bias", "up_bias"};
  Tensor bias[2];
  for (int i = 0; i < 2; i++)
    if (given[i]->has_value()) {
      const Tensor& b = **given[i];
      check(b.dim() == 1 && b.size(0) == a.N, names[i], " has shape ", shape(b), ", expected (", a.N, ",)");
      check_same_dtype(b, names[i], x, "x");
      bias[i] = dense(b);
      a.bias[i] = pointer(bias[i]);
    }
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = a.N;
  const Tensor out = allocate(sizes, x.scalar_type());
  const std::vector<int64_t> saved = save ? sizes : std::vector<int64_t>{0};
  const Tensor gate = allocate(saved, x.scalar_type()), up = allocate(saved, x.scalar_type());
  a.x = pointer(x), a.out = writable(out);
  for (int i = 0; i < 2; i++) {
    a.weight[i] = pointer(weight[i]);
    if (save) a.product[i] = writable(i == 0 ? gate : up);
  }
  if (a.M > 0 && a.N > 0) kernels().gated_linear(a, torch_threads(2 * weight[0].numel() + x.numel()));
  return {out, gate, up};
}

Tensors5 gated_linear_backward(const Tensor& grad_out_, const Tensor& x_, const Tensor& gate_weight_,
                               const Tensor& up_weight_, const Tensor& gate_, const Tensor& up_, std::string activation,
                               bool need_dx, bool need_dgate_weight, bool need_dup_weight, bool need_dgate_bias,
                               bool need_dup_bias) {
  GatedLinearArgs a = arguments(x_, gate_weight_, up_weight_, activation);
  check(grad_out_.dim() >= 1 && grad_out_.size(grad_out_.dim() - 1) == a.N && grad_out_.numel() == a.M * a.N,
        "grad_out has shape ", shape(grad_out_), ", expected (..., ", a.N, ") with the rows of x, ", shape(x_));
  check_same_dtype(grad_out_, "grad_out", x_, "x");
  check_same_shape(gate_, "gate", grad_out_, "grad_out");
  check_same_shape(up_, "up", grad_out_, "grad_out");
  check_same_dtype(gate_, "gate", x_, "x");
  check_same_dtype(up_, "up", x_, "x");
  const Tensor x = dense(x_), grad_out = dense(grad_out_), weight[2] = {dense(gate_weight_), dense(up_weight_)};
  const Tensor product[2] = {dense(gate_), dense(up_)};
  const bool need_dweight[2] = {need_dgate_weight, need_dup_weight}, need_dbias[2] = {need_dgate_bias, need_dup_bias};
  const std::vector<int64_t> none{0}, columns{a.N};
  const auto output = [&](bool needed, const std::vector<int64_t>& sizes, void** to) {
    const Tensor t = allocate(needed ? sizes : none, x.scalar_type());
    if (t.numel() > 0) *to = writable(t);
    return t;
  };
  const Tensor dx = output(need_dx, sizes_of(x), &a.dx);
  Tensor dweight[2], dbias[2];
  for (int i = 0; i < 2; i++) {
    dweight[i] = output(need_dweight[i], sizes_of(weight[i]), &a.dweight[i]);
    dbias[i] = output(need_dbias[i], columns, &a.dbias[i]);
    a.weight[i] = pointer(weight[i]);
    a.product[i] = const_cast<void*>(pointer(product[i]));
  }
  a.x = pointer(x), a.grad_out = pointer(grad_out);
  if (a.dx || a.dweight[0] || a.dweight[1] || a.dbias[0] || a.dbias[1])
    kernels().gated_linear_backward(a, torch_threads(2 * weight[0].numel() + x.numel()));
  return {dx, dweight[0], dweight[1], dbias[0], dbias[1]};
}

}  // namespace llmfast
