// Softmax over the classes of a row: its log-sum-exp, and the gradient of the cross-entropy.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

template <class T> FA_ENTRY void log_sum_exp(const Softmax& s, index_t begin, index_t end) {
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(s.x, r);
    const Vec<T> lowest = splat(Bits<T>::lowest);
    Vec<T> max = lowest;
    for_columns<T>(s.classes, [&](index_t c, int lanes) FA_LAMBDA {
      const Vec<T> v = load_lanes(x + c, lanes);
      max = max_or_second<T>(lanes == W<T> ? v : lanes_or<T>(v, lowest, lanes), max);
    });
    T most = max[0];
    for (int i = 1; i < W<T>; i++) most = max[i] > most ? max[i] : most;
    Vec<T> sum{};
    for_columns<T>(s.classes, [&](index_t c, int lanes) FA_LAMBDA {
      const Vec<T> e = exp_of<T>(load_lanes(x + c, lanes) - splat(most));
      sum += lanes == W<T> ? e : lanes_below<T>(e, lanes);
    });
    const Vec<T> log2 = log2_positive<T>(splat(sum_lanes<T>(sum)));
    static_cast<T*>(s.lse)[r] = most + T(LN2) * log2[0];
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
