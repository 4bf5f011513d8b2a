// Fetches what is read or written next into the L2 cache, a line at a time, while something else
// computes: a task that is short is done with before the hardware sees it coming. The work division
// says what comes next; whoever computes queues its rows, says how many steps the lines are to be
// spread over, and calls `fetch` at each of them. Rows that a loop reads a fixed distance behind
// (amx/few_products.h, and plain prefetches in loops) are no business of this file.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

struct Fetcher {
  static constexpr int most = 12;
  static constexpr index_t whole = 256;
  struct Lines {
    const char* data;
    index_t step, bytes, rows;
  };
  const char *at = nullptr, *end = nullptr;  // what is left of the row at hand
  index_t rate = 0, due = 0;  // parts of a line, 1 / whole: for each step; that are due
  index_t lines = 0;          // that were queued
  int count = 0;
  Lines queue[most];  // the last one's turn comes first
};
FA_INLINE void clear_fetcher(Fetcher& f) {
  f.at = f.end = nullptr;
  f.rate = f.due = f.lines = 0;
  f.count = 0;
}
// Rows that share a few sets of the cache would drive each other out before they are read.
FA_INLINE bool is_crowded(const Matrix& m, index_t bytes) {
  return m.row % 4096 == 0 && m.row != bytes && m.row != 0;
}
// Queues `bytes` of each of the rows [begin, end) of m, to be fetched before all that was queued
// earlier; nothing if m has no data or its rows are crowded.
FA_INLINE void fetch_rows(Fetcher& f, const Matrix& m, index_t begin, index_t end, index_t bytes) {
  if (!m.data || begin >= end || f.count == Fetcher::most || is_crowded(m, bytes)) return;
  const char* first = m.data + begin * m.row;
  index_t rows = end - begin;
  if (m.row == bytes) bytes *= rows, rows = 1;
  if (m.row == 0) rows = 1;
  f.queue[f.count++] = {first, m.row, bytes, rows};
  f.lines += rows * ((bytes + 63) / 64);
}
// Crowded rows are fetched just before they are read instead, all at once.
FA_INLINE void fetch_crowded_rows(const Matrix& m, index_t begin, index_t end, index_t bytes) {
  if (!m.data || !is_crowded(m, bytes)) return;
  for (index_t r = begin; r < end; r++)
    for (index_t at = 0; at < bytes; at += 64) prefetch_far(m.data + r * m.row + at);
}
// Spreads what was queued over so many steps, of at most so many lines each.
FA_INLINE void start_fetching(Fetcher& f, index_t steps, index_t lines_at_once = 1024) {
  const index_t rate = f.lines * Fetcher::whole / max_index(steps, 1) + 1;
  f.rate = f.lines ? min_index(rate, lines_at_once * Fetcher::whole) : 0;
}
// Fetches the lines that are due.
FA_INLINE void fetch_due(Fetcher& f) {
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
// So many steps are done.
FA_INLINE void fetch(Fetcher& f, index_t steps = 1) {
  f.due += steps * f.rate;
  fetch_due(f);
}

}  // namespace
}  // namespace fusedattn
