// rotary and its backward: checks, strides and outputs for rotary.inl.

#include "../tensors.h"

namespace llmfast {
namespace {

Tensor turned(const Tensor& x_, const char* name, const Tensor& cos_, const Tensor& sin_, bool interleaved, bool back) {
  RotaryArgs a{};
  a.dtype = dtype_of(x_, name);
  check(x_.dim() == 4, name, " has shape ", shape(x_), ", expected (B, H, T, D)");
  a.B = x_.size(0), a.H = x_.size(1), a.T = x_.size(2), a.D = x_.size(3);
  check(cos_.dim() == 3 && (cos_.size(0) == 1 || cos_.size(0) == a.B) && cos_.size(1) == a.T && 2 * cos_.size(2) <= a.D,
        "cos has shape ", shape(cos_), ", expected (1 or ", a.B, ", ", a.T, ", R / 2) with R of at most ", a.D);
  check_same_shape(sin_, "sin", cos_, "cos");
  check(cos_.is_cpu() && sin_.is_cpu() && cos_.scalar_type() == ScalarType::Float && sin_.scalar_type() == ScalarType::Float,
        "cos and sin must be float32 on the CPU");
  const Tensor x = rows_contiguous(x_), cos = dense(cos_), sin = dense(sin_), out = empty_like_heads(x);
  a.R = 2 * cos.size(2), a.interleaved = interleaved, a.back = back;
  a.x = pointer(x), a.out = writable(out);
  take_strides(a.x_stride, x), take_strides(a.out_stride, out);
  a.cos = static_cast<const float*>(pointer(cos)), a.sin = static_cast<const float*>(pointer(sin));
  a.table_stride = cos.size(0) == 1 ? 0 : a.T * cos.size(2);
  if (out.numel() > 0) kernels().rotary(a, torch_threads(out.numel()));
  return out;
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return turned(x, "x", cos, sin, interleaved, false);
}

Tensor rotary_backward(const Tensor& grad_out, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return turned(grad_out, "grad_out", cos, sin, interleaved, true);
}

}  // namespace llmfast
