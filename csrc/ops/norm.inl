// LayerNorm and the RMS norm over the last dimension, x (rows, N), optionally of x + residual:
//
//   LayerNorm   xhat = (x - mean) * rstd,   out = xhat * weight + bias,   rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//   RMS norm    xhat = x * rstd,            out = xhat * weight,          rstd = 1 / sqrt(mean(x^2) + eps)
//
//   dx = rstd * (dy w - mean(dy w) - xhat * mean(dy w xhat)), in the RMS norm without mean(dy w)
//   dweight = sum of dy xhat,   dbias = sum of dy over the rows
//
// A row is read once (float32 stays in the first cache as it is, bfloat16 as a copy in float32), then summed, LayerNorm's
// twice: the variance from differences to the mean, which never cancels. Threads take runs of rows. Backward takes four
// rows at a time, so that the partial sums of dweight and dbias are read and written once for four; there is one of each a
// run, added up afterwards in the order of the runs, which depend on the number of rows alone.

constexpr i64 ROWS_PER_TASK = 16, ELEMENTS_PER_NORM_TASK = 8192;

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

// The sums of both vectors of f(j, n), which takes two sums along with one reading.
struct Two {
  vf first, second;
};
template <class F>
LLMFAST_INLINE void sum_two_over(i64 N, const F& f, float* first, float* second) {
  Two even = {zeros(), zeros()}, odd = even;
  const auto add = [](Two& to, const Two& a) {
    to.first += a.first;
    to.second += a.second;
  };
  i64 j = 0;
  for (; j + 2 * W <= N; j += 2 * W) {
    add(even, f(j, W));
    add(odd, f(j + W, W));
  }
  for (; j < N; j += W) add(even, f(j, min_of<i64>(W, N - j)));
  *first = sum_lanes(even.first + odd.first);
  *second = sum_lanes(even.second + odd.second);
}

// f(j, n) for a row's vectors: n elements from j on.
template <class F>
LLMFAST_INLINE void for_each_vector(i64 N, const F& f) {
  i64 j = 0;
  for (; j + W <= N; j += W) f(j, W);
  if (j < N) f(j, N - j);
}

// The first n lanes of a, and `rest` in the others.
LLMFAST_INLINE vf first_lanes(vf a, i64 n, vf rest = zeros()) {
  return n >= W ? a : (lane_index() < splat_int(int32_t(n)) ? a : rest);
}

template <class T, bool CENTRED>
void norm_as(const NormArgs& a, const Threads& threads) {
  constexpr bool IN_PLACE = sizeof(T) == sizeof(float);
  const i64 N = a.N, rows_per_task = max_of(ROWS_PER_TASK, ELEMENTS_PER_NORM_TASK / max_of<i64>(1, N));
  for_each_task(threads, ceil_div(a.rows, rows_per_task), [&](i64 task) {
    Scratch row_memory(IN_PLACE ? 1 : round_up(N, W) + W);
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    const bool add = a.residual != nullptr;
    for (i64 r = task * rows_per_task; r < min_of(a.rows, (task + 1) * rows_per_task); r++) {
      const T *x = static_cast<const T*>(a.x) + r * N, *residual = static_cast<const T*>(a.residual) + r * N;
      T *out = static_cast<T*>(a.out) + r * N, *sum = static_cast<T*>(a.sum) + r * N;
      const float* row = IN_PLACE ? reinterpret_cast<const float*>(add ? sum : x) : row_memory.data;
      // the sum of x, or of its squares
      const float first =
          sum_over(N,
                   [&](i64 j, i64 n) {
                     vf value = load_upto(x + j, n);
                     if (add) {
                       value += load_upto(residual + j, n);
                       store_upto(sum + j, value, n);
                       if (!IN_PLACE)
                         value = load_upto(sum + j, n);  // what is normalised is the sum as it is stored: so does backward
                     }
                     if (!IN_PLACE) store(row_memory.data + j, value);
                     return CENTRED ? value : value * value;
                   }) /
          float(N);
      const float mean = CENTRED ? first : 0.0f;
      const float variance = CENTRED ? sum_over(N,
                                                [&](i64 j, i64 n) {
                                                  const vf d = first_lanes(load_upto(row + j, n) - mean, n);
                                                  return d * d;
                                                }) /
                                           float(N)
                                     : first;
      const float rstd = 1.0f / ::sqrtf(variance + a.eps);
      for_each_vector(N, [&](i64 j, i64 n) {
        vf y = (load_upto(row + j, n) - mean) * rstd * load_upto(weight + j, n);
        if (bias) y += load_upto(bias + j, n);
        store_upto(out + j, y, n);
      });
      if (CENTRED) a.mean[r] = mean;
      a.rstd[r] = rstd;
    }
  });
}

