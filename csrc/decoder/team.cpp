#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "../kernels.h"

namespace llmfast {
namespace {

constexpr int kMostHelpers = 63;
constexpr int kSpins = 4000;   // about 50 to 100 microseconds
constexpr int kYields = 2000;  // a millisecond or two on an idle machine; on a busy one others run meanwhile

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct alignas(64) Helper {
  std::atomic<TeamJob*> inside{nullptr};  // the job this helper may be reading
  std::atomic<bool> asleep{false};
  std::condition_variable wake;
};

std::atomic<Team*> team{nullptr};
std::mutex* making = new std::mutex;

}  // namespace

struct Team::Shared {
  std::mutex busy;  // held by the caller from begin to end
  std::atomic<TeamJob*> job{nullptr};
  std::atomic<uint64_t> published{0};
  std::atomic<int> invited{0};  // helpers beyond this many sleep on
  int started = 0;
  std::mutex sleeping;
  Helper helpers[kMostHelpers];

  void run(int index) {
    Helper& self = helpers[index];
    uint64_t seen = 0;
    const auto called = [&] { return published.load() != seen && index < invited.load(); };
    for (;;) {
      for (int turn = 0; !called(); turn++) {
        if (turn < kSpins) {
          pause();
        } else if (turn < kSpins + kYields) {
          sched_yield();
        } else {
          std::unique_lock<std::mutex> lock(sleeping);
          self.asleep.store(true);
          self.wake.wait(lock, called);
          self.asleep.store(false);
        }
      }
      seen = published.load();
      // Say which job before looking again whether it is still there: the thread that withdrew it then sees us.
      TeamJob* now = job.load();
      self.inside.store(now);
      if (now && job.load() == now) now->help(now, index + 1);
      self.inside.store(nullptr);
    }
  }
};

Team::Team() : shared_(new Shared) {}

Team& Team::instance() {
  Team* now = team.load();
  if (now) return *now;
  static const int forgets_in_children = pthread_atfork(nullptr, nullptr, [] {
    // The parent's threads and whatever locks they held do not exist here; their memory is left alone.
    making = new std::mutex;
    team.store(nullptr);
  });
  (void)forgets_in_children;
  std::lock_guard<std::mutex> lock(*making);
  if (!team.load()) team.store(new Team);
  return *team.load();
}

bool Team::begin(TeamJob* job, int helpers) {
  if (helpers <= 0 || !shared_->busy.try_lock()) return false;
  Shared& s = *shared_;
  helpers = helpers < kMostHelpers ? helpers : kMostHelpers;
  try {
    for (; s.started < helpers; s.started++) std::thread([&s, index = s.started] { s.run(index); }).detach();
  } catch (const std::exception&) {
    // The system gives no more threads: those there are will do.
  }
  s.invited.store(helpers);
  s.job.store(job);
  s.published.fetch_add(1);
  for (int i = 0; i < helpers; i++)
    if (s.helpers[i].asleep.load()) {
      std::lock_guard<std::mutex> lock(s.sleeping);
      s.helpers[i].wake.notify_one();
    }
  return true;
}

void Team::end() {
  shared_->job.store(nullptr);
  shared_->busy.unlock();
}

void Team::wait_until_left(const TeamJob* job) {
  for (Helper& helper : shared_->helpers)
    while (helper.inside.load() == job) sched_yield();
}

namespace {

struct Loop : TeamJob {
  void (*f)(i64, i64, void*);
  void* context;
  i64 n;
  std::atomic<i64> next{0};
  void work() {
    for (i64 i; (i = next.fetch_add(1)) < n;) f(i, i + 1, context);
  }
};

}  // namespace

void team_yield() { sched_yield(); }

Threads team_threads(int threads) {
  return Threads{threads, [](i64 n, void (*f)(i64, i64, void*), void* context) {
                   Loop loop;
                   loop.f = f;
                   loop.context = context;
                   loop.n = n;
                   loop.help = [](TeamJob* job, int) { static_cast<Loop*>(job)->work(); };
                   Team& team = Team::instance();
                   const bool helped = team.begin(&loop, int(n) - 1);
                   loop.work();
                   if (!helped) return;
                   team.end();
                   team.wait_until_left(&loop);
                 }};
}

}  // namespace llmfast
