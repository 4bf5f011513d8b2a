// Work that is spread over the products of tiles: the unit for tiles multiplies on its own, 16
// cycles for each product, and the vector units are free meanwhile. There run steps of vector code
// (rules and exponentials), and there the lines of what comes next are fetched: at 128 queries and
// keys of 64 numbers half of backward's time went by waiting for DRAM; fetched beside exponentials
// alone, the same lines would cost forward a tenth of its time.
#pragma once

#include "kernel/amx/tiles.h"
#include "kernel/vector/fetch.h"

namespace fusedattn {
namespace {

// More lines than these for a product would be in the way of the tiles' own loads.
inline constexpr index_t LINES_AT_ONCE = 4;
// Out of line: products are unrolled, and lines are rarely due.
FA_NOINLINE void fetch_lines(Fetcher& f) {
  fetch_due(f);
}

// What products call, telling how many of them it runs beside: fetches.
struct Fetch {
  Fetcher& f;
  FA_INLINE_MEMBER void operator()(int products) {
    f.due += products * f.rate;
    if (__builtin_expect(f.due >= Fetcher::whole, 0)) fetch_lines(f);
  }
};

// Steps of vector code, to be spread evenly over products. `run` takes one.
struct Paced {
  static constexpr index_t whole = 256;
  index_t left;   // steps
  int rate, due;  // parts of a step, 1 / whole: for each product; that are due
  void (*run)(Paced&);
};
FA_INLINE void start_steps(Paced& steps, index_t products) {
  const index_t rate = steps.left * Paced::whole / max_index(products, 1) + 1;
  steps.rate = steps.left ? int(min_index(rate, Paced::whole)) : 0;
  steps.due = 0;
}
// `run` calls this.
FA_INLINE void step_taken(Paced& steps) {
  steps.due -= int(Paced::whole);
  if (--steps.left == 0) steps.rate = steps.due = 0;
}
// Takes the steps that no product was left for. `long_ones`: the unit for tiles could fall asleep.
FA_NOINLINE void finish_steps(Paced& steps, bool long_ones) {
  for (int i = 1; steps.left > 0; i++) {
    steps.run(steps);
    if (long_ones && i % 4 == 0) keep_awake();
  }
}
// What products call, telling how many of them it runs beside: fetches, and takes steps.
struct FetchAndStep {
  Fetcher& fetcher;
  Paced& steps;
  FA_INLINE_MEMBER void operator()(int products) {
    Fetch{fetcher}(products);
    steps.due += products * steps.rate;
    if (steps.due >= Paced::whole) steps.run(steps);
  }
};

}  // namespace
}  // namespace fusedattn