// Backward of ROWS rows from r on; their dweight and dbias are added to the partial sums.
template <class T, bool CENTRED, int ROWS>
LLMFAST_INLINE void norm_backward_rows(const NormArgs& a, i64 r, float* dweight, float* dbias) {
  const i64 N = a.N;
  const T *x = static_cast<const T*>(a.x) + r * N, *grad = static_cast<const T*>(a.grad_out) + r * N;
  const T *grad_sum = static_cast<const T*>(a.grad_sum) + r * N, *weight = static_cast<const T*>(a.weight);
  T* dx = static_cast<T*>(a.dx) + r * N;
  float mean[ROWS], rstd[ROWS], mean_dy[ROWS], mean_dy_xhat[ROWS];
  for (int i = 0; i < ROWS; i++) {
    mean[i] = CENTRED ? a.mean[r + i] : 0.0f;
    rstd[i] = a.rstd[r + i];
    // Beyond the last element grad is read as 0, so x - mean does no harm there.
    sum_two_over(
        N,
        [&](i64 j, i64 n) {
          const vf dy = load_upto(grad + i * N + j, n) * load_upto(weight + j, n);
          return Two{dy, dy * (load_upto(x + i * N + j, n) - mean[i])};
        },
        &mean_dy[i], &mean_dy_xhat[i]);
    mean_dy[i] = CENTRED ? mean_dy[i] / float(N) : 0.0f;
    mean_dy_xhat[i] *= rstd[i] / float(N);
  }
  for_each_vector(N, [&](i64 j, i64 n) {
    const vf w = load_upto(weight + j, n);
    vf sum_dy_xhat = zeros(), sum_dy = zeros();
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
      const vf dy = load_upto(grad + i * N + j, n), xhat = (load_upto(x + i * N + j, n) - mean[i]) * rstd[i];
      sum_dy_xhat += dy * xhat;
      sum_dy += dy;
      vf d = rstd[i] * (dy * w - mean_dy[i] - xhat * mean_dy_xhat[i]);
      if (a.grad_sum) d += load_upto(grad_sum + i * N + j, n);
      store_upto(dx + i * N + j, d, n);
    }
    store(dweight + j, load(dweight + j) + sum_dy_xhat);
    if (CENTRED) store(dbias + j, load(dbias + j) + sum_dy);
  });
}

template <class T, bool CENTRED>
void norm_backward_as(const NormArgs& a, const Threads& threads) {
  const i64 N = a.N, stride = round_up(max_of<i64>(1, N), W), sums = CENTRED ? 2 : 1;
  const i64 run = max_of(ROWS_PER_TASK, ceil_div(a.rows, 64)), runs = ceil_div(a.rows, run);
  Scratch partials(runs * sums * stride + 1);
  for_each_task(threads, runs, [&](i64 task) {
    float *dweight = partials.data + task * sums * stride, *dbias = dweight + stride;
    memset(dweight, 0, size_t(sums * stride) * sizeof(float));
    const i64 end = min_of(a.rows, (task + 1) * run);
    i64 r = task * run;
    for (; r + 4 <= end; r += 4) norm_backward_rows<T, CENTRED, 4>(a, r, dweight, dbias);
    for (; r < end; r++) norm_backward_rows<T, CENTRED, 1>(a, r, dweight, dbias);
  });
  constexpr i64 COLUMNS = 4 * W;
  for_each_task(threads, ceil_div(N, COLUMNS), [&](i64 task) {
    for (i64 j = task * COLUMNS; j < min_of(N, (task + 1) * COLUMNS); j += W) {
      const i64 n = min_of<i64>(W, N - j);
      vf dweight = zeros(), dbias = zeros();
      for (i64 i = 0; i < runs; i++) {
        dweight += load(partials.data + i * sums * stride + j);
        if (CENTRED) dbias += load(partials.data + i * sums * stride + stride + j);
      }
      store_upto(static_cast<T*>(a.dweight) + j, dweight, n);
      if (CENTRED) store_upto(static_cast<T*>(a.dbias) + j, dbias, n);
    }
  });
}

void layer_norm(const NormArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? norm_as<float, true>(a, threads) : norm_as<bfloat16, true>(a, threads);
}
void layer_norm_backward(const NormArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? norm_backward_as<float, true>(a, threads) : norm_backward_as<bfloat16, true>(a, threads);
}
void rms_norm(const NormArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? norm_as<float, false>(a, threads) : norm_as<bfloat16, false>(a, threads);
}
void rms_norm_backward(const NormArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? norm_backward_as<float, false>(a, threads) : norm_backward_as<bfloat16, false>(a, threads);
}
