// A step of the decoder is a row of phases; a phase is a number of chunks that may be done in any order, by any thread.
// Every thread walks through all phases, and a phase is over when its chunks are finished, not when the threads have
// arrived: one that lost its CPU holds nobody up.
//
//   take      every thread has a run of neighbouring chunks; when that is empty it takes from the others' runs
//   compute   into memory of its own
//   commit    one compare-and-swap; whoever wins writes the chunk's results, exactly once
//   wait      until all chunks are finished; a chunk that takes too long is computed again by whoever waits, and the
//             slower of the two loses the commit
//
// A thread that was away for long may still be reading memory that others have moved on to use for something else. It
// reads nonsense then, from valid addresses, and loses the commit. All words that decide anything carry the phase's tag,
// which only grows, so that an old claim on them fails.

constexpr int TAG_SHIFT = 24;
constexpr uint64_t VALUE_MASK = (uint64_t{1} << TAG_SHIFT) - 1;
LLMFAST_INLINE uint64_t tag_of(uint64_t word) { return word >> TAG_SHIFT; }
LLMFAST_INLINE i64 value_of(uint64_t word) { return i64(word & VALUE_MASK); }

LLMFAST_INLINE void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One thread on its way through a step.
struct Worker {
  DecoderState& d;
  const StepJob job;
  const Segment* segments;
  int index;
  uint64_t tag;  // of the phase it is at
};

// Wins or loses the right to write a chunk's results.
struct Commit {
  uint64_t* owner;
  uint64_t mine;
  bool won = false;
  bool operator()() {
    uint64_t expected = mine;
    return won = __atomic_compare_exchange_n(owner, &expected, mine | 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }
};

template <class F>
void attempt(Worker& w, i64 chunk, uint64_t seen, PhaseRun& run, const F& f) {
  uint64_t* owner = &w.d.owners[chunk];
  const uint64_t mine = w.tag << TAG_SHIFT | uint64_t(w.index) << 1;
  if (!__atomic_compare_exchange_n(owner, &seen, mine, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
  Commit commit{owner, mine};
  f(chunk, commit);
  if (!commit.won) return;
  uint64_t done = __atomic_load_n(&run.done, __ATOMIC_ACQUIRE), next;
  do {
    next = w.tag << TAG_SHIFT | uint64_t(tag_of(done) == w.tag ? value_of(done) + 1 : 1);
  } while (!__atomic_compare_exchange_n(&run.done, &done, next, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

// True when the phase this worker is at has long been finished by the others.
LLMFAST_INLINE bool is_over(const Worker& w) { return tag_of(__atomic_load_n(&w.d.runs[0].next, __ATOMIC_ACQUIRE)) > w.tag; }

// f(chunk, commit) computes a chunk, asks commit(), and if that says yes writes the results.
template <class F>
void phase(Worker& w, i64 chunks, const F& f) {
  const i64 runs = max_of<i64>(1, min_of<i64>(w.job.threads, chunks));
  const auto begin_of = [&](i64 r) { return chunks * r / runs; };
  for (i64 i = 0; i < runs; i++) {
    const i64 r = (w.index + i) % runs, end = begin_of(r + 1);
    PhaseRun& run = w.d.runs[r];
    uint64_t word = __atomic_load_n(&run.next, __ATOMIC_ACQUIRE);
    for (;;) {
      if (tag_of(word) > w.tag) {
        w.tag++;
        return;
      }
      const i64 chunk = tag_of(word) < w.tag ? begin_of(r) : value_of(word);
      if (chunk >= end) break;
      const uint64_t taken = w.tag << TAG_SHIFT | uint64_t(chunk + 1);
      if (!__atomic_compare_exchange_n(&run.next, &word, taken, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
      const uint64_t owner = __atomic_load_n(&w.d.owners[chunk], __ATOMIC_ACQUIRE);
      if (tag_of(owner) < w.tag) attempt(w, chunk, owner, run, f);
      word = __atomic_load_n(&run.next, __ATOMIC_ACQUIRE);
    }
  }
  // About 20 microseconds, a few chunks' time; long products have long chunks.
  const i64 patience = 400 * (w.job.rows <= 16 ? 1 : w.job.rows);
  for (i64 waited = 0;; waited++) {
    bool finished = true;
    for (i64 r = 0; r < runs && finished; r++) {
      const uint64_t done = __atomic_load_n(&w.d.runs[r].done, __ATOMIC_ACQUIRE);
      if (tag_of(done) > w.tag) break;  // over, and more
      finished = tag_of(done) == w.tag ? value_of(done) == begin_of(r + 1) - begin_of(r) : begin_of(r + 1) == begin_of(r);
    }
    if (finished) break;
    if (waited < patience) {
      spin_pause();
      continue;
    }
    bool redone = false;
    for (i64 r = 0; r < runs; r++)
      for (i64 chunk = begin_of(r); chunk < begin_of(r + 1); chunk++) {
        const uint64_t owner = __atomic_load_n(&w.d.owners[chunk], __ATOMIC_ACQUIRE);
        if (tag_of(owner) > w.tag) continue;
        if (tag_of(owner) == w.tag && (value_of(owner) & 1)) continue;  // finished, or being written
        attempt(w, chunk, owner, w.d.runs[r], f);
        redone = true;
      }
    if (!redone) team_yield();
  }
  w.tag++;
}
