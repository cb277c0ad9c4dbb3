// A step of the decoder is a row of phases; a phase is a number of chunks that may be done in any order, by any thread.
// Every thread walks through all phases, and a phase is over when its chunks are finished, not when the threads have
// arrived: one that lost its CPU between two chunks, or before it joined, holds no other up.
//
//   take      every thread has a run of neighbouring chunks; when that is empty it takes from the others' runs
//   compute   into memory of its own
//   commit    one compare-and-swap; whichever thread wins writes the chunk's results, exactly once
//   wait      until all chunks are finished; one that takes too long is computed again by those who wait, if it may be
//
// Memory that the phases share is read only by a thread that holds a chunk of the phase, and rewritten only in later
// phases: no thread reads what another rewrites. A chunk may be computed again only once the thread that holds it has said,
// by `detach`, that what it still reads is a copy of its own or never changes. Where a matrix is multiplied by a few rows
// that is nearly all of the time: the rows are copied, and the weights are constant.
//
// All words that decide anything carry the phase's tag, which only grows, so that an old claim on them fails.

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

// A thread's claim on a chunk.
struct Commit {
  static constexpr uint64_t WON = 1, DETACHED = 2, FLAGS = 3;
  uint64_t* owner;
  uint64_t mine;
  bool again;  // another thread has the chunk, too, and has detached it
  bool won = false;

  // From here on the thread reads nothing that a later phase rewrites: the chunk may be computed again by others.
  void detach() {
    mine |= DETACHED;
    __atomic_store_n(owner, mine, __ATOMIC_RELEASE);
  }
  // Wins or loses the right to write the chunk's results.
  bool operator()() {
    uint64_t expected = mine;
    return won = __atomic_compare_exchange_n(owner, &expected, mine | WON, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }
};

template <class F>
void attempt(Worker& w, i64 chunk, uint64_t seen, PhaseRun& run, const F& f) {
  uint64_t* owner = &w.d.owners[chunk];
  const uint64_t mine = w.tag << TAG_SHIFT | uint64_t(w.index) * (Commit::FLAGS + 1);
  const bool again = tag_of(seen) == w.tag;
  if (!__atomic_compare_exchange_n(owner, &seen, mine, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
  Commit commit{owner, mine, again};
  f(chunk, commit);
  if (!commit.won) return;
  uint64_t done = __atomic_load_n(&run.done, __ATOMIC_ACQUIRE), next;
  do {
    next = w.tag << TAG_SHIFT | uint64_t(tag_of(done) == w.tag ? value_of(done) + 1 : 1);
  } while (!__atomic_compare_exchange_n(&run.done, &done, next, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

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
  constexpr i64 PATIENCE = 400;  // about 20 microseconds, a few chunks' time
  for (i64 waited = 0;; waited++) {
    bool finished = true;
    for (i64 r = 0; r < runs && finished; r++) {
      const uint64_t done = __atomic_load_n(&w.d.runs[r].done, __ATOMIC_ACQUIRE);
      if (tag_of(done) > w.tag) break;  // over, and more
      finished = tag_of(done) == w.tag ? value_of(done) == begin_of(r + 1) - begin_of(r) : begin_of(r + 1) == begin_of(r);
    }
    if (finished) break;
    if (waited < PATIENCE) {
      spin_pause();
      continue;
    }
    bool redone = false;
    for (i64 r = 0; r < runs; r++)
      for (i64 chunk = begin_of(r); chunk < begin_of(r + 1); chunk++) {
        const uint64_t owner = __atomic_load_n(&w.d.owners[chunk], __ATOMIC_ACQUIRE);
        if (tag_of(owner) > w.tag) continue;
        // Finished, or being written; or a thread reads there what the phase's end would let others rewrite.
        if (tag_of(owner) == w.tag && (value_of(owner) & Commit::FLAGS) != Commit::DETACHED) continue;
        attempt(w, chunk, owner, w.d.runs[r], f);
        redone = true;
      }
    if (!redone) team_yield();
  }
  w.tag++;
}
