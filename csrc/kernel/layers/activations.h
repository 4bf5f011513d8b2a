// Activations and their slopes, in place on what a product has just computed.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"
#include "kernel/vector/tanh.h"

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

// exp(a^2 / 2) Phi(-a) for 0 <= a <= 40: a polynomial in s = (a - 5.5) / (a + 5.5), through 22
// Chebyshev nodes, over a + 5.5. Relative error below 4e-16, most of it from rounding.
FA_INLINE Vec<double> scaled_tail(Vec<double> a) {
  const double c[22] = {-2.6089786072799307e-09, -5.741271549765598e-09,  2.2933730888048783e-08,
                        5.0471537980641335e-08,  -1.7745106516978097e-07, -2.679978329902207e-07,
                        1.4836476894253894e-06,  4.4646680155067967e-07,  -1.2118743512648596e-05,
                        1.6319949812801757e-05,  7.141478739249692e-05,   -0.0003245226482919879,
                        0.0002696040163971622,   0.0024429826748350683,   -0.013923510567905448,
                        0.04509758081477901,     -0.10970308995854398,    0.21787243285796895,
                        -0.3670490652936261,     0.5355964890624945,      -0.685183420574338,
                        0.7737696342764068};
  const Vec<double> share = splat(1.0) / (a + splat(5.5)), s = (a - splat(5.5)) * share;
  Vec<double> p = splat(c[0]);
  FA_UNROLL
  for (int i = 1; i < 22; i++) p = fma<double>(p, s, splat(c[i]));
  return p * share;
}

// y = x Phi(x), slope Phi(x) + x phi(x). float32: Phi by formula 7.1.26 of Abramowitz and Stegun's
// Handbook of Mathematical Functions, |error| < 1e-7. float64: by scaled_tail, |error| < 2e-16;
// no library's erf, whose bits depend on the library.
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
    const Vec<T> tail = density * scaled_tail(min_or_second<T>(splat(T(40)), magnitude<T>(x)));
    cdf = x < splat(T(0)) ? tail : splat(T(1)) - tail;
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

template <class T> FA_INLINE Activated<T> tanh_activation(Vec<T> x) {
  const Vec<T> y = tanh<T>(x);
  return {y, splat(T(1)) - y * y};
}

// max(x, 0); the slope at 0 is 0. NaN stays.
template <class T> FA_INLINE Activated<T> relu(Vec<T> x) {
  const Vec<T> zero{};
  return {x <= zero ? zero : x, x <= zero ? zero : splat(T(1))};
}

// Calls f<then>(), or nothing where nothing is to be done.
template <class F> FA_INLINE void with_then(Then then, F&& f) {
  switch (then) {
    case Then::nothing:
      return;
    case Then::relu:
      return f.template operator()<Then::relu>();
    case Then::gelu:
      return f.template operator()<Then::gelu>();
    case Then::gelu_tanh:
      return f.template operator()<Then::gelu_tanh>();
    case Then::tanh:
      return f.template operator()<Then::tanh>();
    case Then::times:
      return f.template operator()<Then::times>();
  }
}
template <class T, Then THEN> FA_INLINE Activated<T> activated(Vec<T> x) {
  if constexpr (THEN == Then::relu) return relu<T>(x);
  if constexpr (THEN == Then::gelu) return gelu<T>(x);
  if constexpr (THEN == Then::gelu_tanh) return gelu_tanh<T>(x);
  if constexpr (THEN == Then::tanh) return tanh_activation<T>(x);
}
// N vectors x of a row of C, the last of them `last` lanes wide, become what THEN makes of them.
// slope: of an activation, kept for the backward pass unless it is null; or what is multiplied by.
// All vectors go through a step before any goes on, so that their latencies overlap.
template <class T, Then THEN, int N> FA_INLINE void activate(Vec<T> (&x)[N], T* slope, int last) {
  const auto each = [&](auto&& f) FA_LAMBDA {
    FA_UNROLL
    for (int v = 0; v < N; v++) f(v, v * W<T>, v == N - 1 ? last : W<T>);
  };
  if constexpr (THEN == Then::times) {
    each([&](int v, index_t at, int lanes)
             FA_LAMBDA { x[v] = x[v] * load_lanes(slope + at, lanes); });
  } else {
    Activated<T> y[N];
    each([&](int v, index_t, int) FA_LAMBDA { y[v] = activated<T, THEN>(x[v]); });
    each([&](int v, index_t, int) FA_LAMBDA { x[v] = y[v].y; });
    if (slope)
      each([&](int v, index_t at, int lanes)
               FA_LAMBDA { store_lanes(slope + at, y[v].slope, lanes); });
  }
}

// Rows and columns of C that are in memory already.
template <class T>
FA_NOINLINE void activate_tile(const Product& p, index_t i0, index_t rows, index_t j,
                               index_t columns) {
  with_then(p.then, [&]<Then THEN>() FA_LAMBDA {
    for (index_t i = i0; i < i0 + rows; i++) {
      T* c = row_of<T>(p.c, i) + j;
      T* slope = p.slope.data ? row_of<T>(p.slope, i) + j : nullptr;
      for_columns<T>(columns, [&](index_t at, int lanes) FA_LAMBDA {
        Vec<T> x[1] = {load_lanes(c + at, lanes)};
        activate<T, THEN>(x, slope ? slope + at : nullptr, lanes);
        store_lanes(c + at, x[0], lanes);
      });
    }
  });
}

template <class T> FA_ENTRY void activate_rows(const Product& p, index_t begin, index_t end) {
  activate_tile<T>(p, begin, end - begin, 0, p.n);
}

}  // namespace
}  // namespace fusedattn
