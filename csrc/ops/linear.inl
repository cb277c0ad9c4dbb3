// out (M, N) = act(x (M, K) W^T + b), W (N, K), and its gradients. With p = x W^T + b and g = grad_out * act'(p), all
// (M, N):
//
//   dx (M, K) = g W      dW (N, K) = g^T x      db (N) = sum of g's rows
//
// Bias and activation run in the epilogue of the matrix product, on the float32 sums, before the one rounding. Threads
// share the products as matmul.inl says; db is summed by blocks of columns, each from the first row to the last.

// Turns n <= W sums of row m, from column `at` on, into results.
template <class T, class Act>
LLMFAST_INLINE void finish(const LinearArgs& a, i64 m, i64 at, const float* sums, i64 n) {
  vf p = load_upto(sums, n);
  if (a.bias) p += load_upto(static_cast<const T*>(a.bias) + at, n);
  if (a.preactivation) store_upto(static_cast<T*>(a.preactivation) + m * a.N + at, p, n);
  store_upto(static_cast<T*>(a.out) + m * a.N + at, Act::value(p), n);
}

template <class T, class Act>
void finish_tile(const LinearArgs& a, i64 m0, i64 n0, i64 rows, i64 columns, const float* tile, i64 tile_row) {
  for (i64 r = 0; r < rows; r++, tile += tile_row) {
    i64 j = 0;
    for (; j + W <= columns; j += W) finish<T, Act>(a, m0 + r, n0 + j, tile + j, W);
    if (j < columns) finish<T, Act>(a, m0 + r, n0 + j, tile + j, columns - j);
  }
}

template <class T>
void linear_as(const LinearArgs& a, const Threads& threads) {
  const auto finish_this = with_activation(a.activation, [](auto act) { return finish_tile<T, decltype(act)>; });
  matmul(a.M, a.N, a.K, Matrix{a.dtype, a.x, a.K, 1}, Matrix{a.dtype, a.weight, 1, a.K}, threads,
         [&](i64 m0, i64 n0, i64 rows, i64 columns, const float* tile, i64 tile_row) {
           finish_this(a, m0, n0, rows, columns, tile, tile_row);
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
    for (i64 r = 0; r < rows; r++, tile += tile_row) {
      T* to = out + (m0 + r) * row + n0;
      i64 j = 0;
      for (; j + W <= columns; j += W) store(to + j, load(tile + j));
      if (j < columns) store_n(to + j, load_n(tile + j, columns - j), columns - j);
    }
  }
};

// out (N) = the sum of the rows of g (M, N).
template <class T>
void sum_rows(const T* g, i64 M, i64 N, T* out, const Threads& threads) {
  constexpr i64 VECTORS = 4, COLUMNS = VECTORS * W;
  constexpr i64 RUN = 64;  // short runs of rows first, so that the rounding of long sums stays small
  for_each_task(threads, ceil_div(N, COLUMNS), [&](i64 task) {
    const i64 j = task * COLUMNS, n = min_of(COLUMNS, N - j);
    const auto part = [&](const T* row, int v) { return load_upto(row + v * W, n - v * W); };
    vf sum[VECTORS] = {};
    for (i64 m0 = 0; m0 < M; m0 += RUN) {
      vf run[VECTORS] = {};
      for (i64 m = m0; m < min_of(M, m0 + RUN); m++)
        for (int v = 0; v < VECTORS; v++) run[v] += part(g + m * N + j, v);
      for (int v = 0; v < VECTORS; v++) sum[v] += run[v];
    }
    for (int v = 0; v < VECTORS; v++) store_upto(out + j + v * W, sum[v], n - v * W);
  });
}

template <class T>
void linear_backward_as(const LinearArgs& a, const Threads& threads) {
  const i64 M = a.M, N = a.N, K = a.K;
  // Where an activation changes it g is kept in the tensors' own type, so that bfloat16 products stay bfloat16.
  const bool plain = a.activation == Activation::none;
  Scratch memory(plain ? 1 : M * N);
  T* changed = reinterpret_cast<T*>(memory.data);
  if (!plain) {
    const T *grad = static_cast<const T*>(a.grad_out), *p = static_cast<const T*>(a.preactivation);
    with_activation(a.activation, [&](auto act) {
      map_elements(p, grad, changed, M * N, threads, [](vf x, vf g) { return g * decltype(act)::slope(x); });
    });
  }
  const T* g = plain ? static_cast<const T*>(a.grad_out) : changed;

  if (a.dx)
    matmul(M, K, N, Matrix{a.dtype, g, N, 1}, Matrix{a.dtype, a.weight, K, 1}, threads,
           StoreTile<T>{static_cast<T*>(a.dx), K});
  if (a.dweight)
    matmul(N, K, M, Matrix{a.dtype, g, 1, N}, Matrix{a.dtype, a.x, K, 1}, threads,
           StoreTile<T>{static_cast<T*>(a.dweight), K});
  if (a.dbias) sum_rows(g, M, N, static_cast<T*>(a.dbias), threads);
}

void linear_backward(const LinearArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? linear_backward_as<float>(a, threads) : linear_backward_as<bfloat16>(a, threads);
}
