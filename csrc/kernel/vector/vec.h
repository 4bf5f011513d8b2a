// Vectors of one instruction set, as GNU vector extensions with intrinsics only where the compiler
// needs telling. How wide they are follows from the compiler's flags, which CMakeLists.txt gives to
// isa/NAME.cpp. All of the kernel has internal linkage, so that code compiled for one instruction
// set never runs for another, and uses nothing of std.
#pragma once

#include "kernel/task.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Bytes of a vector, and how many registers hold one.
#if defined(__AVX512F__)
#define FUSEDATTN_VECTOR_BYTES 64
#define FUSEDATTN_REGISTERS 32
#elif defined(__AVX2__)
#define FUSEDATTN_VECTOR_BYTES 32
#define FUSEDATTN_REGISTERS 16
#elif defined(__aarch64__)
#define FUSEDATTN_VECTOR_BYTES 16
#define FUSEDATTN_REGISTERS 32
#else
#define FUSEDATTN_VECTOR_BYTES 16
#define FUSEDATTN_REGISTERS 16
#endif

#define FA_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#define FA_INLINE_MEMBER inline __attribute__((always_inline))
#define FA_LAMBDA __attribute__((always_inline))
#define FA_NOINLINE [[maybe_unused]] static __attribute__((noinline))
#define FA_ENTRY [[maybe_unused]] static  // what a table of functions points to
#define FA_UNROLL _Pragma("GCC unroll 16")

namespace fusedattn {
namespace {

FA_INLINE index_t min_index(index_t a, index_t b) {
  return a < b ? a : b;
}
FA_INLINE index_t max_index(index_t a, index_t b) {
  return a > b ? a : b;
}

template <class T> struct VecOf {
  static constexpr int width = FUSEDATTN_VECTOR_BYTES / int(sizeof(T));
  typedef T type __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
  typedef T loose
      __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <> struct VecOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
};
template <> struct VecOf<int64_t> {
  typedef int64_t type __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
};
template <class T> using Vec = typename VecOf<T>::type;
template <class T> inline constexpr int W = VecOf<T>::width;

template <class T> struct Bits;
template <> struct Bits<float> {
  using type = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -3.4028234663852886e38f, infinity = __builtin_huge_valf();
};
template <> struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;
  static constexpr double lowest = -1.7976931348623157e308, infinity = __builtin_huge_val();
};
template <class T> using IntVec = Vec<typename Bits<T>::type>;

template <class T> FA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T> FA_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::loose*>(p);
}
template <class T> FA_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::loose*>(p) = v;
}

typedef uint64_t Wide __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
inline constexpr int WIDE = FUSEDATTN_VECTOR_BYTES / 8;

// 0, 1, 2, ...
template <class T> FA_INLINE Vec<T> lane_numbers() {
  Vec<T> v{};
  FA_UNROLL
  for (int i = 0; i < W<T>; i++) v[i] = T(i);
  return v;
}

