// gelu, linear and their backward passes: checks and outputs for gelu.inl and linear.inl.

#include "../tensors.h"

namespace llmfast {
namespace {

Activation gelu_kind(const std::string& approximate) {
  if (approximate == "tanh") return Activation::gelu_tanh;
  check(approximate == "none", "approximate is '", approximate, "', expected 'tanh' or 'none'");
  return Activation::gelu_erf;
}

LinearArgs arguments(const Tensor& x, const Tensor& weight, const std::string& activation) {
  LinearArgs a{};
  a.dtype = dtype_of(x, "x");
  check(weight.dim() == 2, "weight has shape ", shape(weight), ", expected (N, K)");
  check(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), "x has shape ", shape(x), ", expected (..., ", weight.size(1),
        ")");
  check_same_dtype(weight, "weight", x, "x");
  a.N = weight.size(0), a.K = weight.size(1), a.M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) a.M *= x.size(i);
  a.activation = activation_kind(activation);
  return a;
}

std::vector<int64_t> output_sizes(const Tensor& x, i64 N) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = N;
  return sizes;
}

}  // namespace

Activation activation_kind(const std::string& activation) {
  if (activation.empty()) return Activation::none;
  if (activation == "silu") return Activation::silu;
  if (activation == "gelu_tanh") return Activation::gelu_tanh;
  check(activation == "gelu", "activation is '", activation, "', expected '', 'silu', 'gelu' or 'gelu_tanh'");
  return Activation::gelu_erf;
}

Tensor gelu(const Tensor& x_, std::string approximate) {
  GeluArgs a{};
  a.dtype = dtype_of(x_, "x");
  a.kind = gelu_kind(approximate);
  const Tensor x = dense(x_), out = allocate(sizes_of(x), x.scalar_type());
  a.n = x.numel(), a.x = pointer(x), a.out = writable(out);
  if (a.n > 0) kernels().gelu(a, torch_threads(a.n));
  return out;
}

Tensor gelu_backward(const Tensor& grad_out, const Tensor& x_, std::string approximate) {
  GeluArgs a{};
  a.dtype = dtype_of(x_, "x");
  a.kind = gelu_kind(approximate);
  check_same_shape(grad_out, "grad_out", x_, "x");
  check_same_dtype(grad_out, "grad_out", x_, "x");
  const Tensor x = dense(x_), grad = dense(grad_out), dx = allocate(sizes_of(x), x.scalar_type());
  a.n = x.numel(), a.x = pointer(x), a.grad_out = pointer(grad), a.dx = writable(dx);
  if (a.n > 0) kernels().gelu_backward(a, torch_threads(a.n));
  return dx;
}

Tensors2 linear(const Tensor& x_, const Tensor& weight_, const MaybeTensor& bias_, std::string activation,
                bool save_preactivation) {
  LinearArgs a = arguments(x_, weight_, activation);
  const Tensor x = dense(x_), weight = dense(weight_);
  Tensor bias;
  if (bias_.has_value()) {
    check(bias_->dim() == 1 && bias_->size(0) == a.N, "bias has shape ", shape(*bias_), ", expected (", a.N, ",)");
    check_same_dtype(*bias_, "bias", x, "x");
    bias = dense(*bias_);
    a.bias = pointer(bias);
  }
  const std::vector<int64_t> sizes = output_sizes(x, a.N);
  const Tensor out = allocate(sizes, x.scalar_type());
  const Tensor preactivation = allocate(save_preactivation ? sizes : std::vector<int64_t>{0}, x.scalar_type());
  a.x = pointer(x), a.weight = pointer(weight), a.out = writable(out);
  if (save_preactivation) a.preactivation = writable(preactivation);
  if (a.M > 0 && a.N > 0) kernels().linear(a, torch_threads(weight.numel() + x.numel()));
  return {out, preactivation};
}

Tensors3 linear_backward(const Tensor& grad_out, const Tensor& x_, const Tensor& weight_, const Tensor& preactivation_,
                         std::string activation, bool need_dx, bool need_dweight, bool need_dbias) {
  LinearArgs a = arguments(x_, weight_, activation);
  check(grad_out.dim() >= 1 && grad_out.size(grad_out.dim() - 1) == a.N && grad_out.numel() == a.M * a.N,
        "grad_out has shape ", shape(grad_out), ", expected (..., ", a.N, ") with the rows of x, ", shape(x_));
  check_same_dtype(grad_out, "grad_out", x_, "x");
  const Tensor x = dense(x_), weight = dense(weight_), grad = dense(grad_out);
  Tensor preactivation;
  if (a.activation != Activation::none) {
    check_same_shape(preactivation_, "preactivation", grad_out, "grad_out");
    check_same_dtype(preactivation_, "preactivation", x_, "x");
    preactivation = dense(preactivation_);
    a.preactivation = const_cast<void*>(pointer(preactivation));
  }
  const std::vector<int64_t> none{0};
  const Tensor dx = allocate(need_dx ? sizes_of(x) : none, x.scalar_type());
  const Tensor dweight = allocate(need_dweight ? sizes_of(weight) : none, x.scalar_type());
  const Tensor dbias = allocate(need_dbias ? std::vector<int64_t>{a.N} : none, x.scalar_type());
  a.x = pointer(x), a.weight = pointer(weight), a.grad_out = pointer(grad);
  if (dx.numel() > 0) a.dx = writable(dx);
  if (dweight.numel() > 0) a.dweight = writable(dweight);
  if (dbias.numel() > 0) a.dbias = writable(dbias);
  if (a.dx || a.dweight || a.dbias) kernels().linear_backward(a, torch_threads(weight.numel() + x.numel()));
  return {dx, dweight, dbias};
}

}  // namespace llmfast
