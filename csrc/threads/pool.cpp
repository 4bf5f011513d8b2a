// A pool of threads that sleep when they have nothing to do.
//
// Why not an OpenMP parallel region: libgomp's waiting threads spin, and NumPy's BLAS, called next,
// then fights them for the cores; whoever loads libgomp first decides its waiting policy for the
// whole process, so an extension cannot tame it. libgomp also hangs in a forked child.
// docs/design.md has the figures; -DFUSEDATTN_PARALLEL=openmp builds the other way.
#include "threads/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "threads/blas_threads.h"

#ifdef FUSEDATTN_PARALLEL_OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fusedattn {
namespace {

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How a thread computes, until the end of the scope. Kernels take results below the smallest normal
// number for 0: an Intel core spends over a hundred cycles on each, and probabilities (ALiBi's of
// far keys) and gradients have many. Operands keep what they are. Arm has no such cost and one
// switch for results and operands; it is on for the sake of the same bits, which remain apart for
// operands that are subnormal and where a result rounds up to the smallest normal number from less
// than a quarter of a unit below it: x86 rounds first and keeps it, Arm flushes it. Setting the
// mode, whatever it was, also keeps the bits from depending on what the caller or PyTorch left
// there.
class ArithmeticMode {
 public:
#if defined(__x86_64__)
  enum Mode : unsigned { unchanged = 0, ieee = 0x1f80, kernels = ieee | 0x8000 };
  explicit ArithmeticMode(Mode mode) : before_(_mm_getcsr()) {
    if (mode != unchanged) _mm_setcsr(mode);
  }
  ~ArithmeticMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  enum Mode : std::uint64_t { unchanged = ~0ull, ieee = 0, kernels = 1 << 24 };
  explicit ArithmeticMode(Mode mode) {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (mode != unchanged) set(mode);
  }
  ~ArithmeticMode() { set(before_); }

 private:
  static void set(std::uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
  std::uint64_t before_;
#else
  enum Mode { unchanged, ieee, kernels };
  explicit ArithmeticMode(Mode) {}
#endif
};

// One parallel loop under way.
struct Job {
  index_t tasks;
  void (*body)(void*, index_t);
  void* context;
  Loop* loop;
  ArithmeticMode::Mode arithmetic = ArithmeticMode::kernels;
  std::atomic<index_t> next{0};
  int wanted = 0;  // helpers still welcome (guarded by the pool's mutex)
  std::atomic<int> helping{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  bool exhausted() const {
    return next.load(std::memory_order_relaxed) >= tasks ||
           __atomic_load_n(&loop->cancelled, __ATOMIC_RELAXED) != 0;
  }

  // Runs tasks until none is left.
  void work() {
    const ArithmeticMode mode(arithmetic);
    while (!is_cancelled(*loop)) {
      const index_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      try {
        body(context, task);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        __atomic_store_n(&loop->cancelled, 1, __ATOMIC_RELAXED);
      }
    }
  }
};

class Pool {
 public:
  // Runs the job on `threads` threads, the calling one among them. `all_at_once`: its tasks wait
  // for each other, so every one must have a thread of its own; more threads are started if too few
  // are free.
  void run(Job& job, int threads, bool all_at_once) {
    {
      const std::lock_guard lock(mutex_);
      job.wanted = threads - 1;
      int free = started_;
      if (all_at_once) {
        free -= busy_;
        for (const Job* other : urgent_) free -= other->wanted;
      }
      (all_at_once ? urgent_ : jobs_).push_back(&job);
      for (; free < threads - 1; free++) {
        std::thread([this] { serve(); }).detach();
        started_++;
      }
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (threads == 2)
      wake_.notify_one();
    else
      wake_.notify_all();
    job.work();
    {
      const std::lock_guard lock(mutex_);  // from here on nobody new can join
      std::erase(all_at_once ? urgent_ : jobs_, &job);
    }
    for (int spins = 0; job.helping.load(std::memory_order_acquire) != 0; spins++) {
      if (spins < 2000)
        pause_cpu();
      else
        std::this_thread::yield();
    }
  }

 private:
  Job* find_job() {
    for (const auto* queue : {&urgent_, &jobs_})
      for (Job* job : *queue)
        if (job->wanted > 0 && !job->exhausted()) return job;
    return nullptr;
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job;
      wake_.wait(lock, [&] { return (job = find_job()) != nullptr; });
      job->wanted--;
      busy_++;
      job->helping.fetch_add(1, std::memory_order_relaxed);
      const unsigned epoch = epoch_.load(std::memory_order_relaxed);
      lock.unlock();
      job->work();
      job->helping.fetch_sub(1, std::memory_order_release);
      // The next call is often a few microseconds away; waking costs ten times that. Short enough
      // to hurt nobody.
      for (int spins = 0; spins < idle_spins && epoch_.load(std::memory_order_relaxed) == epoch;
           spins++)
        pause_cpu();
      lock.lock();
      busy_--;
    }
  }

