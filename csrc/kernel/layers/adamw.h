// AdamW (Loshchilov and Hutter, arXiv:1711.05101), one pass over parameters, moments and gradients.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

template <class T> FA_ENTRY void adamw(const AdamW& a, index_t begin, index_t end) {
  T *p = static_cast<T*>(a.p) + begin, *m = static_cast<T*>(a.m) + begin,
    *v = static_cast<T*>(a.v) + begin;
  const T* g = static_cast<const T*>(a.g) + begin;
  const Vec<T> scale = splat(T(a.scale)), b1 = splat(T(a.b1)), b2 = splat(T(a.b2)),
               fresh1 = splat(T(1.0 - a.b1)), fresh2 = splat(T(1.0 - a.b2)),
               rate = splat(T(a.rate)), root = splat(T(a.root)), shrink = splat(T(a.shrink)),
               eps = splat(T(a.eps));
  for_columns<T>(end - begin, [&](index_t c, int lanes) FA_LAMBDA {
    const Vec<T> gradient = load_lanes(g + c, lanes) * scale;
    const Vec<T> mean = fma<T>(load_lanes(m + c, lanes), b1, gradient * fresh1);
    const Vec<T> square = fma<T>(load_lanes(v + c, lanes), b2, gradient * gradient * fresh2);
    store_lanes(m + c, mean, lanes);
    store_lanes(v + c, square, lanes);
    const Vec<T> step = mean * rate / fma<T>(square_root<T>(square), root, eps);
    store_lanes(p + c, load_lanes(p + c, lanes) * shrink - step, lanes);
  });
}

}  // namespace
}  // namespace fusedattn
