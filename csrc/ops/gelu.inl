// GELU, x * Phi(x), and its derivative Phi(x) + x * phi(x), elementwise.
//
//   "tanh" (GPT-2's): Phi(x) = (1 + tanh u) / 2 = sigmoid(2u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//   "none":           Phi(x) = (1 + erf(x / sqrt 2)) / 2
//
// With 16 lanes a register holds one number for each of 16 segments of the x axis, and one instruction looks up a
// lane's: Phi and the derivative are polynomials a segment (gelu_table.inl), without a division or an exponential.
// Elsewhere they are computed from exp; the sigmoid form has no cancellation for negative x, where 1 + tanh has.
//
// Work is split into runs of 16384 elements: long enough to hide the cost of a task, short enough for the last one not
// to matter.

template <Activation KIND>
struct Gelu;

#if LLMFAST_VECTOR_WIDTH == 16
// The polynomial of x's segment at x, for a factor that is 0 on the left of all segments and 1 on their right.
template <int COEFFICIENTS>
LLMFAST_INLINE vf by_segment(const float (&table)[COEFFICIENTS][16], vf x) {
  const float kRound = 12582912.0f;                   // 1.5 * 2^23, as in exp_parts
  const vf b = vmin(splat(7.49f * GELU_SEGMENT), x);  // what comes of x on the left is not used
  const vf shifted = b * (1.0f / GELU_SEGMENT) + kRound;
  const vf u = b - (shifted - kRound) * GELU_SEGMENT;
  const auto coefficient = [&](int power) {  // the lookup reads the low four bits of its index
    return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)shifted, (__m512)load(table[power]));
  };
  vf p = coefficient(COEFFICIENTS - 1);
#pragma GCC unroll 8
  for (int power = COEFFICIENTS - 2; power >= 0; power--) p = p * u + coefficient(power);
  return x < -8.49f * GELU_SEGMENT ? zeros() : p;
}

template <>
struct Gelu<Activation::gelu_tanh> {
  static LLMFAST_INLINE vf value(vf x) { return x * by_segment(GELU_TANH_VALUE, x); }
  static LLMFAST_INLINE vf slope(vf x) { return by_segment(GELU_TANH_SLOPE, x); }
};

template <>
struct Gelu<Activation::gelu_erf> {
  static LLMFAST_INLINE vf value(vf x) { return x * by_segment(GELU_ERF_VALUE, x); }
  static LLMFAST_INLINE vf slope(vf x) { return by_segment(GELU_ERF_SLOPE, x); }
};
#else
template <>
struct Gelu<Activation::gelu_tanh> {
  static constexpr float kScale = 0.797884561f, kCube = 0.044715f;
  // exp(-2u). From 10 on sigmoid(2u) is 1 and u would go on to overflow; below -10 it is 0, and the callers say so.
  static LLMFAST_INLINE vf exp_minus_2u(vf b) { return exp_bounded((-2.0f * kScale) * b * (1.0f + kCube * b * b)); }
  static LLMFAST_INLINE vf value(vf x) {
    const vf y = x / (1.0f + exp_minus_2u(x > 10.0f ? splat(10.0f) : x));
    return x < -10.0f ? zeros() : y;
  }
  static LLMFAST_INLINE vf slope(vf x) {
    const vf b = x > 10.0f ? splat(10.0f) : x, e = exp_minus_2u(b), s = 1.0f / (1.0f + e);
    const vf y = s + b * s * (e * s) * (2.0f * kScale) * (1.0f + 3.0f * kCube * b * b);  // e s = 1 - s, not cancelled
    return x < -10.0f ? zeros() : y;
  }
};

template <>
struct Gelu<Activation::gelu_erf> {
  // Phi(x) from two polynomials: erf(t) for t = |x| / sqrt 2 below 0.92, log(1 - erf(t)) above, so that the left tail
  // does not cancel.
  static LLMFAST_INLINE vf cdf(vf x) {
    const vf t = x * 0.707106781f, a = t < 0.0f ? -t : t, s = t * t;
    vf tail = -1.72853470e-5f * a + 3.83197126e-4f;
    tail = tail * s + (-3.88396438e-3f * a + 2.42546219e-2f);
    tail = tail * a - 1.06777877e-1f;
    tail = tail * a - 6.34846687e-1f;
    tail = tail * a - 1.28717512e-1f;
    tail = tail * a - a;
    const vf half_erfc = 0.5f * (a > 5.0f ? zeros() : exp_bounded(tail));  // erfc(5) is 1.5e-12
    vf middle = splat(-5.96761703e-4f);
    middle = middle * s + 4.99119423e-3f;
    middle = middle * s - 2.67681349e-2f;
    middle = middle * s + 1.12819925e-1f;
    middle = middle * s - 3.76125336e-1f;
    middle = middle * s + 1.28379166e-1f;
    middle = middle * t + t;
    const vf outer = t < 0.0f ? half_erfc : 1.0f - half_erfc;
    return a > 0.921875f ? outer : 0.5f + 0.5f * middle;
  }
  static LLMFAST_INLINE vf value(vf x) { return x * cdf(x); }
  static LLMFAST_INLINE vf slope(vf x) {
    const vf b = x > 13.0f ? splat(13.0f) : (x < -13.0f ? splat(-13.0f) : x);
    return cdf(x) + b * 0.398942280f * exp_bounded(-0.5f * b * b);
  }
};

#endif

constexpr i64 ELEMENTS_PER_TASK = 16384;

template <class T, class F>
void map_elements(const T* x, const T* y, T* out, i64 n, const Threads& threads, const F& f) {
  for_each_task(threads, ceil_div(n, ELEMENTS_PER_TASK), [&](i64 task) {
    const i64 end = min_of(n, (task + 1) * ELEMENTS_PER_TASK);
    i64 i = task * ELEMENTS_PER_TASK;
    for (; i + W <= end; i += W) store(out + i, f(load(x + i), load(y + i)));
    if (i < end) store_n(out + i, f(load_n(x + i, end - i), load_n(y + i, end - i)), end - i);
  });
}

template <class T, Activation KIND>
void gelu_as(const GeluArgs& a, const Threads& threads) {
  const T* x = static_cast<const T*>(a.x);
  if (a.dx)
    map_elements(x, static_cast<const T*>(a.grad_out), static_cast<T*>(a.dx), a.n, threads,
                 [](vf x, vf grad) { return grad * Gelu<KIND>::slope(x); });
  else
    map_elements(x, x, static_cast<T*>(a.out), a.n, threads, [](vf x, vf) { return Gelu<KIND>::value(x); });
}

void gelu(const GeluArgs& a, const Threads& threads) {
  const bool tanh = a.kind == Activation::gelu_tanh;
  if (a.dtype == DType::f32)
    tanh ? gelu_as<float, Activation::gelu_tanh>(a, threads) : gelu_as<float, Activation::gelu_erf>(a, threads);
  else
    tanh ? gelu_as<bfloat16, Activation::gelu_tanh>(a, threads) : gelu_as<bfloat16, Activation::gelu_erf>(a, threads);
}

void gelu_backward(const GeluArgs& a, const Threads& threads) { gelu(a, threads); }
