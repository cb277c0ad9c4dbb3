// Between torch and the kernel core: checks with messages that name the argument, allocation, pointers, threads.
//
// Only the LibTorch stable ABI is used (torch/csrc/stable), so one build serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace llmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + (t.dim() == 1 ? ",)" : ")");
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline DType dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  check(t.is_cpu(), name, " must be on the CPU");
  check(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return type == ScalarType::Float ? DType::f32 : DType::bf16;
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check(t.is_cpu(), name, " must be on the CPU");
  check(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name);
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); i++) same = t.size(i) == like.size(i);
  check(same, name, " has shape ", shape(t), ", expected that of ", like_name, ", ", shape(like));
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// New memory is zeroed by the system page by page when it is first touched, which can take longer than the arithmetic
// on it; where it comes in pages of 2 MiB that is several times faster.
inline void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t LARGE_PAGE = uintptr_t{2} << 20;
  if (bytes < 2 * LARGE_PAGE) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  const uintptr_t last = (begin + bytes) / LARGE_PAGE * LARGE_PAGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor allocate(const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor t = torch::stable::empty(sizes, type);
  size_t bytes = type == ScalarType::BFloat16 ? 2 : 4;
  for (const int64_t size : sizes) bytes *= size_t(size);
  ask_for_large_pages(t.mutable_data_ptr(), bytes);
  return t;
}

// (B, H, T, D): any strides will do as long as the last dimension is contiguous, which a view of one (B, T, 3C) projection or of a
// longer key/value cache has; anything else is copied.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

inline void take_strides(i64 (&to)[3], const Tensor& t) {
  for (int i = 0; i < 3; i++) to[i] = t.stride(i);
}

// (B, H, T, D), lying in memory as (B, T, H, D), so that the heads merge back to (B, T, C) as a view.
inline Tensor empty_like_heads(const Tensor& t) {
  return torch::stable::transpose(allocate({t.size(0), t.size(2), t.size(1), t.size(3)}, t.scalar_type()), 1, 2);
}

inline const void* pointer(const Tensor& t) { return t.const_data_ptr(); }
inline void* writable(const Tensor& t) { return t.mutable_data_ptr(); }
inline float* writable_float(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// torch's threads for an operation on about `work` elements (numbers read, or products of a few). Waking them takes
// microseconds, and far longer where another program has their core, so little work stays on the caller's thread.
inline Threads torch_threads(i64 work) {
  constexpr i64 WORTH_WAKING_FOR = 64 << 10;
  return Threads{work < WORTH_WAKING_FOR ? 1 : int(torch::stable::get_num_threads()),
                 [](i64 n, void (*f)(i64, i64, void*), void* context) {
                   torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { f(begin, end, context); });
                 }};
}

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using MaybeTensor = std::optional<Tensor>;

Activation activation_kind(const std::string& activation);  // "" is none

// The operators, in the order of library.cpp.
Tensors2 causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p,
                          const MaybeTensor& dropout_seed, const MaybeTensor& kv_lengths, int64_t window, bool causal);
Tensors3 causal_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& out, const Tensor& lse, double scale, double dropout_p,
                                   const MaybeTensor& dropout_seed, const MaybeTensor& kv_lengths, int64_t window,
                                   bool causal);
Tensors3 layer_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps);
Tensors3 layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& mean,
                             const Tensor& rstd);
Tensors4 add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const MaybeTensor& bias, double eps);
Tensors3 add_layer_norm_backward(const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& sum,
                                 const Tensor& weight, const Tensor& mean, const Tensor& rstd);
Tensors2 rms_norm(const Tensor& x, const Tensor& weight, double eps);
Tensors2 rms_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& rstd);
Tensors3 add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);
Tensors2 add_rms_norm_backward(const Tensor& grad_out, const MaybeTensor& grad_sum, const Tensor& sum, const Tensor& weight,
                               const Tensor& rstd);
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved);
Tensor rotary_backward(const Tensor& grad_out, const Tensor& cos, const Tensor& sin, bool interleaved);
Tensor gelu(const Tensor& x, std::string approximate);
Tensor gelu_backward(const Tensor& grad_out, const Tensor& x, std::string approximate);
Tensors2 linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::string activation,
                bool save_preactivation);
Tensors3 linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& preactivation,
                         std::string activation, bool need_dx, bool need_dweight, bool need_dbias);
Tensors3 gated_linear(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight, const MaybeTensor& gate_bias,
                      const MaybeTensor& up_bias, std::string activation, bool save);
Tensors5 gated_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                               const Tensor& gate, const Tensor& up, std::string activation, bool need_dx,
                               bool need_dgate_weight, bool need_dup_weight, bool need_dgate_bias, bool need_dup_bias);
Tensors2 linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t ignore_index);
Tensors2 linear_cross_entropy_backward(const Tensor& grad_loss, const Tensor& hidden, const Tensor& weight,
                                       const Tensor& targets, const Tensor& lse, int64_t ignore_index, bool need_dweight);
int64_t limit_read(const Tensor& memory);
int64_t limit_arithmetic(std::string kind, int64_t tasks, int64_t rounds);
std::string cpu_isa();
int64_t native_model(std::vector<int64_t> sizes, std::vector<double> numbers, std::string norm, std::string activation,
                     bool gated, std::vector<double> inverse_frequencies, std::vector<int64_t> rotary,
                     std::vector<int64_t> windows, std::vector<int64_t> blocks, std::vector<std::string> roles,
                     std::vector<int64_t> biases, std::vector<int64_t> formats);
void native_model_give(int64_t model, int64_t parameter, const Tensor& values, const MaybeTensor& scale,
                       const MaybeTensor& minimum, const MaybeTensor& scale_code, const MaybeTensor& minimum_code,
                       int64_t threads);
int64_t native_model_bytes(int64_t model);
void native_model_free(int64_t model);
int64_t native_decoder(int64_t model, int64_t batch, int64_t capacity, int64_t most_rows, std::string cache_type);
int64_t native_adapter(int64_t model, std::vector<int64_t> parameters, int64_t rank, double scale, const Tensor& a,
                       const Tensor& b, bool rounded);
int64_t native_adapter_bytes(int64_t adapter);
void native_adapter_free(int64_t adapter);
void native_decoder_adapt(int64_t decoder, std::vector<int64_t> numbers);
Tensor native_step(int64_t decoder, const Tensor& ids, std::vector<int64_t> segments, bool all_rows, int64_t vocabulary,
                   int64_t threads, const MaybeTensor& logits);
Tensor native_encode(int64_t model, const Tensor& ids, std::vector<int64_t> lengths, std::string pooling, int64_t threads);
int64_t native_decoder_bytes(int64_t decoder);
void native_decoder_free(int64_t decoder);
Tensor sample(const Tensor& logits, int64_t vocabulary, double temperature, int64_t top_k, double top_p, double min_p,
              const MaybeTensor& uniform, const MaybeTensor& masks);

}  // namespace llmfast
