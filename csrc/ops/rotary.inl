// Rotary positions on x (B, H, T, D): of each head the first R channels turn in pairs (a, b), by the angle of their token,
//
//   a' = a cos - b sin,   b' = b cos + a sin       pairs (i, i + R / 2), or interleaved (2i, 2i + 1)
//
// and the rest passes. The gradient turns by the opposite angle. A task takes neighbouring tokens with all their heads,
// which share the angles.

constexpr i64 ELEMENTS_PER_ROTARY_TASK = 8192;

struct Pair {
  vf a, b;
};
LLMFAST_INLINE Pair turn(Pair p, vf cos, vf sin) { return {p.a * cos - p.b * sin, p.b * cos + p.a * sin}; }

template <class T, bool INTERLEAVED>
LLMFAST_INLINE void turn_head(const T* x, const float* cos, const float* sin, i64 half, bool back, T* out) {
  for (i64 i = 0; i < half; i += W) {
    const i64 n = half - i;
    const vf c = load_upto(cos + i, n), s = load_upto(sin + i, n);
    if (INTERLEAVED) {
      const T* from = x + 2 * i;
      const vf low = load_upto(from, 2 * n), high = 2 * n > W ? load_upto(from + W, 2 * n - W) : zeros();
      const Pair p = turn({evens(low, high), odds(low, high)}, c, back ? -s : s);
      store_upto(out + 2 * i, interleave_low(p.a, p.b), 2 * n);
      if (2 * n > W) store_upto(out + 2 * i + W, interleave_high(p.a, p.b), 2 * n - W);
    } else {
      const Pair p = turn({load_upto(x + i, n), load_upto(x + half + i, n)}, c, back ? -s : s);
      store_upto(out + i, p.a, n);
      store_upto(out + half + i, p.b, n);
    }
  }
}

template <class T>
void rotary_as(const RotaryArgs& a, const Threads& threads) {
  const i64 tokens = a.B * a.T, half = a.R / 2;
  const i64 tokens_per_task = max_of<i64>(1, ELEMENTS_PER_ROTARY_TASK / max_of<i64>(1, a.H * a.D));
  for_each_task(threads, ceil_div(tokens, tokens_per_task), [&](i64 task) {
    for (i64 token = task * tokens_per_task; token < min_of(tokens, (task + 1) * tokens_per_task); token++) {
      const i64 b = token / a.T, t = token % a.T;
      const float *cos = a.cos + b * a.table_stride + t * half, *sin = a.sin + b * a.table_stride + t * half;
      for (i64 h = 0; h < a.H; h++) {
        const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0] + h * a.x_stride[1] + t * a.x_stride[2];
        T* out = static_cast<T*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1] + t * a.out_stride[2];
        if (a.interleaved)
          turn_head<T, true>(x, cos, sin, half, a.back, out);
        else
          turn_head<T, false>(x, cos, sin, half, a.back, out);
        for (i64 j = a.R; j < a.D; j += W) store_upto(out + j, load_upto(x + j, a.D - j), a.D - j);
      }
    }
  });
}

void rotary(const RotaryArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? rotary_as<float>(a, threads) : rotary_as<bfloat16>(a, threads);
}
