#include "threads/thread_count.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#ifdef FUSEDATTN_HAVE_OPENMP
#include <omp.h>
#endif

namespace fusedattn {
namespace {

int openmp_threads() {
#ifdef FUSEDATTN_HAVE_OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

// 0 if the variable is not set (or empty), -1 if it is not a number of threads.
int threads_from_environment(const char* name) {
  const char* text = std::getenv(name);
  if (!text || !*text) return 0;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  return *end == 0 && n > 0 && n < 65536 ? int(n) : -1;
}

int available_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

struct ThreadCount {
  int environment = threads_from_environment("FUSEDATTN_NUM_THREADS");
  int openmp = openmp_threads() ? openmp_threads()
                                : std::max(0, threads_from_environment("OMP_NUM_THREADS"));
  std::atomic<int> chosen{0};
  std::atomic<int> openmp_when_chosen{0};
};

ThreadCount thread_count;  // made when the library is loaded: a limit set on OpenMP later must show
                           // as a change

}  // namespace

int get_num_threads() {
  const ThreadCount& count = thread_count;
  const int now = openmp_threads();
  int n = count.chosen.load(std::memory_order_relaxed);
  const bool chosen = n != 0;
  if (n == 0) n = count.environment;
  if (n < 0)
    throw std::invalid_argument(
        std::string("FUSEDATTN_NUM_THREADS: expected an integer from 1 to 65535, got '") +
        std::getenv("FUSEDATTN_NUM_THREADS") + "'");
  if (n == 0) return now > 0 ? now : count.openmp > 0 ? count.openmp : available_cpus();
  const int before =
      chosen ? count.openmp_when_chosen.load(std::memory_order_relaxed) : count.openmp;
  return now > 0 && now < before ? std::min(n, now) : n;
}

void set_num_threads(int n) {
  thread_count.openmp_when_chosen.store(openmp_threads(), std::memory_order_relaxed);
  thread_count.chosen.store(n, std::memory_order_relaxed);
}

}  // namespace fusedattn
