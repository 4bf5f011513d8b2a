// Going through the columns of a row, a vector at a time: what all layers are made of.
#pragma once

#include "kernel/vector/column_sums.h"
#include "kernel/vector/exp.h"

namespace fusedattn {
namespace {

// The columns of a row, W at a time: body(column, lanes).
template <class T, class F> FA_INLINE void for_columns(index_t width, F&& body) {
  index_t c = 0;
  for (; c + W<T> <= width; c += W<T>) body(c, W<T>);
  if (c < width) body(c, int(width - c));
}
template <class T> FA_INLINE Vec<T> load_lanes(const T* p, int lanes) {
  return lanes == W<T> ? load(p) : load_n(p, lanes);
}
template <class T> FA_INLINE void store_lanes(T* p, Vec<T> v, int lanes) {
  if (lanes == W<T>)
    store(p, v);
  else
    store_n(p, v, lanes);
}
// Lanes n and above taken from `other`.
template <class T> FA_INLINE Vec<T> lanes_or(Vec<T> v, Vec<T> other, int n) {
  Vec<T> lane;
  FA_UNROLL
  for (int i = 0; i < W<T>; i++) lane[i] = T(i);
  return lane < splat(T(n)) ? v : other;
}
template <class T> FA_INLINE Vec<T> lanes_below(Vec<T> v, int n) {
  return lanes_or<T>(v, Vec<T>{}, n);
}
template <class T> FA_INLINE Vec<T> square_root(Vec<T> x) {
#if FUSEDATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  else
    return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif FUSEDATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else
    return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  Vec<T> y;
  FA_UNROLL
  for (int i = 0; i < W<T>; i++)
    y[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(x[i]))) : T(__builtin_sqrt(double(x[i])));
  return y;
#endif
}
template <class T> FA_INLINE T* row_of(const Matrix& m, index_t r) {
  return reinterpret_cast<T*>(m.data + r * m.row);
}
template <class T> FA_INLINE Vec<T> magnitude(Vec<T> x) {
  return (Vec<T>)((IntVec<T>)x & ~(IntVec<T>)splat(T(-0.0)));
}
template <class T> FA_INLINE Vec<T> exp_of(Vec<T> x) {
  return exp2<T>(x * splat(T(LOG2E)));
}

}  // namespace
}  // namespace fusedattn
