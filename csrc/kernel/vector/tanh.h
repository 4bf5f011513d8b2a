// tanh, for softcap and the GELU.
#pragma once

#include "kernel/vector/exp.h"

namespace fusedattn {
namespace {

// float32: tanh(|x|) is a polynomial of degree 5 about the nearest multiple of STEP. The
// polynomials go through 6 Chebyshev nodes; about 0 it is x times one of x^2, through 3. Relative
// error below 1.2e-7.
//
// A register of 16 numbers holds half of a coefficient's table, so that AVX-512 takes 17 operations
// for 16 numbers. Narrower sets, which give the same bits, fetch each lane's six coefficients and
// transpose them; with AVX2 a register holds the first quarter of a table, which is enough where no
// lane is beyond 2.1, as few logits are beyond twice their softcap.
struct TanhTable {
  static constexpr int intervals = 32, degree = 5;
  static constexpr double step = 9.0 / 32;
#if FUSEDATTN_VECTOR_BYTES == 64
  alignas(64) float c[degree + 1][intervals];  // of x^0, x^1, ...
  constexpr float& at(int interval, int k) { return c[k][interval]; }
#else
  alignas(64) float c[intervals][8];  // the last two are nothing
  constexpr float& at(int interval, int k) { return c[interval][k]; }
#endif
};
constexpr double exact_tanh(double x) {
  double e = 1;  // exp(2 x / 64)
  for (int n = 20; n > 0; n--) e = 1 + e * (2 * x / 64) / n;
  for (int i = 0; i < 6; i++) e *= e;
  return (e - 1) / (e + 1);
}
// c = coefficients of the polynomial through n points (Newton's divided differences).
constexpr void interpolate(int n, const double* x, double* y, double* c) {
  for (int k = 1; k < n; k++)
    for (int i = n - 1; i >= k; i--) y[i] = (y[i] - y[i - 1]) / (x[i] - x[i - k]);
  for (int i = 0; i < n; i++) c[i] = 0;
  for (int i = n - 1; i >= 0; i--) {
    for (int k = n - 1; k > 0; k--) c[k] = c[k - 1] - x[i] * c[k];
    c[0] = y[i] - x[i] * c[0];
  }
}
constexpr TanhTable make_tanh_table() {
  constexpr double node[] = {-0.9659258262890683, -0.7071067811865476, -0.2588190451025207,
                             0.2588190451025207,  0.7071067811865476,  0.9659258262890683},
                   node_of_3[] = {-0.8660254037844386, 0, 0.8660254037844386};
  constexpr double half = TanhTable::step / 2;
  TanhTable t{};
  for (int i = 0; i < TanhTable::intervals; i++) {
    double x[6] = {}, y[6] = {}, c[6] = {};
    for (int k = 0; k < 6; k++) x[k] = node[k] * half, y[k] = exact_tanh(i * 2 * half + x[k]);
    if (i > 0) interpolate(6, x, y, c);
    for (int k = 0; k < 3 && i == 0; k++) {
      x[k] = (node_of_3[k] + 1) / 2 * half * half;
      double root = half;  // of x[k]
      for (int n = 0; n < 20; n++) root = (root + x[k] / root) / 2;
      y[k] = exact_tanh(root) / root;
    }
    if (i == 0) interpolate(3, x, y, c);
    for (int k = 0; k < 6; k++) t.at(i, k) = float(i > 0 ? c[k] : k % 2 ? c[k / 2] : 0);
  }
  for (int k = 0; k < 6; k++) t.at(TanhTable::intervals - 1, k) = k > 0 ? 0 : 1;  // from 8.6 on
  return t;
}
inline constexpr TanhTable TANH_TABLE = make_tanh_table();

// c[k] = coefficient k of the interval whose number is in the lowest bits of each lane.
using TanhCoefficients = Vec<float>[TanhTable::degree + 1];
#if FUSEDATTN_VECTOR_BYTES == 64
FA_INLINE void look_up(TanhCoefficients& c, Vec<float> interval) {
  FA_UNROLL
  for (int k = 0; k <= TanhTable::degree; k++) {
    const float* own = TANH_TABLE.c[k];
    c[k] = (Vec<float>)_mm512_permutex2var_ps((__m512)load(own), (__m512i)interval,
                                              (__m512)load(own + W<float>));
  }
}
#else
inline constexpr int NEAR_INTERVALS = 8;  // intervals
constexpr auto make_near_table() {
  struct {
    alignas(32) float c[TanhTable::degree + 1][NEAR_INTERVALS];
  } t{};
  for (int k = 0; k <= TanhTable::degree; k++)
    for (int i = 0; i < NEAR_INTERVALS; i++) t.c[k][i] = TANH_TABLE.c[i][k];
  return t;
}
inline constexpr auto NEAR_TABLE = make_near_table();

typedef float Four __attribute__((vector_size(16)));
template <int... I> FA_INLINE Vec<float> joined(Four a, Four b, Seq<I...>) {
  return __builtin_shufflevector(a, b, I...);
}
FA_INLINE void look_up(TanhCoefficients& c, Vec<float> interval) {
  using Lanes = typename MakeSeq<VecOf<float>::width>::type;
  const IntVec<float> row = (IntVec<float>)interval & (TanhTable::intervals - 1);
#if FUSEDATTN_VECTOR_BYTES == 32
  if (!any_lane<float>(row & -NEAR_INTERVALS)) {
    FA_UNROLL
    for (int k = 0; k <= TanhTable::degree; k++)
      c[k] = (Vec<float>)_mm256_permutevar8x32_ps((__m256)load(NEAR_TABLE.c[k]), (__m256i)row);
    return;
  }
#endif
  // Offsets in bytes leave their register two at a time.
  const Wide offsets = (Wide)(row * int32_t(sizeof(TANH_TABLE.c[0])));
  const char* table = reinterpret_cast<const char*>(&TANH_TABLE);
  FA_UNROLL
  for (int half = 0; half < 2; half++) {  // coefficients 0 to 3, 4 and 5
    const auto four_of = [&](int i) FA_LAMBDA {
      const uint64_t offset = i % 2 ? offsets[i / 2] >> 32 : uint32_t(offsets[i / 2]);
      return *reinterpret_cast<const Four*>(table + offset + half * int(sizeof(Four)));
    };
    Vec<float> lane[4];
    FA_UNROLL
    for (int i = 0; i < 4; i++) lane[i] = joined(four_of(i), four_of((i + 4) % W<float>), Lanes{});
    transpose_squares<float>(lane);
    FA_UNROLL
    for (int i = 0; i < 4; i++)
      if (4 * half + i <= TanhTable::degree) c[4 * half + i] = lane[i];
  }
}
#endif

FA_INLINE Vec<float> tanh_by_table(Vec<float> x) {
  using T = float;
  constexpr T step = T(TanhTable::step), most = T(31 * TanhTable::step);
  const Vec<T> size = min_or_second<T>(splat(most), (Vec<T>)((IntVec<T>)x & 0x7fffffff));
  const Vec<T> magic = splat(Bits<T>::round_magic);
  const Vec<T> interval = fma<T>(size, splat(1 / step), magic);  // its number in the lowest bits
  const Vec<T> rest = fma<T>(interval - magic, splat(-step), size);
  TanhCoefficients c;
  look_up(c, interval);
  Vec<T> y = c[TanhTable::degree];
  FA_UNROLL
  for (int k = TanhTable::degree - 1; k >= 0; k--) y = fma<T>(y, rest, c[k]);
  const IntVec<T> sign = (IntVec<T>)x & typename Bits<T>::type(1u << 31);
  return (Vec<T>)((IntVec<T>)y | sign);
}

// float64: at most 4 ulp. By m / (m + 2) with m = exp(2 x) - 1, which keeps its digits near 0:
// m = 2^n (2^f - 1) + (2^n - 1), and 2^f - 1 is f times a polynomial.
template <class T> FA_INLINE Vec<T> tanh(Vec<T> x) {
  if constexpr (sizeof(T) == 4) return tanh_by_table(x);
  using B = Bits<T>;
  const Vec<T> limit = splat(T(40 * LOG2E)), one = splat(T(1)), magic = splat(B::round_magic);
  const Vec<T> t = min_or_second<T>(limit, max_or_second<T>(-limit, x * splat(T(2 * LOG2E))));
  const Vec<T> z = t + magic, f = t - (z - magic);
  const Vec<T> power =
      (Vec<T>)(((IntVec<T>)z << B::mantissa) + (typename B::type(B::bias) << B::mantissa));  // 2^n
  const Vec<T> m = fma<T>(exp2m1_ratio<T>(f) * f, power, power - one);
  return m / (m + splat(T(2)));
}

}  // namespace
}  // namespace fusedattn
