// The one parallel loop, and memory for the threads that run it.
//
// Knows nothing of what its tasks do and never takes the GIL, but for asking whether to go on.
// Everything that runs on several threads goes through here: attention, layers, and OpenBLAS's jobs
// where those are shared.
#pragma once

#include <chrono>
#include <cstddef>
#include <thread>

#include "kernel/task.h"

namespace fusedattn {

// What a running loop shares with its tasks. Made by the calling thread.
struct Loop {
  bool (*interrupted)();  // asked now and then on the calling thread; null: never
  int cancelled = 0;      // set once interrupted or once a task has thrown
  std::thread::id caller = std::this_thread::get_id();
  std::chrono::steady_clock::time_point asked = std::chrono::steady_clock::now();
};

// On the calling thread, ten times a second at most, asks whether to go on; long tasks call it.
// True if the loop is cancelled.
bool is_cancelled(Loop& loop);

// Runs body(context, task) for every task in [0, tasks) on up to `threads` threads, the calling one
// among them. Tasks are claimed in ascending order, so a task may wait for a lower one. The first
// exception of a task is thrown here. Returns false if interrupted: the remaining tasks were not
// run.
bool parallel_for(index_t tasks, int threads, Loop& loop, void (*body)(void* context, index_t task),
                  void* context);

template <class F> bool parallel_for(index_t tasks, int threads, Loop& loop, F&& body) {
  return parallel_for(
      tasks, threads, loop, [](void* f, index_t task) { (*static_cast<F*>(f))(task); }, &body);
}

// Runs `tasks` tasks that may wait for each other, each on a thread of its own.
void run_all_at_once(int tasks, void (*body)(void* context, index_t task), void* context);

// Lets a task wait until *turn equals ordinal; gives up when the loop is cancelled.
void wait_for_turn(int* turn, int ordinal, const void* loop);

// Memory of the calling thread, kept for its next call, aligned to a cache line; throws
// std::bad_alloc.
void* thread_scratch(std::size_t bytes);

const char* parallel_backend();  // "pool" or "openmp": what the loop stands on

}  // namespace fusedattn
