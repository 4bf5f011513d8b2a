// Fetching rows into the caches before they are read, beside something else.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

// Fetches rows into the caches, a few lines at a time, while something else computes.
struct Stream {
  const char* row;
  index_t step, line, line_end, rows;

  FA_INLINE_MEMBER void fetch() {
    if (rows <= 0) return;
    prefetch_far(row + line);
    line += 64;
    if (line >= line_end) {
      line = 0;
      row += step;
      rows--;
    }
  }
};
// Rows that share a few sets of the cache would drive each other out before they are read.
FA_INLINE bool is_crowded(const Matrix& m, index_t bytes) {
  return m.row % 4096 == 0 && m.row != bytes && m.row != 0;
}
FA_INLINE Stream stream_of(const Matrix& m, index_t begin, index_t end, index_t row_bytes) {
  return {m.data + begin * m.row, m.row, 0, row_bytes,
          m.data && !is_crowded(m, row_bytes) ? end - begin : 0};
}

// What the next task will read, fetched during this one's exponentials: `burst` lines of each
// stream for every key.
struct Ahead {
  Stream stream[4];
  index_t burst;
};
FA_INLINE void fetch_ahead(Ahead& a) {
  for (index_t b = 0; b < a.burst; b++) {
    FA_UNROLL
    for (int i = 0; i < 4; i++) a.stream[i].fetch();
  }
}

}  // namespace
}  // namespace fusedattn
