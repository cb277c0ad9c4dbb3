// The language-model head and its loss in one: logits = hidden (rows, K) W^T, W (V, K); for each row whose target
// counts
//
//   lse = log sum over v of exp(logits[v]),   loss = mean of (lse - logits[target])
//   dlogits = (exp(logits - lse) - onehot(target)) * grad_loss / rows counted
//   dhidden = dlogits W,   dW = dlogits^T hidden
//
// Forward: the logits live only in the tiles of the matrix product; each finished tile leaves a maximum, a sum of
// exponentials and, where it holds the target, the target's logit. These are merged per row in the order of the
// columns. Backward: the vocabulary in blocks, each recomputed for every row at once, so that dW's block is complete
// and rounded once, and dhidden accumulates in float32. The widest thing ever held is (rows, block), about 16 MiB.

struct Partial {
  float max, sum;
};

constexpr i64 VOCABULARY_BLOCK = TILE_MULTIPLE;  // columns per partial: every tile of the product is a whole number of these

template <class T>
void cross_entropy_as(const CrossEntropyArgs& a, const Threads& threads) {
  const i64 blocks = max_of<i64>(1, ceil_div(a.V, VOCABULARY_BLOCK));
  Scratch partial_memory(a.rows * blocks * 2 + 1), target_logit(a.rows + 1);
  Partial* partials = reinterpret_cast<Partial*>(partial_memory.data);
  matmul(a.rows, a.V, a.K, Matrix{a.dtype, a.hidden, a.K, 1}, Matrix{a.dtype, a.weight, 1, a.K}, threads,
         [&](i64 m0, i64 n0, i64 rows, i64 columns, const float* tile, i64 tile_row) {
           for (i64 r = 0; r < rows; r++) {
             const float* logits = tile + r * tile_row;
             const i64 target = a.targets[m0 + r] - n0;
             if (target >= 0 && target < columns) target_logit.data[m0 + r] = logits[target];
             for (i64 c0 = 0; c0 < columns; c0 += VOCABULARY_BLOCK) {
               const i64 end = min_of(columns, c0 + VOCABULARY_BLOCK);
               vf high = splat(-INFINITY), sum = zeros();
               i64 j = c0;
               for (; j + W <= end; j += W) high = vmax(load(logits + j), high);
               float top = max_lanes(high);
               for (i64 i = j; i < end; i++) top = max_of(top, logits[i]);
               const float pivot = top == -INFINITY ? 0.0f : top;
               for (j = c0; j < end; j += W) {
                 const i64 n = min_of<i64>(W, end - j);
                 const vf e = exp(load_upto(logits + j, n) - pivot);
                 sum += n < W ? (lane_index() < splat_int(int32_t(n)) ? e : zeros()) : e;
               }
               partials[(m0 + r) * blocks + (n0 + c0) / VOCABULARY_BLOCK] = Partial{top, sum_lanes(sum)};
             }
           }
         });
  double total = 0.0;
  i64 counted = 0;
  for_each_task(threads, ceil_div(a.rows, 16), [&](i64 task) {
    for (i64 row = task * 16; row < min_of(a.rows, task * 16 + 16); row++) {
      const Partial* p = partials + row * blocks;
      float top = -INFINITY, sum = 0.0f;
      if (a.V > 0) {
        for (i64 i = 0; i < blocks; i++) top = max_of(top, p[i].max);
        const float pivot = top == -INFINITY ? 0.0f : top;
        for (i64 i = 0; i < blocks; i++) sum += p[i].sum * ::expf(p[i].max - pivot);
      }
      a.lse[row] = top + ::logf(sum);
    }
  });
  for (i64 row = 0; row < a.rows; row++)
    if (a.targets[row] != a.ignore_index) {
      total += double(a.lse[row]) - double(target_logit.data[row]);
      counted++;
    }
  *a.loss = counted ? float(total / double(counted)) : NAN;
}

void cross_entropy(const CrossEntropyArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? cross_entropy_as<float>(a, threads) : cross_entropy_as<bfloat16>(a, threads);
}

