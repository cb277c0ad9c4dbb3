// causal_attention and its backward: checks, strides and outputs for attention*.inl.

#include "../tensors.h"

namespace llmfast {
namespace {

// What both passes share: the arguments that are checked, and the tensors that must outlive the call.
struct Call {
  AttentionArgs args{};
  Tensor q, k, v;
  std::vector<i64> lengths;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale, double dropout_p, const MaybeTensor& dropout_seed,
       const MaybeTensor& kv_lengths, i64 window, bool causal) {
    check(q_.dim() == 4, "q has shape ", shape(q_), ", expected (B, H, T, D)");
    check(k_.dim() == 4, "k has shape ", shape(k_), ", expected (B, Hkv, S, D)");
    check_same_shape(v_, "v", k_, "k");
    AttentionArgs& a = args;
    a.dtype = dtype_of(q_, "q");
    check_same_dtype(k_, "k", q_, "q");
    check_same_dtype(v_, "v", q_, "q");
    a.B = q_.size(0), a.H = q_.size(1), a.T = q_.size(2), a.D = q_.size(3), a.Hkv = k_.size(1), a.S = k_.size(2);
    check(k_.size(0) == a.B && k_.size(3) == a.D, "k has shape ", shape(k_), ", expected batch and head sizes of q, ",
          shape(q_));
    check(!causal || a.S >= a.T, "k has ", a.S, " positions and q has ", a.T, "; k needs at least as many");
    check(window == 0 || (window > 0 && causal), "window is ", window, ", expected 0 or, in causal attention, at least 1");
    check(a.Hkv > 0 ? a.H % a.Hkv == 0 : a.H == 0, "q's ", a.H, " heads are not a multiple of k's ", a.Hkv);
    check(a.D <= 256, "the head size is ", a.D, "; 256 is the largest supported");
    check(a.S + a.T < (i64{1} << 31), "q and k have ", a.T, " and ", a.S, " positions; fewer than 2^31 are supported");
    check(dropout_p >= 0 && dropout_p <= 1, "dropout_p is ", dropout_p, ", expected a probability");
    a.scale = float(scale);
    a.dropout_p = dropout_p;
    a.bidirectional = !causal;
    a.window = window < a.S ? window : 0;
    if (dropout_p > 0) {
      check(dropout_seed.has_value(), "dropout_p > 0 needs dropout_seed");
      check(dropout_seed->numel() == 1 && dropout_seed->scalar_type() == ScalarType::Long && dropout_seed->is_cpu(),
            "dropout_seed must be one int64 on the CPU");
      a.seed = *static_cast<const uint64_t*>(pointer(*dropout_seed));
    }
    if (kv_lengths.has_value()) {
      const ScalarType type = kv_lengths->scalar_type();
      check(kv_lengths->dim() == 1 && kv_lengths->size(0) == a.B && kv_lengths->is_cpu() &&
                (type == ScalarType::Long || type == ScalarType::Int),
            "kv_lengths has shape ", shape(*kv_lengths), ", expected (", a.B, ",) of int64 or int32 on the CPU");
      const Tensor given = dense(*kv_lengths);
      for (i64 b = 0; b < a.B; b++) {
        lengths.push_back(type == ScalarType::Long ? static_cast<const int64_t*>(pointer(given))[b]
                                                   : static_cast<const int32_t*>(pointer(given))[b]);
        lengths[b] = std::min(std::max<i64>(lengths[b], 0), a.S);
      }
      a.kv_lengths = lengths.data();
    }
    q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
    a.q = pointer(q), a.k = pointer(k), a.v = pointer(v);
    take_strides(a.q_stride, q), take_strides(a.k_stride, k), take_strides(a.v_stride, v);
  }

  // Products of about this many numbers, for each of the two that a forward pass needs.
  i64 work() const {
    const i64 keys = args.window ? args.window : args.bidirectional ? args.S : args.S / 2;
    return args.B * args.H * args.T * keys * args.D;
  }
};

}  // namespace

Tensors2 causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p,
                          const MaybeTensor& dropout_seed, const MaybeTensor& kv_lengths, int64_t window, bool causal) {
  Call call(q, k, v, scale, dropout_p, dropout_seed, kv_lengths, window, causal);
  AttentionArgs& a = call.args;
  const Tensor out = empty_like_heads(q), lse = allocate({a.B, a.H, a.T}, ScalarType::Float);
  a.out = writable(out);
  take_strides(a.out_stride, out);
  a.lse = writable_float(lse);
  if (lse.numel() > 0) kernels().attention(a, torch_threads(call.work()));
  return {out, lse};
}

Tensors3 causal_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& out, const Tensor& lse, double scale, double dropout_p,
                                   const MaybeTensor& dropout_seed, const MaybeTensor& kv_lengths, int64_t window,
                                   bool causal) {
  Call call(q, k, v, scale, dropout_p, dropout_seed, kv_lengths, window, causal);
  AttentionArgs& a = call.args;
  check_same_shape(grad_out, "grad_out", q, "q");
  check_same_shape(out, "out", q, "q");
  check_same_dtype(grad_out, "grad_out", q, "q");
  check_same_dtype(out, "out", q, "q");
  check(lse.numel() == a.B * a.H * a.T && lse.scalar_type() == ScalarType::Float, "lse has shape ", shape(lse),
        ", expected float32 (", a.B, ", ", a.H, ", ", a.T, ")");
  const Tensor grad_rows = rows_contiguous(grad_out), out_rows = rows_contiguous(out), lse_rows = dense(lse);
  a.grad_out = pointer(grad_rows);
  take_strides(a.grad_out_stride, grad_rows);
  a.out = const_cast<void*>(pointer(out_rows));
  take_strides(a.out_stride, out_rows);
  a.lse = static_cast<float*>(const_cast<void*>(pointer(lse_rows)));
  const Tensor dq = empty_like_heads(q), dk = empty_like_heads(k), dv = empty_like_heads(v);
  a.dq = writable(dq), a.dk = writable(dk), a.dv = writable(dv);
  take_strides(a.dq_stride, dq), take_strides(a.dk_stride, dk), take_strides(a.dv_stride, dv);
  if (dq.numel() + dk.numel() > 0) kernels().attention_backward(a, torch_threads(2 * call.work()));
  return {dq, dk, dv};
}

}  // namespace llmfast
