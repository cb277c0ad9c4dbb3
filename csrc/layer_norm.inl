// LayerNorm over the last dimension, x (rows, N), optionally of x + residual:
//
//   xhat = (x - mean) * rstd,   out = xhat * weight + bias,   rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//   dx = rstd * (dy w - mean(dy w) - xhat * mean(dy w xhat)),   dweight = sum of dy xhat,   dbias = sum of dy over the
//   rows
//
// A row is read once into float32 (it stays in the first cache), then summed twice: the variance from differences to
// the mean, which never cancels. Threads take runs of rows. Backward sums dweight and dbias per run into partial sums
// that are added up afterwards in the order of the runs; the runs depend on the number of rows alone.

constexpr i64 ROWS_PER_TASK = 16;

// The sum of f(j, n) over a row's vectors, with four accumulators to hide the latency of the additions.
template <class F>
LLMFAST_INLINE float sum_over(i64 N, const F& f) {
  vf s0 = zeros(), s1 = zeros(), s2 = zeros(), s3 = zeros();
  i64 j = 0;
  for (; j + 4 * W <= N; j += 4 * W) {
    s0 += f(j, W);
    s1 += f(j + W, W);
    s2 += f(j + 2 * W, W);
    s3 += f(j + 3 * W, W);
  }
  for (; j + W <= N; j += W) s0 += f(j, W);
  if (j < N) s1 += f(j, N - j);
  return sum_lanes((s0 + s1) + (s2 + s3));
}

LLMFAST_INLINE vf first_lanes(vf a, i64 n) { return n >= W ? a : (lane_index() < splat_int(int32_t(n)) ? a : zeros()); }

template <class T>
void layer_norm_as(const LayerNormArgs& a, const Threads& threads) {
  const i64 N = a.N;
  for_each_task(threads, ceil_div(a.rows, ROWS_PER_TASK), [&](i64 task) {
    Scratch row_memory(round_up(N, W) + W);
    float* row = row_memory.data;
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    for (i64 r = task * ROWS_PER_TASK; r < min_of(a.rows, (task + 1) * ROWS_PER_TASK); r++) {
      const T *x = static_cast<const T*>(a.x) + r * N, *residual = static_cast<const T*>(a.residual) + r * N;
      T *out = static_cast<T*>(a.out) + r * N, *sum = static_cast<T*>(a.sum) + r * N;
      const bool add = a.residual != nullptr;
      const float mean = sum_over(N, [&](i64 j, i64 n) {
        vf value = load_upto(x + j, n);
        if (add) {
          value += load_upto(residual + j, n);
          store_upto(sum + j, value, n);
          value = load_upto(sum + j, n);  // what is normalised is the sum as it is stored: backward reads no other
        }
        store(row + j, value);
        return value;
      }) / float(N);
      const float variance = sum_over(N, [&](i64 j, i64 n) {
        const vf d = first_lanes(load(row + j) - mean, n);
        return d * d;
      }) / float(N);
      const float rstd = 1.0f / ::sqrtf(variance + a.eps);
      for (i64 j = 0; j < N; j += W) {
        const i64 n = min_of<i64>(W, N - j);
        vf y = (load(row + j) - mean) * rstd * load_upto(weight + j, n);
        if (bias) y += load_upto(bias + j, n);
        store_upto(out + j, y, n);
      }
      a.mean[r] = mean;
      a.rstd[r] = rstd;
    }
  });
}

void layer_norm(const LayerNormArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? layer_norm_as<float>(a, threads) : layer_norm_as<bfloat16>(a, threads);
}

template <class T>
void layer_norm_backward_as(const LayerNormArgs& a, const Threads& threads) {
  const i64 N = a.N, stride = round_up(max_of<i64>(1, N), W);
  const i64 run = max_of(ROWS_PER_TASK, ceil_div(a.rows, 64)), runs = ceil_div(a.rows, run);
  Scratch partials(runs * 2 * stride + 1);
  const T* weight = static_cast<const T*>(a.weight);
  for_each_task(threads, runs, [&](i64 task) {
    float *dweight = partials.data + task * 2 * stride, *dbias = dweight + stride;
    memset(dweight, 0, size_t(2 * stride) * sizeof(float));
    for (i64 r = task * run; r < min_of(a.rows, (task + 1) * run); r++) {
      const T *x = static_cast<const T*>(a.x) + r * N, *grad = static_cast<const T*>(a.grad_out) + r * N;
      const T* grad_sum = static_cast<const T*>(a.grad_sum) + r * N;
      T* dx = static_cast<T*>(a.dx) + r * N;
      const float mean = a.mean[r], rstd = a.rstd[r];
      // Beyond the last element grad is read as 0, so x - mean does no harm there.
      const float mean_dy = sum_over(N, [&](i64 j, i64 n) { return load_upto(grad + j, n) * load_upto(weight + j, n); }) / float(N);
      const float mean_dy_xhat = sum_over(N, [&](i64 j, i64 n) {
        const vf dy = load_upto(grad + j, n), xhat = (load_upto(x + j, n) - mean) * rstd;
        store(dweight + j, load(dweight + j) + dy * xhat);
        store(dbias + j, load(dbias + j) + dy);
        return dy * load_upto(weight + j, n) * xhat;
      }) / float(N);
      for (i64 j = 0; j < N; j += W) {
        const i64 n = min_of<i64>(W, N - j);
        const vf xhat = (load_upto(x + j, n) - mean) * rstd;
        vf d = rstd * (load_upto(grad + j, n) * load_upto(weight + j, n) - mean_dy - xhat * mean_dy_xhat);
        if (a.grad_sum) d += load_upto(grad_sum + j, n);
        store_upto(dx + j, d, n);
      }
    }
  });
  constexpr i64 COLUMNS = 4 * W;
  for_each_task(threads, ceil_div(N, COLUMNS), [&](i64 task) {
    for (i64 j = task * COLUMNS; j < min_of(N, (task + 1) * COLUMNS); j += W) {
      const i64 n = min_of<i64>(W, N - j);
      vf dweight = zeros(), dbias = zeros();
      for (i64 i = 0; i < runs; i++) {
        dweight += load(partials.data + i * 2 * stride + j);
        dbias += load(partials.data + i * 2 * stride + stride + j);
      }
      store_upto(static_cast<T*>(a.dweight) + j, dweight, n);
      store_upto(static_cast<T*>(a.dbias) + j, dbias, n);
    }
  });
}

void layer_norm_backward(const LayerNormArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? layer_norm_backward_as<float>(a, threads) : layer_norm_backward_as<bfloat16>(a, threads);
}