template <class T>
void cross_entropy_backward_as(const CrossEntropyArgs& a, const Threads& threads) {
  const i64 rows = a.rows, V = a.V, K = a.K;
  i64 counted = 0;
  for (i64 row = 0; row < rows; row++) counted += a.targets[row] != a.ignore_index;
  const float share = counted ? *a.grad_loss / float(counted) : 0.0f;

  const i64 affordable = (i64{4} << 20) / max_of<i64>(1, rows) / 64 * 64;
  const i64 block = min_of(max_of<i64>(64, min_of<i64>(4096, affordable)), round_up(max_of<i64>(1, V), 64));
  Scratch dlogits_memory(rows * block + 1), dhidden(rows * K + 1);
  T* dlogits = reinterpret_cast<T*>(dlogits_memory.data);  // in the tensors' own type, so that bfloat16 products stay so
  memset(dhidden.data, 0, size_t(rows * K) * sizeof(float));
  const T* weight = static_cast<const T*>(a.weight);

  for (i64 v0 = 0; v0 < V; v0 += block) {
    const i64 columns_now = min_of(block, V - v0);
    matmul(rows, columns_now, K, Matrix{a.dtype, a.hidden, K, 1}, Matrix{a.dtype, weight + v0 * K, 1, K}, threads,
           [&](i64 m0, i64 n0, i64 tile_rows, i64 columns, const float* tile, i64 tile_row) {
             for (i64 r = 0; r < tile_rows; r++) {
               T* out = dlogits + (m0 + r) * block + n0;
               const i64 target = a.targets[m0 + r];
               if (target == a.ignore_index) {
                 memset(out, 0, size_t(columns) * sizeof(T));
                 continue;
               }
               const float lse = a.lse[m0 + r];
               for (i64 j = 0; j < columns; j += W) {
                 const i64 n = min_of<i64>(W, columns - j);
                 store_upto(out + j, exp(load_upto(tile + r * tile_row + j, n) - lse) * share, n);
               }
               const i64 at = target - v0 - n0;
               if (at >= 0 && at < columns) {
                 // p - 1 from the logit itself: near p = 1 the difference would cancel
                 from_float(share * ::expm1f(tile[r * tile_row + at] - lse), out + at);
               }
             }
           });
    if (a.dweight)
      matmul(columns_now, K, rows, Matrix{a.dtype, dlogits, 1, block}, Matrix{a.dtype, a.hidden, K, 1}, threads,
             StoreTile<T>{static_cast<T*>(a.dweight) + v0 * K, K});
    matmul(rows, K, columns_now, Matrix{a.dtype, dlogits, block, 1}, Matrix{a.dtype, weight + v0 * K, K, 1}, threads,
           [&](i64 m0, i64 n0, i64 tile_rows, i64 columns, const float* tile, i64 tile_row) {
             for (i64 r = 0; r < tile_rows; r++)
               for (i64 j = 0; j < columns; j += W) {
                 const i64 n = min_of<i64>(W, columns - j);
                 float* sum = dhidden.data + (m0 + r) * K + n0 + j;
                 store_upto(sum, load_upto(sum, n) + load_upto(tile + r * tile_row + j, n), n);
               }
           });
  }
  const float* from = dhidden.data;
  T* to = static_cast<T*>(a.dhidden);
  for_each_task(threads, ceil_div(rows * K, ELEMENTS_PER_TASK), [&](i64 task) {
    const i64 end = min_of(rows * K, (task + 1) * ELEMENTS_PER_TASK);
    for (i64 i = task * ELEMENTS_PER_TASK; i < end; i += W) {
      const i64 n = min_of<i64>(W, end - i);
      store_upto(to + i, load_upto(from + i, n), n);
    }
  });
}

void cross_entropy_backward(const CrossEntropyArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? cross_entropy_backward_as<float>(a, threads) : cross_entropy_backward_as<bfloat16>(a, threads);
}
