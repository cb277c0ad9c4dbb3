// A team of plain threads that helps the calling thread: it spins briefly between jobs, then yields, then sleeps.
//
// Helping is optional: a job must get done even if no helper ever comes, because a helper may be off the CPU for
// milliseconds where other programs are busy. So a job is published and withdrawn, never waited for; the thread that frees a
// job's memory waits until the last helper has left it.
//
// A forked child has no threads but the one that forked, and builds a team of its own when it first needs one.
#pragma once

#include <cstdint>

namespace llmfast {

struct TeamJob {
  void (*help)(TeamJob* job, int worker) = nullptr;  // worker 1, 2, ...; the caller itself is worker 0
};

class Team {
 public:
  static Team& instance();

  // Publishes a job to `helpers` threads (starting them if need be); false when the team is busy with another caller's.
  bool begin(TeamJob* job, int helpers);
  void end();

  // Returns when no helper is inside the job. It must have been withdrawn by `end`.
  void wait_until_left(const TeamJob* job);

 private:
  struct Shared;
  Shared* shared_;
  Team();
};

// The team as `Threads`, for kernels that are waited for.
struct Threads;
Threads team_threads(int threads);

// Lets other threads of the system run.
void team_yield();

}  // namespace llmfast
