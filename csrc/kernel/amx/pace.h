// What runs beside the products of tiles: steps of vector code, and fetching. What forward and
// backward will read or write next is fetched into the L2 cache a line at a time: a short head is
// done with before the hardware sees it coming. At 128 queries and keys of 64 numbers half of
// backward's time went by waiting for DRAM. Beside exponentials alone the same lines would cost
// forward a tenth of its time.
#pragma once

#include "kernel/amx/tiles.h"
#include "kernel/vector/fetch.h"

namespace fusedattn {
namespace {

struct Fetcher {
  static constexpr int most = 12, whole = 256;
  struct Lines {
    const char* data;
    index_t step, bytes, rows;
  };
  const char *at, *end;  // what is left of the row at hand
  int rate, due;         // parts of a line for each product; that are due
  Lines queue[most];     // the last one's turn comes first
  int count;
  index_t lines;  // in the queue
};
FA_INLINE void clear_fetcher(Fetcher& f) {
  f.count = f.rate = f.due = 0;
  f.lines = 0;
  f.at = f.end = nullptr;
}
// Rows that would drive each other out are fetched just before instead.
FA_INLINE void fetch_crowded_rows(const Matrix& m, index_t begin, index_t end, index_t bytes) {
  if (!m.data || !is_crowded(m, bytes)) return;
  for (index_t r = begin; r < end; r++)
    for (index_t at = 0; at < bytes; at += 64) prefetch_far(m.data + r * m.row + at);
}
// Rows [begin, end) of m are fetched before all that was added earlier.
FA_INLINE void fetch_rows(Fetcher& f, const Matrix& m, index_t begin, index_t end, index_t bytes) {
  if (!m.data || begin >= end || f.count == Fetcher::most || is_crowded(m, bytes)) return;
  const char* first = m.data + begin * m.row;
  index_t rows = end - begin;
  if (m.row == bytes) bytes *= rows, rows = 1;
  if (m.row == 0) rows = 1;
  f.queue[f.count++] = {first, m.row, bytes, rows};
  f.lines += rows * ((bytes + 63) / 64);
}
// Spreads what was added over so many products. More than four lines at once would be in the way of
// the tiles' own loads.
FA_INLINE void start_fetching(Fetcher& f, index_t products) {
  const index_t rate = f.lines * Fetcher::whole / max_index(products, 1) + 1;
  f.rate = int(min_index(rate, 4 * Fetcher::whole));
}
FA_NOINLINE void fetch_line(Fetcher& f) {
  for (; f.due >= Fetcher::whole; f.due -= Fetcher::whole) {
    if (f.at >= f.end) {
      if (f.count == 0) return clear_fetcher(f);
      Fetcher::Lines& lines = f.queue[f.count - 1];
      f.at = lines.data;
      f.end = f.at + lines.bytes;
      lines.data += lines.step;
      if (--lines.rows == 0) f.count--;
    }
    prefetch_far(f.at);
    f.at += 64;
  }
}

// The work beside products.
struct Fetch {
  Fetcher& f;
  FA_INLINE_MEMBER void operator()(int products) {
    f.due += products * f.rate;
    if (__builtin_expect(f.due >= Fetcher::whole, 0)) fetch_line(f);
  }
};

// Steps of vector code, to be spread evenly over products. `run` takes one.
struct Paced {
  index_t left;   // steps
  int rate, due;  // parts of a step for each product; that are due
  void (*run)(Paced&);
};
FA_INLINE void start_steps(Paced& steps, index_t products) {
  const index_t rate = steps.left * Fetcher::whole / max_index(products, 1) + 1;
  steps.rate = steps.left ? int(min_index(rate, Fetcher::whole)) : 0;
  steps.due = 0;
}
FA_INLINE void step_taken(Paced& steps) {
  steps.due -= Fetcher::whole;
  if (--steps.left == 0) steps.rate = steps.due = 0;
}
// Those that are left, beside nothing. `long_ones`: the unit for tiles could fall asleep.
FA_NOINLINE void finish_steps(Paced& steps, bool long_ones) {
  for (int i = 1; steps.left > 0; i++) {
    steps.run(steps);
    if (long_ones && i % 4 == 0) keep_awake();
  }
}
struct Beside {
  Fetcher& fetcher;
  Paced& steps;
  FA_INLINE_MEMBER void operator()(int products) {
    Fetch{fetcher}(products);
    steps.due += products * steps.rate;
    if (steps.due >= Fetcher::whole) steps.run(steps);
  }
};

}  // namespace
}  // namespace fusedattn
