// Softmax over the classes of a row: its log-sum-exp, and the gradient of the cross-entropy.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

template <class T> FA_ENTRY void log_sum_exp(const Softmax& s, index_t begin, index_t end) {
  ColumnSums<T> sums[FEW_ROWS];
  for (index_t r0 = begin; r0 < end; r0 += FEW_ROWS) {
    const int rows = int(min_index(FEW_ROWS, end - r0));
    T most[FEW_ROWS], total[FEW_ROWS];
    for (int r = 0; r < rows; r++) {
      const T* x = row_of<const T>(s.x, r0 + r);
      const Vec<T> lowest = splat(Bits<T>::lowest);
      Vec<T> max = lowest;
      for_columns<T>(s.classes, [&](index_t c, int lanes) FA_LAMBDA {
        const Vec<T> v = load_lanes(x + c, lanes);
        max = max_or_second<T>(lanes == W<T> ? v : lanes_or<T>(v, lowest, lanes), max);
      });
      most[r] = max[0];
      for (int i = 1; i < W<T>; i++) most[r] = max[i] > most[r] ? max[i] : most[r];
      const Vec<T> from = splat(most[r]);
      ColumnSums<T> sum;
      for_summed_columns<T>(s.classes, [&](index_t c, int lanes, int part) FA_LAMBDA {
        const Vec<T> e = exp_of<T>(load_lanes(x + c, lanes) - from);
        sum.part[part] += lanes == W<T> ? e : lanes_below<T>(e, lanes);
      });
      sums[r] = sum;
    }
    add_up<T>(sums, total);
    for (int r = 0; r < rows; r++) {
      const Vec<T> log2 = log2_positive<T>(splat(total[r]));
      static_cast<T*>(s.lse)[r0 + r] = most[r] + T(LN2) * log2[0];
    }
  }
}

template <class T> FA_ENTRY void softmax_gradient(const Softmax& s, index_t begin, index_t end) {
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(s.x, r);
    T* dx = row_of<T>(s.dx, r);
    const Vec<T> lse = splat(static_cast<const T*>(s.lse)[r]);
    const Vec<T> share = splat(static_cast<const T*>(s.share)[r]);
    for_columns<T>(s.classes, [&](index_t c, int lanes) FA_LAMBDA {
      store_lanes(dx + c, share * exp_of<T>(load_lanes(x + c, lanes) - lse), lanes);
    });
  }
}

}  // namespace
}  // namespace fusedattn
