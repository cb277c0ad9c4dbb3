// What this CPU can do at most, for benchmarks to state their figures against: reading memory, and sums of products by
// the instruction that the kernels of each format are made of. Only the loops are here; the caller takes the time.

// Every vector of the memory goes into one of the sums, so that nothing read can be left out and no load waits for the
// one before. Four places of a chunk are read at once: a core fetches ahead on each of them, and so more in all.
uint64_t limit_read(const void* memory, i64 bytes, const Threads& threads) {
  constexpr i64 STREAMS = 4, UNROLL = 2, STREAM = LIMIT_READ_CHUNK / STREAMS, VECTOR = sizeof(vf);
  uint64_t checksum = 0;
  for_each_task(threads, bytes / LIMIT_READ_CHUNK, [&](i64 task) {
    const char* chunk = static_cast<const char*>(memory) + task * LIMIT_READ_CHUNK;
    vu sums[STREAMS * UNROLL] = {};
    for (i64 at = 0; at < STREAM; at += UNROLL * VECTOR)
#pragma GCC unroll 8
      for (i64 i = 0; i < STREAMS * UNROLL; i++)
        sums[i] += (vu)load(reinterpret_cast<const float*>(chunk + i / UNROLL * STREAM + at + i % UNROLL * VECTOR));
    uint64_t sum = 0;
    for (const vu& part : sums)
      for (int lane = 0; lane < W; lane++) sum += part[lane];
    __atomic_fetch_add(&checksum, sum, __ATOMIC_RELAXED);
  });
  return checksum;
}

// Twelve chains of sums: more than latency times units is on any CPU, and few enough for the registers of all. The
// caller's `step` must need the sum it is given; otherwise the compiler would take the product out of the loop.
template <class Step>
LLMFAST_INLINE void run_chains(i64 rounds, Step step) {
  constexpr int CHAINS = LIMIT_CHAINS;
  vf sums[CHAINS];
#pragma GCC unroll 12
  for (int c = 0; c < CHAINS; c++) sums[c] = splat(float(c));
  for (i64 round = 0; round < rounds; round++)
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) sums[c] = step(sums[c]);
  float used[CHAINS * W];
  for (int c = 0; c < CHAINS; c++) store(used + c * W, sums[c]);
  asm volatile("" : : "r"(used) : "memory");
}

#if LLMFAST_TILE_REGISTERS
// Four tiles of sums, as the products have them.
template <class Product>
LLMFAST_INLINE void run_tile_chains(i64 rounds) {
  shape_tiles(TILE_UNITS, TILE_UNITS);
  const float zeros[TILE_UNITS * TILE_UNITS] = {};
  tile_load<0>(zeros, 64), tile_load<1>(zeros, 64), tile_load<2>(zeros, 64), tile_load<3>(zeros, 64);
  tile_load<4>(zeros, 64), tile_load<5>(zeros, 64), tile_load<6>(zeros, 64), tile_load<7>(zeros, 64);
  for (i64 round = 0; round < rounds; round++)
    for (int chain = 0; chain < LIMIT_CHAINS; chain += 4) {
      Product::template add<0, 4, 6>();
      Product::template add<1, 4, 7>();
      Product::template add<2, 5, 6>();
      Product::template add<3, 5, 7>();
    }
  asm volatile("tilerelease" : : : "memory");
}
#endif

// The operations of `tasks` times `rounds` rounds; 0, and nothing done, where the instruction set has no instruction.
i64 limit_arithmetic(LimitKind kind, i64 tasks, i64 rounds, const Threads& threads) {
  i64 operations = 0;  // of one vector instruction: a product and a sum for each pair of numbers
  switch (kind) {
    case LimitKind::f32:
      operations = 2 * W;
      for_each_task(threads, tasks, [=](i64) {
        vf factor = splat(0.5f), addend = splat(1.0f);
        asm("" : "+m"(factor), "+m"(addend));  // unknown to the compiler from here on
        run_chains(rounds, [=](vf sum) { return sum * factor + addend; });
      });
      break;
    case LimitKind::bf16:
#if LLMFAST_TILE_REGISTERS
      operations = 4 * TILE_UNITS * TILE_UNITS * TILE_UNITS;
      for_each_task(threads, tasks, [=](i64) { run_tile_chains<BF16Tiles>(rounds); });
#elif LLMFAST_BF16_DOT
      operations = 4 * W;
      for_each_task(threads, tasks, [=](i64) {
        const __m512bh ones = (__m512bh)splat_int(0x3f803f80);
        run_chains(rounds, [=](vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, ones, ones); });
      });
#endif
      break;
    case LimitKind::i8:
#if LLMFAST_TILE_REGISTERS
      operations = 8 * TILE_UNITS * TILE_UNITS * TILE_UNITS;
      for_each_task(threads, tasks, [=](i64) { run_tile_chains<ByteTiles>(rounds); });
#elif LLMFAST_INT8_DOT
      operations = 8 * W;
      for_each_task(threads, tasks, [=](i64) {
        const __m512i ones = (__m512i)splat_int(0x01010101);
        run_chains(rounds, [=](vf sum) { return (vf)_mm512_dpbusd_epi32((__m512i)sum, ones, ones); });
      });
#endif
      break;
  }
  return tasks * rounds * LIMIT_CHAINS * operations;
}
