// Rows of tables summed up for each token, and gradients scattered back to the tables.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

template <class T> FA_ENTRY void gather(const Gather& g, index_t begin, index_t end) {
  for (index_t r = begin; r < end; r++) {
    const T* from[TABLES];
    int tables = 0;
    for (; tables < TABLES && g.tables[tables].data; tables++)
      from[tables] = row_of<const T>(g.tables[tables], g.ids[tables][r]);
    T* y = row_of<T>(g.y, r);
    for_columns<T>(g.width, [&](index_t c, int lanes) FA_LAMBDA {
      Vec<T> sum = load_lanes(from[0] + c, lanes);
      for (int i = 1; i < tables; i++) sum += load_lanes(from[i] + c, lanes);
      store_lanes(y + c, sum, lanes);
    });
  }
}

// Rows are added 64 at a time, and those sums to each other: long chains lose digits.
template <class T> FA_ENTRY void scatter(const Scatter& s, index_t n, index_t c0, index_t c1) {
  const index_t begin = s.first[n], end = s.first[n + 1];
  T* y = row_of<T>(s.y, s.rows[n]) + c0;
  for_columns<T>(c1 - c0, [&](index_t c, int lanes) FA_LAMBDA {
    Vec<T> total{};
    for (index_t i = begin; i < end; i += 64) {
      Vec<T> sum = load_lanes(row_of<const T>(s.x, s.order[i]) + c0 + c, lanes);
      for (index_t j = i + 1; j < min_index(i + 64, end); j++)
        sum += load_lanes(row_of<const T>(s.x, s.order[j]) + c0 + c, lanes);
      total = i == begin ? sum : total + sum;
    }
    store_lanes(y + c, total, lanes);
  });
}

}  // namespace
}  // namespace fusedattn
