// Layer normalisation (Ba, Kiros and Hinton, arXiv:1607.06450) and its gradient.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

template <class T> FA_ENTRY void layer_norm(const LayerNorm& n, index_t begin, index_t end) {
  const T *weight = static_cast<const T*>(n.weight), *bias = static_cast<const T*>(n.bias);
  const T share = T(1) / T(n.width);
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(n.x, r);
    T* y = row_of<T>(n.y, r);
    prefetch_near(row_of<const T>(n.x, r + 1));
    Vec<T> sum{};
    for_columns<T>(n.width,
                   [&](index_t c, int lanes) FA_LAMBDA { sum += load_lanes(x + c, lanes); });
    const T mean = sum_lanes<T>(sum) * share;
    Vec<T> squares{};
    for_columns<T>(n.width, [&](index_t c, int lanes) FA_LAMBDA {
      // The lanes beyond the row must add nothing: splat(mean) is loaded with them.
      const Vec<T> d = lanes == W<T> ? load(x + c) - splat(mean)
                                     : lanes_below<T>(load_n(x + c, lanes) - splat(mean), lanes);
      squares = fma<T>(d, d, squares);
    });
    const T rstd = T(1) / T(__builtin_sqrt(sum_lanes<T>(squares) * share + T(n.eps)));
    static_cast<T*>(n.mean)[r] = mean;
    static_cast<T*>(n.rstd)[r] = rstd;
    for_columns<T>(n.width, [&](index_t c, int lanes) FA_LAMBDA {
      const Vec<T> h = (load_lanes(x + c, lanes) - splat(mean)) * splat(rstd);
      store_lanes(y + c, fma<T>(h, load_lanes(weight + c, lanes), load_lanes(bias + c, lanes)),
                  lanes);
    });
  }
}

// With h = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - h mean(g h)).
template <class T>
FA_ENTRY void layer_norm_backward(const LayerNormBackward& n, index_t begin, index_t end) {
  const T* weight = static_cast<const T*>(n.weight);
  T *dweight = static_cast<T*>(n.dweight), *dbias = static_cast<T*>(n.dbias);
  const T share = T(1) / T(n.width);
  for (index_t r = begin; r < end; r++) {
    const T *x = row_of<const T>(n.x, r), *dy = row_of<const T>(n.dy, r);
    T* dx = row_of<T>(n.dx, r);
    const Vec<T> mean = splat(static_cast<const T*>(n.mean)[r]);
    const T rstd = static_cast<const T*>(n.rstd)[r];
    Vec<T> sum{}, along{};
    for_columns<T>(n.width, [&](index_t c, int lanes) FA_LAMBDA {
      const Vec<T> d = load_lanes(dy + c, lanes);
      const Vec<T> h = (load_lanes(x + c, lanes) - mean) * splat(rstd);
      const Vec<T> g = d * load_lanes(weight + c, lanes);  // 0 beyond the row
      sum += g;
      along = fma<T>(g, h, along);
      store_lanes(dweight + c, fma<T>(d, h, load_lanes(dweight + c, lanes)), lanes);
      store_lanes(dbias + c, load_lanes(dbias + c, lanes) + d, lanes);
    });
    const Vec<T> m1 = splat(T(sum_lanes<T>(sum) * share));
    const Vec<T> m2 = splat(T(sum_lanes<T>(along) * share));
    for_columns<T>(n.width, [&](index_t c, int lanes) FA_LAMBDA {
      const Vec<T> h = (load_lanes(x + c, lanes) - mean) * splat(rstd);
      const Vec<T> g = load_lanes(dy + c, lanes) * load_lanes(weight + c, lanes);
      store_lanes(dx + c, splat(rstd) * (g - m1 - h * m2), lanes);
    });
  }
}

}  // namespace
}  // namespace fusedattn
