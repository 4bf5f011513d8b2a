// Activations and their slopes, in place on what a product has just computed.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

// x, or the nearer end of [-20, 20], beyond which slopes are 0 or 1: keeps infinities out.
template <class T> FA_INLINE Vec<T> within_20(Vec<T> x) {
  const Vec<T> end = splat(T(20)), low = x < -end ? -end : x;
  return low > end ? end : low;
}

template <class T> struct Activated {
  Vec<T> y, slope;
};

// y = x Phi(x), slope Phi(x) + x phi(x). float32: Phi by formula 7.1.26 of Abramowitz and Stegun's
// Handbook of Mathematical Functions, |error| < 1e-7; float64: by the library's erf.
template <class T> FA_INLINE Activated<T> gelu(Vec<T> x) {
  const Vec<T> density = exp_of<T>(x * x * splat(T(-0.5)));
  Vec<T> cdf;
  if constexpr (sizeof(T) == 4) {
    const Vec<T> t = splat(T(1)) / fma<T>(magnitude<T>(x),
                                          splat(T(0.3275911 * 0.70710678118654752)), splat(T(1)));
    Vec<T> tail = splat(T(0.5 * 1.061405429));
    tail = fma<T>(tail, t, splat(T(0.5 * -1.453152027)));
    tail = fma<T>(tail, t, splat(T(0.5 * 1.421413741)));
    tail = fma<T>(tail, t, splat(T(0.5 * -0.284496736)));
    tail = fma<T>(tail, t, splat(T(0.5 * 0.254829592)));
    tail = tail * t * density;  // Phi(-|x|)
    cdf = x < splat(T(0)) ? tail : splat(T(1)) - tail;
  } else {
    for (int i = 0; i < W<T>; i++) cdf[i] = 0.5 * __builtin_erfc(-0.70710678118654752 * x[i]);
  }
  return {x * cdf, fma<T>(within_20<T>(x) * splat(T(0.3989422804014327)), density, cdf)};
}

// y = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), s the logistic function: the same as
// x (1 + tanh(u)) / 2.
template <class T> FA_INLINE Activated<T> gelu_tanh(Vec<T> x) {
  constexpr double c = 2 * 0.79788456080286536;
  const Vec<T> x2 = x * x;
  const Vec<T> u = x * fma<T>(x2, splat(T(c * 0.044715)), splat(T(c)));
  const Vec<T> e = exp_of<T>(-magnitude<T>(u));
  const Vec<T> larger = splat(T(1)) / (splat(T(1)) + e), smaller = e * larger;
  const Vec<T> s = u < splat(T(0)) ? smaller : larger;
  const Vec<T> z = within_20<T>(x), du = fma<T>(z * z, splat(T(3 * c * 0.044715)), splat(T(c)));
  return {x * s, fma<T>(z * du, larger * smaller, s)};
}

// max(x, 0); the slope at 0 is 0. NaN stays.
template <class T> FA_INLINE Activated<T> relu(Vec<T> x) {
  const Vec<T> zero{};
  return {x <= zero ? zero : x, x <= zero ? zero : splat(T(1))};
}

template <class T, class F>
FA_INLINE void activate(const Product& p, index_t i0, index_t rows, index_t j, index_t columns,
                        F&& f) {
  for (index_t i = i0; i < i0 + rows; i++) {
    T* y = row_of<T>(p.c, i) + j;
    T* slope = p.slope.data ? row_of<T>(p.slope, i) + j : nullptr;
    for_columns<T>(columns, [&](index_t c, int lanes) FA_LAMBDA {
      const Activated<T> a = f(load_lanes(y + c, lanes));
      store_lanes(y + c, a.y, lanes);
      if (slope) store_lanes(slope + c, a.slope, lanes);
    });
  }
}

// Rows and columns of c that a product has just computed.
template <class T>
FA_NOINLINE void finish_tile(const Product& p, index_t i0, index_t rows, index_t j,
                             index_t columns) {
  switch (p.then) {
    case Then::nothing:
      break;
    case Then::relu:
      activate<T>(p, i0, rows, j, columns, [](Vec<T> x) FA_LAMBDA { return relu<T>(x); });
      break;
    case Then::gelu:
      activate<T>(p, i0, rows, j, columns, [](Vec<T> x) FA_LAMBDA { return gelu<T>(x); });
      break;
    case Then::gelu_tanh:
      activate<T>(p, i0, rows, j, columns, [](Vec<T> x) FA_LAMBDA { return gelu_tanh<T>(x); });
      break;
    case Then::times:
      for (index_t i = i0; i < i0 + rows; i++) {
        T* y = row_of<T>(p.c, i) + j;
        const T* slope = row_of<T>(p.slope, i) + j;
        for_columns<T>(columns, [&](index_t c, int lanes) FA_LAMBDA {
          store_lanes(y + c, load_lanes(y + c, lanes) * load_lanes(slope + c, lanes), lanes);
        });
      }
  }
}

template <class T> FA_ENTRY void activate_rows(const Product& p, index_t begin, index_t end) {
  finish_tile<T>(p, begin, end - begin, 0, p.n);
}

}  // namespace
}  // namespace fusedattn
