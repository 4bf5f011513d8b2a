// The pool and what leans on it, for ThreadSanitizer: parallel loops from several threads at once,
// in each other, cancelled and after a fork; attention whose tasks take turns and the layers, with
// the bits of one thread. Takes some seconds without a sanitizer, too.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>

#include "attention_case.h"

namespace fusedattn::test {
namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

// Runs f(i) on `n` threads of their own, at the same time.
template <class F> void at_once(int n, F f) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; i++) threads.emplace_back(f, i);
  for (std::thread& t : threads) t.join();
}

constexpr index_t TASKS = 100;
constexpr int THREADS = 4;

// A loop whose tasks write next to each other, unprotected: 0 + 1 + ... if each ran once.
index_t sum_of_a_loop(int threads) {
  std::vector<index_t> of(std::size_t(TASKS), 0);
  Loop loop{};
  const bool done = parallel_for(TASKS, threads, loop, [&](index_t t) { of[std::size_t(t)] += t; });
  index_t sum = done ? 0 : -1;
  for (const index_t x : of) sum += x;
  return sum;
}
constexpr index_t SUM = TASKS * (TASKS - 1) / 2;

void test_loops() {
  for (int i = 0; i < 200; i++) check(sum_of_a_loop(1 + i % THREADS) == SUM, "a loop");
  std::atomic<int> wrong{0};
  at_once(THREADS, [&](int) {
    for (int i = 0; i < 100; i++) wrong += sum_of_a_loop(1 + i % THREADS) != SUM;
  });
  check(wrong == 0, "loops of several threads at once");
}

void test_nested_loops() {
  std::vector<index_t> sums(8);
  Loop loop{};
  parallel_for(8, THREADS, loop, [&](index_t t) { sums[std::size_t(t)] = sum_of_a_loop(THREADS); });
  check(sums == std::vector<index_t>(8, SUM), "loops inside a loop");
}

// Tasks that wait for a lower one, as those of backward do.
void test_turns() {
  for (int i = 0; i < 50; i++) {
    int turn = 0;
    index_t last = -1, wrong = 0;  // guarded by the turn
    Loop loop{};
    parallel_for(TASKS, THREADS, loop, [&](index_t t) {
      wait_for_turn(&turn, int(t), &loop);
      wrong += last != t - 1;
      last = t;
      __atomic_store_n(&turn, int(t) + 1, __ATOMIC_RELEASE);
    });
    check(wrong == 0 && last == TASKS - 1, "turns in order");
  }
}

// A task throws while others wait for a turn that never comes: they give up, the caller hears of
// it, and the next loop is as good as ever.
void test_exceptions() {
  for (int i = 0; i < 20; i++) {
    int turn = 0;
    std::string heard;
    Loop loop{};
    try {
      parallel_for(TASKS, THREADS, loop, [&](index_t t) {
        if (t == 3) throw std::runtime_error("task 3");
        if (t > 3) wait_for_turn(&turn, 1, &loop);
      });
    } catch (const std::runtime_error& e) {
      heard = e.what();
    }
    check(heard == "task 3" && loop.cancelled != 0, "the exception of a task");
    check(sum_of_a_loop(THREADS) == SUM, "a loop after an exception");
  }
}

// The calling thread asks whether to go on, and is told not to.
void test_interruption() {
  Loop loop{};
  loop.interrupted = [] { return true; };
  loop.asked -= std::chrono::seconds(1);
  std::atomic<index_t> ran{0};
  const bool done = parallel_for(TASKS, THREADS, loop, [&](index_t) {
    ran++;
    while (!is_cancelled(loop)) std::this_thread::yield();
  });
  check(!done && ran < TASKS, "an interrupted loop");
}

// Every task has a thread of its own, whoever else computes: OpenBLAS's jobs wait for each other.
void test_all_at_once() {
  std::atomic<int> wrong{0};
  at_once(3, [&](int caller) {
    for (int i = 0; i < 20; i++) {
      wrong += caller == 0 && sum_of_a_loop(THREADS) != SUM;
      std::atomic<int> arrived{0};
      run_all_at_once(
          THREADS,
          [](void* context, index_t) {
            auto& n = *static_cast<std::atomic<int>*>(context);
            for (n++; n < THREADS;) std::this_thread::yield();
          },
          &arrived);
      wrong += arrived != THREADS;
    }
  });
  check(wrong == 0, "tasks that wait for each other");
}

// A child has none of its parent's threads; it starts its own. libgomp would hang there.
void test_fork() {
  check(sum_of_a_loop(THREADS) == SUM, "a loop before a fork");
  const pid_t child = fork();
  if (child == 0) _exit(sum_of_a_loop(THREADS) == SUM && sum_of_a_loop(THREADS) == SUM ? 0 : 1);
  int status = -1;
  check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a loop in a child");
  check(sum_of_a_loop(THREADS) == SUM, "a loop after a fork");
}

// Backward's tasks take turns where key/value heads are fewer than threads, each head has several
// blocks of keys and the work is worth four threads. The order of a shared dbias is one over all
// samples and heads, and where samples see different queries some are left out of it.
std::vector<AttentionCase> cases_with_turns() {
  using C = AttentionCase;
  return {
      {.name = "turns", .heads = 1, .kv_heads = 1, .sq = 200, .sk = 700, .d = 32, .d_v = 32},
      {.name = "turns_grouped",
       .heads = 3,
       .kv_heads = 1,
       .sq = 150,
       .sk = 520,
       .d = 24,
       .d_v = 24,
       .offset = 370,
       .right = 0,
       .mask = true},
      {.name = "turns_bias",
       .batch = 3,
       .heads = 2,
       .kv_heads = 2,
       .sq = 150,
       .sk = 300,
       .left = 80,
       .right = 40,
       .segments = C::in_runs,
       .bias = C::full,
       .sinks = true},
      {.name = "turns_bias_per_key",
       .batch = 2,
       .sq = 150,
       .sk = 300,
       .bias = C::per_key,
       .softcap = 3,
       .dropout = 0.25},
  };
}

// Two callers with as many threads as tasks may have, against one thread.
template <class T> void test_turns_of_backward(const AttentionCase& c, const std::string& isa) {
  const AttentionInputs in = held<T>(draw(c, 1));
  const Results want = computed<T>(c, in, 1);
  std::atomic<int> same{0};
  at_once(2, [&](int) {
    for (const int threads : {THREADS, 2}) same += computed<T>(c, in, threads) == want;
  });
  check(!want.empty() && same == 4,
        std::string("same bits of ") + c.name + " with " + isa + " in " + name_of<T>);
}

}  // namespace

int test_threads() {
  test_loops();
  test_nested_loops();
  test_turns();
  test_exceptions();
  test_interruption();
  test_all_at_once();
  if (std::string(parallel_backend()) == "pool") test_fork();
  std::string names;
  for (const std::string& isa : supported_isas()) {
    names += " " + isa;
    set_isa(isa);
    for (const AttentionCase& c : cases_with_turns()) {
      test_turns_of_backward<float>(c, isa);
      test_turns_of_backward<double>(c, isa);
      test_turns_of_backward<BFloat>(c, isa);
    }
  }
  std::printf("threads, instruction sets:%s: %d failures\n", names.c_str(), failures);
  return failures;
}

}  // namespace fusedattn::test

int main() {
  using namespace fusedattn;
  return test::test_threads() + test::test_layers() != 0;
}
