// linear_cross_entropy and its backward: checks and outputs for cross_entropy.inl.

#include "../tensors.h"

namespace llmfast {
namespace {

struct Call {
  CrossEntropyArgs args{};
  Tensor hidden, weight, targets;

  Call(const Tensor& hidden_, const Tensor& weight_, const Tensor& targets_, int64_t ignore_index) {
    CrossEntropyArgs& a = args;
    a.dtype = dtype_of(hidden_, "hidden");
    check(weight_.dim() == 2, "weight has shape ", shape(weight_), ", expected (V, K)");
    check(hidden_.dim() >= 1 && hidden_.size(hidden_.dim() - 1) == weight_.size(1), "hidden has shape ", shape(hidden_),
          ", expected (..., ", weight_.size(1), ")");
    check_same_dtype(weight_, "weight", hidden_, "hidden");
    bool same = targets_.dim() == hidden_.dim() - 1;
    for (int64_t i = 0; same && i < targets_.dim(); i++) same = targets_.size(i) == hidden_.size(i);
    check(same && targets_.scalar_type() == ScalarType::Long && targets_.is_cpu(), "targets has shape ", shape(targets_),
          ", expected int64 on the CPU with the leading dimensions of hidden, ", shape(hidden_));
    hidden = dense(hidden_), weight = dense(weight_), targets = dense(targets_);
    a.rows = targets.numel(), a.V = weight.size(0), a.K = weight.size(1);
    a.hidden = pointer(hidden), a.weight = pointer(weight);
    a.targets = static_cast<const int64_t*>(pointer(targets));
    a.ignore_index = ignore_index;
    for (i64 i = 0; i < a.rows; i++) {
      const i64 target = a.targets[i];
      check(target == ignore_index || (target >= 0 && target < a.V), "targets holds ", target, " (row ", i,
            "), expected 0 to ", a.V - 1, " or ignore_index = ", ignore_index);
    }
  }
};

}  // namespace

Tensors2 linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t ignore_index) {
  Call call(hidden, weight, targets, ignore_index);
  CrossEntropyArgs& a = call.args;
  const Tensor loss = allocate({}, ScalarType::Float), lse = allocate(sizes_of(targets), ScalarType::Float);
  a.loss = writable_float(loss), a.lse = writable_float(lse);
  kernels().cross_entropy(a, torch_threads(weight.numel() + hidden.numel()));
  return {loss, lse};
}

Tensors2 linear_cross_entropy_backward(const Tensor& grad_loss, const Tensor& hidden, const Tensor& weight,
                                       const Tensor& targets, const Tensor& lse_, int64_t ignore_index, bool need_dweight) {
  Call call(hidden, weight, targets, ignore_index);
  CrossEntropyArgs& a = call.args;
  check(grad_loss.numel() == 1 && grad_loss.scalar_type() == ScalarType::Float && grad_loss.is_cpu(), "grad_loss has shape ",
        shape(grad_loss), ", expected one float32 on the CPU");
  check(lse_.numel() == a.rows && lse_.scalar_type() == ScalarType::Float, "lse has shape ", shape(lse_),
        ", expected float32, ", shape(targets));
  const Tensor lse = dense(lse_);
  const Tensor dhidden = allocate(sizes_of(hidden), hidden.scalar_type()),
               dweight = allocate(need_dweight ? sizes_of(weight) : std::vector<int64_t>{0}, weight.scalar_type());
  a.grad_loss = static_cast<const float*>(pointer(grad_loss));
  a.lse = static_cast<float*>(const_cast<void*>(pointer(lse)));
  if (dhidden.numel() > 0) a.dhidden = writable(dhidden);
  if (dweight.numel() > 0) a.dweight = writable(dweight);
  kernels().cross_entropy_backward(a, torch_threads(weight.numel() + hidden.numel()));
  return {dhidden, dweight};
}

}  // namespace llmfast
