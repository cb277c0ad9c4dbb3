// The activations that are fused to a product: value and slope of each kind.
//
//   silu(x) = x * s,   silu'(x) = s + x s (1 - s),   s = 1 / (1 + exp(-x))

template <Activation KIND>
struct ActivationOf : Gelu<KIND> {};

template <>
struct ActivationOf<Activation::none> {
  static LLMFAST_INLINE vf value(vf x) { return x; }
  static LLMFAST_INLINE vf slope(vf) { return splat(1.0f); }
};

template <>
struct ActivationOf<Activation::silu> {
  // Beyond 87 on either side s is 0 or 1 to the last bit, and exp would go on to overflow.
  static LLMFAST_INLINE vf exp_minus(vf x) { return exp_bounded(-vmin(splat(87.0f), vmax(splat(-87.0f), x))); }
  static LLMFAST_INLINE vf value(vf x) { return x * (1.0f / (1.0f + exp_minus(x))); }
  static LLMFAST_INLINE vf slope(vf x) {
    const vf e = exp_minus(x), s = 1.0f / (1.0f + e);
    return s + x * s * (e * s);  // e s = 1 - s, not cancelled
  }
};

// f(ActivationOf<kind>{}).
template <class F>
LLMFAST_INLINE auto with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::gelu_tanh:
      return f(ActivationOf<Activation::gelu_tanh>{});
    case Activation::gelu_erf:
      return f(ActivationOf<Activation::gelu_erf>{});
    case Activation::silu:
      return f(ActivationOf<Activation::silu>{});
    case Activation::none:
      break;
  }
  return f(ActivationOf<Activation::none>{});
}

LLMFAST_INLINE vf activate(Activation kind, vf x) {
  return with_activation(kind, [&](auto activation) { return activation.value(x); });
}
