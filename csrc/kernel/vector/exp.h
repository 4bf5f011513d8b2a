// 2^t for vectors. t = n + f with n an integer and f in [-1/2, 1/2]; a minimax polynomial (Remez,
// relative error, constant term 1) for 2^f; the exponent added by hand. Relative error below 2.1
// ulp in float32, 1.1 ulp in float64. -inf gives exactly 0, NaN stays NaN, results below the
// smallest normal number are 0. From t = 127.5 (1023.5 in float64) on instruction sets differ: only
// a log-sum-exp that is not that of its logits leads there.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

inline constexpr float LOG2E_F = 1.4426950408889634f;
inline constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// (2^f - 1) / f for f in [-1/2, 1/2], minimax in relative error.
template <class T> FA_INLINE Vec<T> exp2m1_ratio(Vec<T> f) {
  const auto horner = [&](const auto& c) FA_LAMBDA {
    Vec<T> p = splat<T>(c[0]);
    FA_UNROLL
    for (int i = 1; i < int(sizeof(c) / sizeof(T)); i++) p = fma<T>(p, f, splat<T>(c[i]));
    return p;
  };
  if constexpr (sizeof(T) == 4) {  // degree 5: 1.1e-8
    const float c[6] = {1.5403512e-04f, 1.3390735e-03f, 9.618238e-03f,
                        5.5503573e-02f, 2.4022649e-01f, 6.931472e-01f};
    return horner(c);
  } else {  // degree 10: 3.4e-18
    const double c[11] = {4.4347712982003767e-10, 7.0737832485031333e-09, 1.0178199571842138e-07,
                          1.3215435282308488e-06, 1.5252733493127489e-05, 1.5403530457112091e-04,
                          1.3333558146774621e-03, 9.6181291075941201e-03, 5.5504108664820083e-02,
                          2.4022650695910131e-01, 6.9314718055994533e-01};
    return horner(c);
  }
}

template <class T> FA_INLINE Vec<T> exp2_polynomial(Vec<T> f) {
  if constexpr (sizeof(T) == 4) {  // degree 5: 9.1e-8
    Vec<T> p = splat<T>(0.0013264727f);
    p = fma<T>(p, f, splat<T>(0.0096715126f));
    p = fma<T>(p, f, splat<T>(0.055507337f));
    p = fma<T>(p, f, splat<T>(0.24022242f));
    p = fma<T>(p, f, splat<T>(0.69314698f));
    return fma<T>(p, f, splat<T>(1.0f));
  } else {  // degree 11: 3.4e-18
    return fma<T>(exp2m1_ratio<T>(f), f, splat<T>(1.0));
  }
}

template <class T> FA_INLINE Vec<T> exp2(Vec<T> t) {
#if FUSEDATTN_VECTOR_BYTES == 64
  // vreduce gives f (0 for an infinite t), vscalef takes care of underflow and of -inf.
  if constexpr (sizeof(T) == 4) {
    const Vec<T> f = (Vec<T>)_mm512_maskz_reduce_ps(0xffff, (__m512)t, 0);
    return (Vec<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)exp2_polynomial<T>(f), (__m512)(t - f));
  } else {
    const Vec<T> f = (Vec<T>)_mm512_maskz_reduce_pd(0xff, (__m512d)t, 0);
    return (Vec<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)exp2_polynomial<T>(f), (__m512d)(t - f));
  }
#else
  using B = Bits<T>;
  t = max_or_second<T>(splat<T>(T(-B::bias)), t);  // 2^-bias is built as exactly 0 below
  const Vec<T> z = t + splat<T>(B::round_magic);
  const Vec<T> f = t - (z - splat<T>(B::round_magic));
  const IntVec<T> power =
      ((IntVec<T>)z << B::mantissa) + (typename B::type(B::bias) << B::mantissa);
  return exp2_polynomial<T>(f) *
         (Vec<T>)power;  // a product keeps NaN; adding to the bits would not
#endif
}

// log2(x) for positive normal x; NaN and inf give NaN. x = 2^e * z with z in [sqrt(1/2), sqrt(2)),
// log(z) = 2 atanh(s) with s = (z - 1) / (z + 1), |s| < 0.172, by its series.
template <class T> FA_INLINE Vec<T> log2_positive(Vec<T> x) {
  using B = Bits<T>;
  using I = IntVec<T>;
  const T sqrt_half = T(0.70710678118654752);
  const I offset = (I)splat(sqrt_half);
  const I e = ((I)x - offset) >> B::mantissa;
  const Vec<T> z = (Vec<T>)((I)x - (e << B::mantissa));
  const Vec<T> s = (z - splat(T(1))) / (z + splat(T(1))), s2 = s * s;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> p = splat(T(1.0 / (2 * terms - 1)));
  FA_UNROLL
  for (int i = terms - 2; i >= 0; i--) p = fma<T>(p, s2, splat(T(1.0 / (2 * i + 1))));
  return fma<T>(p * s, splat(T(2 * LOG2E)), __builtin_convertvector(e, Vec<T>)) + x * splat(T(0));
}

}  // namespace
}  // namespace fusedattn
