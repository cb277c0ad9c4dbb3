// out (M, N) = act(gate) * up, gate = x Wg^T + bg, up = x Wu^T + bu, for x (M, K), Wg and Wu (N, K), and its gradients. With
//
//   dgate = grad_out * up * act'(gate)      dup = grad_out * act(gate)      (M, N) each
//
//   dx (M, K) = dgate Wg + dup Wu      dWg (N, K) = dgate^T x      dbg (N) = sum of dgate's rows      dWu, dbu likewise
//
// Both products are one pass over x, whose epilogue works on the float32 sums: gate and up are rounded only
// where they are saved for backward.

template <class T, class Act>
void finish_gated_tile(const GatedLinearArgs& a, i64 m0, i64 n0, i64 rows, i64 columns, const float* gate_tile,
                       const float* up_tile, i64 tile_row) {
  const auto plus_bias = [&](int i, const float* from, i64 j, i64 n) {
    const vf p = load_upto(from + j, n);
    return a.bias[i] ? p + load_upto(static_cast<const T*>(a.bias[i]) + n0 + j, n) : p;
  };
  for (i64 r = 0; r < rows; r++, gate_tile += tile_row, up_tile += tile_row) {
    const i64 at = (m0 + r) * a.N + n0;
    for (i64 j = 0; j < columns; j += W) {
      const i64 n = columns - j;
      const vf gate = plus_bias(0, gate_tile, j, n), up = plus_bias(1, up_tile, j, n);
      if (a.product[0]) {
        store_upto(static_cast<T*>(a.product[0]) + at + j, gate, n);
        store_upto(static_cast<T*>(a.product[1]) + at + j, up, n);
      }
      store_upto(static_cast<T*>(a.out) + at + j, Act::value(gate) * up, n);
    }
  }
}

template <class T>
void gated_linear_as(const GatedLinearArgs& a, const Threads& threads) {
  const auto finish_this = with_activation(a.activation, [](auto act) { return finish_gated_tile<T, decltype(act)>; });
  const Matrix weights[2] = {{a.dtype, a.weight[0], 1, a.K}, {a.dtype, a.weight[1], 1, a.K}};
  matmul_all(a.M, a.N, a.K, Matrix{a.dtype, a.x, a.K, 1}, weights, threads,
             [&](i64 m0, i64 n0, i64 rows, i64 columns, const float* const(&tiles)[2], i64 tile_row) {
               finish_this(a, m0, n0, rows, columns, tiles[0], tiles[1], tile_row);
             });
}

void gated_linear(const GatedLinearArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? gated_linear_as<float>(a, threads) : gated_linear_as<bfloat16>(a, threads);
}

// dgate and dup (M, N), in the tensors' own type, so that bfloat16 products stay bfloat16.
template <class T, class Act>
void gated_slopes(const GatedLinearArgs& a, T* dgate, T* dup, const Threads& threads) {
  const T *grad = static_cast<const T*>(a.grad_out), *gate = static_cast<const T*>(a.product[0]);
  const T* up = static_cast<const T*>(a.product[1]);
  const i64 elements = a.M * a.N;
  for_each_task(threads, ceil_div(elements, ELEMENTS_PER_TASK), [&](i64 task) {
    const i64 end = min_of(elements, (task + 1) * ELEMENTS_PER_TASK);
    for (i64 i = task * ELEMENTS_PER_TASK; i < end; i += W) {
      const i64 n = end - i;
      const vf g = load_upto(grad + i, n), x = load_upto(gate + i, n);
      store_upto(dgate + i, g * load_upto(up + i, n) * Act::slope(x), n);
      store_upto(dup + i, g * Act::value(x), n);
    }
  });
}

template <class T>
void gated_linear_backward_as(const GatedLinearArgs& a, const Threads& threads) {
  const i64 M = a.M, N = a.N, K = a.K;
  constexpr bool IN_PLACE = sizeof(T) == sizeof(float);
  Scratch memory(2 * M * N), first(a.dx && !IN_PLACE ? M * K : 1);
  T* d[2] = {reinterpret_cast<T*>(memory.data), reinterpret_cast<T*>(memory.data) + M * N};
  with_activation(a.activation, [&](auto act) { gated_slopes<T, decltype(act)>(a, d[0], d[1], threads); });

  if (a.dx) {  // the first product waits in float32 for the second
    float* sums = IN_PLACE ? static_cast<float*>(a.dx) : first.data;
    matmul(M, K, N, Matrix{a.dtype, d[0], N, 1}, Matrix{a.dtype, a.weight[0], K, 1}, threads, StoreTile<float>{sums, K});
    T* dx = static_cast<T*>(a.dx);
    matmul(M, K, N, Matrix{a.dtype, d[1], N, 1}, Matrix{a.dtype, a.weight[1], K, 1}, threads,
           [&](i64 m0, i64 n0, i64 rows, i64 columns, const float* tile, i64 tile_row) {
             for (i64 r = 0; r < rows; r++)
               for (i64 j = 0; j < columns; j += W) {
                 const i64 at = (m0 + r) * K + n0 + j, n = columns - j;
                 store_upto(dx + at, load_upto(sums + at, n) + load_upto(tile + r * tile_row + j, n), n);
               }
           });
  }
  for (int i = 0; i < 2; i++) {
    if (a.dweight[i])
      matmul(N, K, M, Matrix{a.dtype, d[i], 1, N}, Matrix{a.dtype, a.x, K, 1}, threads,
             StoreTile<T>{static_cast<T*>(a.dweight[i]), K});
    if (a.dbias[i]) sum_rows(d[i], M, N, static_cast<T*>(a.dbias[i]), threads);
  }
}

void gated_linear_backward(const GatedLinearArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? gated_linear_backward_as<float>(a, threads) : gated_linear_backward_as<bfloat16>(a, threads);
}
