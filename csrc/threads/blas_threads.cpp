// After a parallel product OpenBLAS's own threads spin for about 0.1 s without yielding. An
// attention call in that time gets one core less, and calls that alternate with np.matmul take up
// to twice the sum of the two alone. OpenBLAS 0.3.28 and later lets a caller run its parallel jobs
// (openblas_set_threads_callback_function in its cblas.h), so both use one pool and nobody is left
// spinning. FUSEDATTN_SHARE_BLAS_THREADS=0 leaves OpenBLAS alone; one that somebody else already
// serves is left alone.
#include "threads/blas_threads.h"

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>

#include "threads/pool.h"

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#endif

namespace fusedattn {
namespace {

// The types of OpenBLAS's cblas.h. Job i is run(i, jobs + i * size, data); the jobs of one call
// wait for each other.
using RunJob = void (*)(int thread, void* job, int data);
using Callback = void (*)(int sync, RunJob run, int count, std::size_t size, void* jobs, int data);
using SetCallback = void (*)(Callback);

// OpenBLAS keeps one buffer for each job number, so the jobs of two calls must not overlap. A
// forked child gets a new lock: nobody there would ever release the old one.
std::mutex* one_call = new std::mutex;

void run_jobs(int, RunJob run, int count, std::size_t size, void* jobs, int data) {
  struct Jobs {
    RunJob run;
    std::size_t size;
    char* jobs;
    int data;
  } context{run, size, static_cast<char*>(jobs), data};
  const std::lock_guard lock(*one_call);
  run_all_at_once(
      count,
      [](void* c, index_t i) {
        const Jobs& j = *static_cast<Jobs*>(c);
        j.run(int(i), j.jobs + std::size_t(i) * j.size, j.data);
      },
      &context);
}

#ifdef __linux__
int share_library(dl_phdr_info* info, std::size_t, void* found) {
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, "openblas")) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  const auto* served = static_cast<Callback*>(dlsym(library, "openblas_threads_callback_"));
  for (const char* prefix : {"scipy_", ""})
    for (const char* suffix : {"64_", ""}) {
      char name[80] = "";
      std::strcat(std::strcat(std::strcat(name, prefix), "openblas_set_threads_callback_function"),
                  suffix);
      const auto set = reinterpret_cast<SetCallback>(dlsym(library, name));
      if (set && served && !*served) {
        set(run_jobs);
        *static_cast<bool*>(found) = true;
      }
    }
  return 0;  // on to the next library; the handle stays open, as the library must stay loaded
}
#endif

}  // namespace

bool share_with_blas() {
  bool found = false;
#ifdef __linux__
  const char* wish = std::getenv("FUSEDATTN_SHARE_BLAS_THREADS");
  if (!wish || std::strcmp(wish, "0") != 0) dl_iterate_phdr(share_library, &found);
  if (found) pthread_atfork(nullptr, nullptr, [] { one_call = new std::mutex; });
#endif
  return found;
}

}  // namespace fusedattn
