// out (M, N) = act(x (M, K) W^T + b), W (N, K), and its gradients. With p = x W^T + b and g = grad_out * act'(p), all
// (M, N):
//
//   dx (M, K) = g W      dW (N, K) = g^T x      db (N) = sum of g's rows
//
// Bias and activation run in the epilogue of the matrix product, on the float32 sums, before the one rounding. Threads
// share the products as matmul.inl says; db is summed by blocks of columns, each from the first row to the last.

template <class T>
void linear_as(const LinearArgs& a, const Threads& threads) {
  const T* bias = static_cast<const T*>(a.bias);
  T *out = static_cast<T*>(a.out), *preactivation = static_cast<T*>(a.preactivation);
  matmul(a.M, a.N, a.K, Matrix{a.dtype, a.x, a.K, 1}, Matrix{a.dtype, a.weight, 1, a.K}, threads,
         [&](i64 m0, i64 n0, i64 rows, i64 columns, const float* tile, i64 tile_row) {
           for (i64 r = 0; r < rows; r++)
             for (i64 j = 0; j < columns; j += W) {
               const i64 n = min_of<i64>(W, columns - j), at = (m0 + r) * a.N + n0 + j;
               vf p = load_upto(tile + r * tile_row + j, n);
               if (bias) p += load_upto(bias + n0 + j, n);
               if (preactivation) store_upto(preactivation + at, p, n);
               store_upto(out + at, activate(a.activation, p), n);
             }
         });
}

void linear(const LinearArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? linear_as<float>(a, threads) : linear_as<bfloat16>(a, threads);
}

// Stores a finished tile into a row-major matrix of type T.
template <class T>
struct StoreTile {
  T* out;
  i64 row;
  void operator()(i64 m0, i64 n0, i64 rows, i64 columns, const float* tile, i64 tile_row) const {
    for (i64 r = 0; r < rows; r++)
      for (i64 j = 0; j < columns; j += W) {
        const i64 n = min_of<i64>(W, columns - j);
        store_upto(out + (m0 + r) * row + n0 + j, load_upto(tile + r * tile_row + j, n), n);
      }
  }
};

template <class T>
void linear_backward_as(const LinearArgs& a, const Threads& threads) {
  const i64 M = a.M, N = a.N, K = a.K;
  // Where an activation changes it g is kept in the tensors' own type, so that bfloat16 products stay bfloat16.
  const bool plain = a.activation == Activation::none;
  Scratch memory(plain ? 1 : M * N);
  T* changed = reinterpret_cast<T*>(memory.data);
  if (!plain) {
    const T *grad = static_cast<const T*>(a.grad_out), *p = static_cast<const T*>(a.preactivation);
    for_each_task(threads, ceil_div(M * N, ELEMENTS_PER_TASK), [&](i64 task) {
      const i64 end = min_of(M * N, (task + 1) * ELEMENTS_PER_TASK);
      for (i64 i = task * ELEMENTS_PER_TASK; i < end; i += W) {
        const i64 n = min_of<i64>(W, end - i);
        store_upto(changed + i, load_upto(grad + i, n) * activation_slope(a.activation, load_upto(p + i, n)), n);
      }
    });
  }
  const T* g = plain ? static_cast<const T*>(a.grad_out) : changed;

  if (a.dx)
    matmul(M, K, N, Matrix{a.dtype, g, N, 1}, Matrix{a.dtype, a.weight, K, 1}, threads, StoreTile<T>{static_cast<T*>(a.dx), K});
  if (a.dweight)
    matmul(N, K, M, Matrix{a.dtype, g, 1, N}, Matrix{a.dtype, a.x, K, 1}, threads, StoreTile<T>{static_cast<T*>(a.dweight), K});
  if (a.dbias) {
    constexpr i64 COLUMNS = 4 * W, RUN = 64;  // short runs of rows first, so that the rounding of long sums stays small
    for_each_task(threads, ceil_div(N, COLUMNS), [&](i64 task) {
      for (i64 j = task * COLUMNS; j < min_of(N, (task + 1) * COLUMNS); j += W) {
        const i64 n = min_of<i64>(W, N - j);
        vf sum = zeros();
        for (i64 m0 = 0; m0 < M; m0 += RUN) {
          vf run = zeros();
          for (i64 m = m0; m < min_of(M, m0 + RUN); m++) run += load_upto(g + m * N + j, n);
          sum += run;
        }
        store_upto(static_cast<T*>(a.dbias) + j, sum, n);
      }
    });
  }
}

void linear_backward(const LinearArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? linear_backward_as<float>(a, threads) : linear_backward_as<bfloat16>(a, threads);
}
