// layer_norm, rms_norm, both after a residual addition, and their backward passes: checks and outputs for norm.inl.

#include "../tensors.h"

namespace llmfast {
namespace {

NormArgs arguments(const Tensor& x, const char* name, const Tensor& weight) {
  NormArgs a{};
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

using Kernel = void (*)(const NormArgs&, const Threads&);

// mean is left undefined where `centred` is not set, sum where there is no residual.
struct Normed {
  Tensor out, sum, mean, rstd;
};

Normed forward(Kernel kernel, bool centred, const Tensor& x_, const MaybeTensor& residual, const Tensor& weight_,
               const MaybeTensor& bias, double eps) {
  NormArgs a = arguments(x_, "x", weight_);
  const Tensor x = dense(x_), weight = dense(weight_);
  Tensor add, offset;
  Normed y;
  if (residual.has_value()) {
    check_same_shape(*residual, "residual", x, "x");
    check_same_dtype(*residual, "residual", x, "x");
    add = dense(*residual);
    y.sum = allocate(sizes_of(x), x.scalar_type());
    a.residual = pointer(add);
    a.sum = writable(y.sum);
  }
  if (bias.has_value()) {
    check_same_shape(*bias, "bias", weight, "weight");
    check_same_dtype(*bias, "bias", x, "x");
    offset = dense(*bias);
    a.bias = pointer(offset);
  }
  y.out = allocate(sizes_of(x), x.scalar_type());
  y.rstd = allocate(shape_of_rows(x), ScalarType::Float);
  if (centred) {
    y.mean = allocate(shape_of_rows(x), ScalarType::Float);
    a.mean = writable_float(y.mean);
  }
  a.x = pointer(x), a.weight = pointer(weight), a.eps = float(eps);
  a.out = writable(y.out), a.rstd = writable_float(y.rstd);
  if (a.rows > 0) kernel(a, torch_threads(a.rows * a.N));
  return y;
}

// One number a row, for backward.
Tensor statistic(const Tensor& t, const char* name, const NormArgs& a, const Tensor& x) {
  check((a.N == 0 || t.numel() == a.rows) && t.scalar_type() == ScalarType::Float, name, " has shape ", shape(t),
        ", expected float32, one a row of x, ", shape(x));
  return dense(t);
}

// dx, dweight, and with a mean dbias.
Tensors3 backward(Kernel kernel, const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& x_,
                  const Tensor& weight_, const MaybeTensor& mean_, const Tensor& rstd_) {
  NormArgs a = arguments(x_, "x", weight_);
  check_same_shape(grad_out, "grad_out", x_, "x");
  check_same_dtype(grad_out, "grad_out", x_, "x");
  const Tensor x = dense(x_), weight = dense(weight_), grad = dense(grad_out), rstd = statistic(rstd_, "rstd", a, x_);
  Tensor add, mean, dbias;
  if (grad_sum.has_value()) {
    check_same_shape(*grad_sum, "grad_sum", x, "sum");
    check_same_dtype(*grad_sum, "grad_sum", x, "sum");
    add = dense(*grad_sum);
    a.grad_sum = pointer(add);
  }
  if (mean_.has_value()) {
    mean = statistic(*mean_, "mean", a, x_);
    a.mean = static_cast<float*>(const_cast<void*>(pointer(mean)));
    dbias = allocate({a.N}, x.scalar_type());
    a.dbias = writable(dbias);
  }
  const Tensor dx = allocate(sizes_of(x), x.scalar_type()), dweight = allocate({a.N}, x.scalar_type());
  a.x = pointer(x), a.weight = pointer(weight), a.grad_out = pointer(grad);
  a.rstd = static_cast<float*>(const_cast<void*>(pointer(rstd)));
  a.dx = writable(dx), a.dweight = writable(dweight);
  if (a.N > 0) kernel(a, torch_threads(2 * a.rows * a.N));
  return {dx, dweight, dbias};
}

}  // namespace

Tensors3 layer_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps) {
  const Normed y = forward(kernels().layer_norm, true, x, std::nullopt, weight, bias, eps);
  return {y.out, y.mean, y.rstd};
}

Tensors3 layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& mean,
                             const Tensor& rstd) {
  return backward(kernels().layer_norm_backward, grad_out, std::nullopt, x, weight, mean, rstd);
}

Tensors4 add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const MaybeTensor& bias, double eps) {
  const Normed y = forward(kernels().layer_norm, true, x, residual, weight, bias, eps);
  return {y.out, y.sum, y.mean, y.rstd};
}

Tensors3 add_layer_norm_backward(const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& sum,
                                 const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  return backward(kernels().layer_norm_backward, grad_out, grad_sum, sum, weight, mean, rstd);
}

Tensors2 rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Normed y = forward(kernels().rms_norm, false, x, std::nullopt, weight, std::nullopt, eps);
  return {y.out, y.rstd};
}

Tensors2 rms_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  const auto [dx, dweight, none] =
      backward(kernels().rms_norm_backward, grad_out, std::nullopt, x, weight, std::nullopt, rstd);
  return {dx, dweight};
}

Tensors3 add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Normed y = forward(kernels().rms_norm, false, x, residual, weight, std::nullopt, eps);
  return {y.out, y.sum, y.rstd};
}

Tensors2 add_rms_norm_backward(const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& sum, const Tensor& weight,
                               const Tensor& rstd) {
  const auto [dsum, dweight, none] =
      backward(kernels().rms_norm_backward, grad_out, grad_sum, sum, weight, std::nullopt, rstd);
  return {dsum, dweight};
}

}  // namespace llmfast
