// tanh, for softcap and the GELU. Vectors go in step: the chain is so long that the processor does
// not look past it for the next one.

// a / b for b neither 0 nor infinite, within 1 ulp. Where a vector's division takes as long as 32
// multiply-adds (Intel), by one step of Newton's from 14 bits.
template <class T> FA_INLINE Vec<T> quotient(Vec<T> a, Vec<T> b) {
#if defined(FUSEDATTN_AMX)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> r = (Vec<T>)_mm512_maskz_rcp14_ps(0xffff, (__m512)b), q = a * r;
    return fma<T>(r, fma<T>(-b, q, a), q);
  }
#endif
  return a / b;
}

#if FUSEDATTN_VECTOR_BYTES == 64
// Where a register holds 16 numbers a table of 32 is two of them, and tanh(|x|) a polynomial of
// degree 5 about the nearest multiple of STEP: 17 operations. The polynomials go through 6
// Chebyshev nodes; about 0 it is x times one of x^2, through 3. Relative error below 1.2e-7.
struct TanhTable {
  static constexpr int intervals = 32, degree = 5;
  static constexpr double step = 9.0 / 32;
  alignas(64) float c[degree + 1][intervals];  // of x^0, x^1, ...
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
    for (int k = 0; k < 6; k++) t.c[k][i] = float(i > 0 ? c[k] : k % 2 ? c[k / 2] : 0);
  }
  for (int k = 0; k < 6; k++) t.c[k][TanhTable::intervals - 1] = k > 0 ? 0 : 1;  // from 8.6 on
  return t;
}
inline constexpr TanhTable TANH_TABLE = make_tanh_table();

template <int N> FA_INLINE void tanh_by_table(Vec<float> (&x)[N]) {
  using T = float;
  constexpr T step = T(TanhTable::step), most = T(31 * TanhTable::step);
  const Vec<T> magic = splat(Bits<T>::round_magic);
  const auto at = [](int k, Vec<T> interval) __attribute__((always_inline)) {
    return (Vec<T>)_mm512_permutex2var_ps((__m512)load(TANH_TABLE.c[k]), (__m512i)interval,
                                          (__m512)load(TANH_TABLE.c[k] + W<T>));
  };
  Vec<T> size[N], interval[N], y[N];
  FA_UNROLL
  for (int i = 0; i < N; i++)
    size[i] = min_or_second<T>(splat(most), (Vec<T>)((IntVec<T>)x[i] & 0x7fffffff));
  FA_UNROLL
  for (int i = 0; i < N; i++) {
    interval[i] = fma<T>(size[i], splat(1 / step), magic);  // its number in the lowest bits
    size[i] = fma<T>(interval[i] - magic, splat(-step), size[i]);
    y[i] = at(TanhTable::degree, interval[i]);
  }
  FA_UNROLL
  for (int k = TanhTable::degree - 1; k >= 0; k--) FA_UNROLL
  for (int i = 0; i < N; i++) y[i] = fma<T>(y[i], size[i], at(k, interval[i]));
  FA_UNROLL
  for (int i = 0; i < N; i++)
    x[i] = (Vec<T>)((IntVec<T>)y[i] | ((IntVec<T>)x[i] & typename Bits<T>::type(1u << 31)));
}
#endif

// x = tanh(x), at most 4 ulp in float32. By m / (m + 2) with m = exp(2 x) - 1, which keeps its
// digits near 0: m = 2^n (2^f - 1) + (2^n - 1), and 2^f - 1 is f times a polynomial.
template <class T, int N> FA_INLINE void tanh_in_step(Vec<T> (&x)[N]) {
#if FUSEDATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return tanh_by_table(x);
#endif
  using B = Bits<T>;
  const Vec<T> limit = splat(T((sizeof(T) == 4 ? 20 : 40) * LOG2E)), one = splat(T(1)),
               magic = splat(B::round_magic);
  Vec<T> z[N], p[N];
  FA_UNROLL
  for (int i = 0; i < N; i++)
    x[i] = min_or_second<T>(limit, max_or_second<T>(-limit, x[i] * splat(T(2 * LOG2E))));
  FA_UNROLL
  for (int i = 0; i < N; i++) z[i] = x[i] + magic, x[i] -= z[i] - magic;
  exp2m1_ratio_in_step<T>(x, p);
  FA_UNROLL
  for (int i = 0; i < N; i++) {
    const Vec<T> power = (Vec<T>)(((IntVec<T>)z[i] << B::mantissa) +
                                  (typename B::type(B::bias) << B::mantissa));  // 2^n
    x[i] = fma<T>(p[i] * x[i], power, power - one);
  }
  FA_UNROLL
  for (int i = 0; i < N; i++) x[i] = quotient<T>(x[i], x[i] + splat(T(2)));
}
template <class T> FA_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> one[1] = {x};
  tanh_in_step<T>(one);
  return one[0];
}
