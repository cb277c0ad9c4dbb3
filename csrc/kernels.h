// What the torch-free kernel core offers: one struct of arguments per op, and one table of functions per instruction
// set.
//
// The core knows pointers, sizes and strides (in elements) and nothing of torch; library.cpp and the *_ops.cpp files
// check tensors, allocate outputs and fill in these structs. kernels_<isa>.cpp compile the same sources once per
// instruction set, each exporting one `Kernels` table; isa.cpp picks one of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmfast {

using i64 = int64_t;

enum class DType { f32, bf16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Threads are lent by the caller (torch's own pool), so that the process never gets a second OpenMP runtime. `run`
// calls f(begin, end, context) on disjoint ranges that cover [0, n); inside another parallel region it may run
// serially.
struct Threads {
  int count;
  void (*run)(i64 n, void (*f)(i64 begin, i64 end, void* context), void* context);
};

// Scratch memory is kept per thread between calls (scratch.cpp), since fresh pages cost more than many of these
// kernels.
void* scratch_take(size_t bytes);
void scratch_give(void* memory);

struct AttentionArgs {
  DType dtype;
  i64 B, H, Hkv, T, S, D;
  const void *q, *k, *v;
  i64 q_stride[3], k_stride[3], v_stride[3];  // batch, head, position; the last dimension is contiguous
  const i64* kv_lengths;                      // (B,) or null: every key is there
  bool bidirectional;  // every query sees every key; else those up to its own, as one of the last T positions
  i64 window;          // and of these the last `window`; 0: all
  float scale;
  double dropout_p;
  uint64_t seed;
  void* out;  // (B, H, T, D)
  i64 out_stride[3];
  float* lse;  // (B, H, T) contiguous; may be null forward
  // The backward pass reads out and lse, and writes:
  const void* grad_out;
  i64 grad_out_stride[3];
  void *dq, *dk, *dv;
  i64 dq_stride[3], dk_stride[3], dv_stride[3];
};

struct NormArgs {
  DType dtype;
  i64 rows, N;
  const void *x, *residual, *weight, *bias;  // residual and bias may be null; the RMS norm has no bias and no mean
  float eps;
  void *out, *sum;  // sum = x + residual, written only where there is a residual
  float *mean, *rstd;
  // Backward: x is what was normalised (the sum), grad_sum (or null) is added into dx.
  const void *grad_out, *grad_sum;
  void *dx, *dweight, *dbias;
};

enum class Activation { none, gelu_tanh, gelu_erf, silu };

struct RotaryArgs {
  DType dtype;
  i64 B, H, T, D, R;  // of D channels the first R turn
  bool interleaved;   // in pairs (2i, 2i + 1); else (i, i + R / 2)
  bool back;          // the other way: the gradient
  const void* x;
  i64 x_stride[3];  // batch, head, position; the last dimension is contiguous
  const float *cos, *sin;
  i64 table_stride;  // (T, R / 2) floats from one sequence to the next; 0: all share one table
  void* out;
  i64 out_stride[3];
};

struct GeluArgs {
  DType dtype;
  i64 n;
  Activation kind;
  const void *x, *grad_out;
  void *out, *dx;
};

struct LinearArgs {
  DType dtype;
  i64 M, N, K;  // out (M, N) = act(x (M, K) @ weight (N, K)^T + bias (N))
  const void *x, *weight, *bias;
  Activation activation;
  void *out, *preactivation;  // preactivation is written where not null
  // Backward; outputs that are null are not computed.
  const void* grad_out;
  void *dx, *dweight, *dbias;
};

struct GatedLinearArgs {
  DType dtype;
  i64 M, N, K;  // out (M, N) = act(gate) * up, gate = x (M, K) @ weight[0] (N, K)^T + bias[0] (N), up with [1]
  const void *x, *weight[2], *bias[2];  // biases may be null
  Activation activation;
  void *out, *product[2];  // gate and up, written forward where not null, read backward
  // Backward; outputs that are null are not computed.
  const void* grad_out;
  void *dx, *dweight[2], *dbias[2];
};

struct CrossEntropyArgs {
  DType dtype;
  i64 rows, V, K;
  const void *hidden, *weight;
  const i64* targets;
  i64 ignore_index;
  float *lse, *loss;
  const float* grad_loss;
  void *dhidden, *dweight;
};

enum class Format;
struct PackedMatrix;
struct WeightSource;
struct RowOrder;
struct DecoderShape;
struct DecoderModel;
struct DecoderState;
struct StepJob;
struct Segment;
struct EncoderJob;

// What the CPU can do at most (limits.inl). The instruction that multiplies, by the numbers that it takes.
enum class LimitKind { f32, bf16, i8 };
constexpr i64 LIMIT_READ_CHUNK = 2 << 20;  // bytes; memory is read in whole chunks
constexpr int LIMIT_CHAINS = 12;           // vector instructions in a round of arithmetic

struct Kernels {
  const char* name;
  void (*attention)(const AttentionArgs&, const Threads&);
  void (*attention_backward)(const AttentionArgs&, const Threads&);
  void (*layer_norm)(const NormArgs&, const Threads&);
  void (*layer_norm_backward)(const NormArgs&, const Threads&);
  void (*rms_norm)(const NormArgs&, const Threads&);
  void (*rms_norm_backward)(const NormArgs&, const Threads&);
  void (*rotary)(const RotaryArgs&, const Threads&);
  void (*gelu)(const GeluArgs&, const Threads&);
  void (*gelu_backward)(const GeluArgs&, const Threads&);
  void (*linear)(const LinearArgs&, const Threads&);
  void (*linear_backward)(const LinearArgs&, const Threads&);
  void (*gated_linear)(const GatedLinearArgs&, const Threads&);
  void (*gated_linear_backward)(const GatedLinearArgs&, const Threads&);
  void (*cross_entropy)(const CrossEntropyArgs&, const Threads&);
  void (*cross_entropy_backward)(const CrossEntropyArgs&, const Threads&);
  // The native decoder (decoder.h).
  i64 lanes, panel_columns;
  i64 (*mlp_in_rows)(const DecoderShape&);
  i64 (*packed_bytes)(Format, i64 N, i64 K);
  bool (*packs)(Format, const WeightSource&);
  bool (*share_rows)(Format, Format);
  i64 (*packed_row)(const RowOrder&, i64 n);
  void (*pack_weight)(const PackedMatrix&, const RowOrder&, i64 N, const WeightSource&, const Threads&);
  i64 (*decoder_row_bytes)(const DecoderModel&);
  i64 (*decoder_partial_floats)(const DecoderState&);
  i64 (*decoder_chunks)(const DecoderState&);
  void (*decoder_step)(DecoderState&, const StepJob&, const Segment*, int thread, uint64_t* last_phase);
  void (*encode)(const EncoderJob&, const Threads&);                                       // the native encoder (encoder.h)
  void (*exp_of_scaled)(const float* x, i64 n, float top, float temperature, float* out);  // exp((x - top) / temperature)
  uint64_t (*limit_read)(const void* memory, i64 bytes, const Threads&);                   // a checksum
  i64 (*limit_arithmetic)(LimitKind, i64 tasks, i64 rounds, const Threads&);               // operations done
};

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
#endif

// The table for this CPU, or the one LLMFAST_CPU_ISA names; throws std::runtime_error where that one cannot run here.
const Kernels& kernels();

}  // namespace llmfast