  static constexpr int idle_spins = 3000;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job*> jobs_, urgent_;
  std::atomic<unsigned> epoch_{0};
  int started_ = 0, busy_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of them, so
// it starts a pool anew.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const int at_fork = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
  (void)at_fork;
  Pool* p = the_pool.load();
  if (!p) {
    auto fresh = std::make_unique<Pool>();
    if (the_pool.compare_exchange_strong(p, fresh.get())) p = fresh.release();
  }
  return *p;
}

void run(Job& job, int threads) {
#ifdef FUSEDATTN_PARALLEL_OPENMP
#pragma omp parallel num_threads(threads)
  job.work();
#else
  static const bool shared = share_with_blas();
  (void)shared;
  pool().run(job, threads, false);
#endif
}

}  // namespace

bool is_cancelled(Loop& loop) {
  if (loop.interrupted && std::this_thread::get_id() == loop.caller) {
    const auto now = std::chrono::steady_clock::now();
    if (now - loop.asked > std::chrono::milliseconds(100)) {
      loop.asked = now;
      const ArithmeticMode mode(ArithmeticMode::ieee);  // handlers of signals are Python's
      if (loop.interrupted()) __atomic_store_n(&loop.cancelled, 1, __ATOMIC_RELAXED);
    }
  }
  return __atomic_load_n(&loop.cancelled, __ATOMIC_RELAXED) != 0;
}

bool parallel_for(index_t tasks, int threads, Loop& loop, void (*body)(void*, index_t),
                  void* context) {
  Job job;
  job.tasks = tasks;
  job.body = body;
  job.context = context;
  job.loop = &loop;
  threads = int(std::min<index_t>(threads, tasks));
  if (threads <= 1)
    job.work();
  else
    run(job, threads);
  if (job.error) std::rethrow_exception(job.error);
  return loop.cancelled == 0;
}

void run_all_at_once(int tasks, void (*body)(void*, index_t), void* context) {
  Loop loop{};
  Job job;
  job.tasks = tasks;
  job.body = body;
  job.context = context;
  job.loop = &loop;
  job.arithmetic = ArithmeticMode::unchanged;
  pool().run(job, tasks, true);
}

void wait_for_turn(int* turn, int ordinal, const void* loop) {
  const int* cancelled = &static_cast<const Loop*>(loop)->cancelled;
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != ordinal; spins++) {
    if (spins < 500)
      pause_cpu();
    else if (__atomic_load_n(cancelled, __ATOMIC_RELAXED))
      return;
    else
      std::this_thread::yield();
  }
}

void* thread_scratch(std::size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer = {};
    const std::size_t size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, size);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = size;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(buffer.data, buffer.size);  // what the call before guarded
#endif
  return buffer.data;
}

const char* parallel_backend() {
#ifdef FUSEDATTN_PARALLEL_OPENMP
  return "openmp";
#else
  return "pool";
#endif
}

}  // namespace fusedattn
