// layer_norm, add_layer_norm and their backward passes: checks and outputs for layer_norm.inl.

#include "tensors.h"

namespace llmfast {
namespace {

LayerNormArgs arguments(const Tensor& x, const char* name, const Tensor& weight) {
  LayerNormArgs a{};
  a.dtype = dtype_of(x, name);
  check(x.dim() >= 1, name, " has no dimension to normalise");
  a.N = x.size(x.dim() - 1);
  a.rows = a.N > 0 ? x.numel() / a.N : 0;
  check(weight.dim() == 1 && weight.size(0) == a.N, "weight has shape ", shape(weight), ", expected (", a.N, ",)");
  check_same_dtype(weight, "weight", x, name);
  return a;
}

std::vector<int64_t> shape_of_rows(const Tensor& x) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.pop_back();
  return sizes;
}

Tensors4 forward(const Tensor& x_, const MaybeTensor& residual, const Tensor& weight_, const MaybeTensor& bias, double eps) {
  LayerNormArgs a = arguments(x_, "x", weight_);
  const Tensor x = dense(x_), weight = dense(weight_);
  Tensor add, sum, offset;
  if (residual.has_value()) {
    check_same_shape(*residual, "residual", x, "x");
    check_same_dtype(*residual, "residual", x, "x");
    add = dense(*residual);
    sum = allocate(sizes_of(x), x.scalar_type());
    a.residual = pointer(add);
    a.sum = writable(sum);
  }
  if (bias.has_value()) {
    check_same_shape(*bias, "bias", weight, "weight");
    check_same_dtype(*bias, "bias", x, "x");
    offset = dense(*bias);
    a.bias = pointer(offset);
  }
  const Tensor out = allocate(sizes_of(x), x.scalar_type());
  const Tensor mean = allocate(shape_of_rows(x), ScalarType::Float), rstd = allocate(shape_of_rows(x), ScalarType::Float);
  a.x = pointer(x), a.weight = pointer(weight), a.eps = float(eps);
  a.out = writable(out), a.mean = writable_float(mean), a.rstd = writable_float(rstd);
  if (a.rows > 0) kernels().layer_norm(a, torch_threads(a.rows * a.N));
  return {out, sum, mean, rstd};
}

Tensors3 backward(const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& x_, const Tensor& weight_,
                  const Tensor& mean_, const Tensor& rstd_) {
  LayerNormArgs a = arguments(x_, "x", weight_);
  check_same_shape(grad_out, "grad_out", x_, "x");
  check_same_dtype(grad_out, "grad_out", x_, "x");
  check(mean_.numel() == rstd_.numel() && (a.N == 0 || mean_.numel() == a.rows) &&
            mean_.scalar_type() == ScalarType::Float && rstd_.scalar_type() == ScalarType::Float,
        "mean has shape ", shape(mean_), " and rstd ", shape(rstd_), ", expected float32, one a row of x, ", shape(x_));
  const Tensor x = dense(x_), weight = dense(weight_), grad = dense(grad_out), mean = dense(mean_),
               rstd = dense(rstd_);
  Tensor add;
  if (grad_sum.has_value()) {
    check_same_shape(*grad_sum, "grad_sum", x, "sum");
    check_same_dtype(*grad_sum, "grad_sum", x, "sum");
    add = dense(*grad_sum);
    a.grad_sum = pointer(add);
  }
  const Tensor dx = allocate(sizes_of(x), x.scalar_type());
  const Tensor dweight = allocate({a.N}, x.scalar_type()), dbias = allocate({a.N}, x.scalar_type());
  a.x = pointer(x), a.weight = pointer(weight), a.grad_out = pointer(grad);
  a.mean = static_cast<float*>(const_cast<void*>(pointer(mean)));
  a.rstd = static_cast<float*>(const_cast<void*>(pointer(rstd)));
  a.dx = writable(dx), a.dweight = writable(dweight), a.dbias = writable(dbias);
  if (a.N > 0) kernels().layer_norm_backward(a, torch_threads(2 * a.rows * a.N));
  return {dx, dweight, dbias};
}

}  // namespace

Tensors3 layer_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps) {
  const auto [out, sum, mean, rstd] = forward(x, std::nullopt, weight, bias, eps);
  return {out, mean, rstd};
}

Tensors3 layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& mean,
                             const Tensor& rstd) {
  return backward(grad_out, std::nullopt, x, weight, mean, rstd);
}

Tensors4 add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const MaybeTensor& bias, double eps) {
  return forward(x, residual, weight, bias, eps);
}

Tensors3 add_layer_norm_backward(const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& sum,
                                 const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  return backward(grad_out, grad_sum, sum, weight, mean, rstd);
}

}  // namespace llmfast