// The first n of W elements (0 <= n <= W); the rest read as 0 and are not written.
#if FUSEDATTN_VECTOR_BYTES == 64
FA_INLINE Vec<float> load_n(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FA_INLINE Vec<double> load_n(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
FA_INLINE void store_n(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
FA_INLINE void store_n(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#else
template <class T> FA_INLINE Vec<T> load_n(const T* p, int n) {
  Vec<T> v{};
  __builtin_memcpy(&v, p, size_t(n) * sizeof(T));
  return v;
}
template <class T> FA_INLINE void store_n(T* p, Vec<T> v, int n) {
  __builtin_memcpy(p, &v, size_t(n) * sizeof(T));
}
#endif

// a * b + c, rounded once where the instruction set can.
template <class T> FA_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if FUSEDATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FUSEDATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else
    return (Vec<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// The larger of a and b; b where either is NaN (so that a NaN in `b` survives and one in `a` does
// not). The all-ones masks here and in exp2 cost nothing; the unmasked forms make GCC 12 warn of an
// uninitialised operand of its own.
template <class T> FA_INLINE Vec<T> max_or_second(Vec<T> a, Vec<T> b) {
#if FUSEDATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif FUSEDATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of a and b; b where either is NaN.
template <class T> FA_INLINE Vec<T> min_or_second(Vec<T> a, Vec<T> b) {
#if FUSEDATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
#elif FUSEDATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// GCC would otherwise fold a loaded vector back into a memory operand of every multiply-add that
// uses it.
template <class V> FA_INLINE void keep_in_register(V& v) {
#if defined(__GNUC__) && !defined(__clang__)
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
#endif
  (void)v;
}

FA_INLINE void prefetch_near(const void* p) {
  __builtin_prefetch(p, 0, 3);
}
FA_INLINE void prefetch_far(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

template <bool A, class X, class Y> struct SelectType {
  using type = X;
};
template <class X, class Y> struct SelectType<false, X, Y> {
  using type = Y;
};
template <bool A, class X, class Y> using Select = typename SelectType<A, X, Y>::type;

// Compile-time integer sequence; std's would do, but kernels use nothing of std.
template <int... I> struct Seq {};
template <int N, int... I> struct MakeSeq : MakeSeq<N - 1, N - 1, I...> {};
template <int... I> struct MakeSeq<0, I...> {
  using type = Seq<I...>;
};

// Calls f<n>() for an n of 1 to N that only the run tells; for any other n nothing.
template <int N, class F> FA_INLINE void with_count(index_t n, F&& f) {
  if constexpr (N > 0) {
    if (n == N)
      f.template operator()<N>();
    else
      with_count<N - 1>(n, f);
  }
}

// Lanes whose bit S is clear from a's, set from b's: one half of a butterfly.
template <int S, class V, int... I> FA_INLINE V butterfly_low(V a, V b, Seq<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & S) ? I - S + n : I)...);
}
template <int S, class V, int... I> FA_INLINE V butterfly_high(V a, V b, Seq<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & S) ? I + n : I + S)...);
}

// W integers, `step` bytes apart, as wide as elements; the first n, 0 beyond.
template <class T, class I>
FA_INLINE IntVec<T> load_integers(const char* p, index_t step, index_t n) {
  typedef I Narrow __attribute__((vector_size(W<T> * sizeof(I))));
  Narrow v{};
  if (step == index_t(sizeof(I)) && n >= W<T>) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    I x[W<T>] = {};
    for (index_t i = 0; i < min_index(n, W<T>); i++)
      __builtin_memcpy(x + i, p + i * step, sizeof(I));
    __builtin_memcpy(&v, x, sizeof(v));
  }
  return __builtin_convertvector(v, IntVec<T>);
}

// Transposes W x W elements held in W registers, in log2(W) butterfly stages.
template <class T, int S = W<T> / 2> FA_INLINE void transpose_registers(Vec<T> (&r)[W<T>]) {
  using Lanes = typename MakeSeq<W<T>>::type;
  FA_UNROLL
  for (int i = 0; i < W<T>; i++) {
    if (i & S) continue;
    const Vec<T> a = r[i], b = r[i + S];
    r[i] = butterfly_low<S>(a, b, Lanes{});
    r[i + S] = butterfly_high<S>(a, b, Lanes{});
  }
  if constexpr (S > 1) transpose_registers<T, S / 2>(r);
}

// Within each four lanes: a0 b0 a1 b1, or with HIGH a2 b2 a3 b3.
template <int HIGH, class V, int... I> FA_INLINE V zip_lanes(V a, V b, Seq<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + 2 * HIGH + I % 4 / 2 + I % 2 * n)...);
}
// Within each four lanes: a0 a1 b0 b1, or with HIGH a2 a3 b2 b3.
template <int HIGH, class V, int... I> FA_INLINE V zip_pairs(V a, V b, Seq<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + 2 * HIGH + I % 2 + I % 4 / 2 * n)...);
}

// Transposes the square of elements that each 16 bytes of a few registers hold.
template <class T> inline constexpr int SQUARE = 16 / int(sizeof(T));
template <class T> FA_INLINE void transpose_squares(Vec<T> (&r)[SQUARE<T>]) {
  using Lanes = typename MakeSeq<W<T>>::type;
  if constexpr (SQUARE<T> == 2) {
    const Vec<T> a = r[0], b = r[1];
    r[0] = butterfly_low<1>(a, b, Lanes{});
    r[1] = butterfly_high<1>(a, b, Lanes{});
  } else {
    const Vec<T> low[2] = {zip_lanes<0>(r[0], r[1], Lanes{}), zip_lanes<0>(r[2], r[3], Lanes{})},
                 high[2] = {zip_lanes<1>(r[0], r[1], Lanes{}), zip_lanes<1>(r[2], r[3], Lanes{})};
    r[0] = zip_pairs<0>(low[0], low[1], Lanes{});
    r[1] = zip_pairs<1>(low[0], low[1], Lanes{});
    r[2] = zip_pairs<0>(high[0], high[1], Lanes{});
    r[3] = zip_pairs<1>(high[0], high[1], Lanes{});
  }
}

// Sum over lanes, in their order. Its bits depend on W; ColumnSums' do not.
template <class T> FA_INLINE T sum_lanes(Vec<T> v) {
  T s = v[0];
  for (int i = 1; i < W<T>; i++) s += v[i];
  return s;
}

// Is any lane of a mask set?
template <class T> FA_INLINE bool any_lane(IntVec<T> mask) {
#if FUSEDATTN_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif FUSEDATTN_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const Wide wide = (Wide)mask;
  uint64_t any = 0;
  for (int i = 0; i < WIDE; i++) any |= wide[i];
  return any != 0;
#endif
}

}  // namespace
}  // namespace fusedattn
