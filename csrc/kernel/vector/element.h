// Storage types. A 16-bit type is widened when it is read, computed in float32 and rounded once, to
// nearest even, when the result is written.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
template <class E> struct ComputeOf {
  using type = float;
};
template <> struct ComputeOf<double> {
  using type = double;
};
template <class E> using Compute = typename ComputeOf<E>::type;

typedef uint32_t Words __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves
    __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES / 2), aligned(2), may_alias));

FA_INLINE Vec<float> widen(Halves h, BFloat) {
#if FUSEDATTN_VECTOR_BYTES == 64  // GCC 12 would convert it in halves
  return (Vec<float>)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#else
  return (Vec<float>)(__builtin_convertvector(h, Words) << 16);
#endif
}
FA_INLINE Halves narrow(Vec<float> x, BFloat) {
  const Words w = (Words)x;
  const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? (w >> 16) | 0x40 : rounded, Halves);
}

FA_INLINE Vec<float> widen(Halves h, Half) {
#if FUSEDATTN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif FUSEDATTN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16((float16x4_t)h);
#else
  const Words w = __builtin_convertvector(h, Words), magnitude = w & 0x7fff;
  const Words normal = (magnitude << 13) + (112u << 23);
  const Words subnormal =
      (Words)((Vec<float>)(magnitude + 0x3f000000) - splat(0.5f));  // see narrow
  const Words finite = magnitude < 0x400 ? subnormal : normal;
  return (Vec<float>)((magnitude >= 0x7c00 ? normal | 0x7f800000 : finite) | ((w & 0x8000) << 16));
#endif
}
FA_INLINE Halves narrow(Vec<float> x, Half) {
#if FUSEDATTN_VECTOR_BYTES == 64
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif FUSEDATTN_VECTOR_BYTES == 32
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
  const Words w = (Words)x, magnitude = w & 0x7fffffff;
  const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const Words subnormal = (Words)((Vec<float>)magnitude + splat(0.5f)) -
                          0x3f000000;  // 0.5 has the spacing of subnormals
  Words r = magnitude < 0x38800000 ? subnormal : normal;
  r = magnitude >= 0x477ff000 ? r * 0 + 0x7c00 : r;
  r = magnitude > 0x7f800000 ? r * 0 + 0x7e00 : r;
  return __builtin_convertvector(r | ((w >> 16) & 0x8000), Halves);
#endif
}

// W elements at p, which is aligned for E.
template <class E> FA_INLINE Vec<Compute<E>> load_as(const char* p) {
  if constexpr (sizeof(E) == 2)
    return widen((Halves) * reinterpret_cast<const LooseHalves*>(p), E{});
  else
    return load(reinterpret_cast<const E*>(p));
}
template <class E> FA_INLINE void store_as(char* p, Vec<Compute<E>> x) {
  if constexpr (sizeof(E) == 2)
    *reinterpret_cast<LooseHalves*>(p) = narrow(x, E{});
  else
    store(reinterpret_cast<E*>(p), x);
}

// The first n of W elements, `step` bytes apart, at any alignment; the rest reads as 0 and is not
// written.
template <class E> FA_INLINE Vec<Compute<E>> gather_as(const char* p, index_t step, int n) {
  alignas(FUSEDATTN_VECTOR_BYTES) E x[W<Compute<E>>] = {};
  for (int i = 0; i < n; i++) __builtin_memcpy(&x[i], p + i * step, sizeof(E));
  return load_as<E>(reinterpret_cast<const char*>(x));
}
template <class E> FA_INLINE void scatter_as(char* p, index_t step, int n, Vec<Compute<E>> v) {
  alignas(FUSEDATTN_VECTOR_BYTES) E x[W<Compute<E>>];
  store_as<E>(reinterpret_cast<char*>(x), v);
  for (int i = 0; i < n; i++) __builtin_memcpy(p + i * step, &x[i], sizeof(E));
}

// The first n of W elements next to each other; the rest reads as 0 and is not written.
template <class E> FA_INLINE Vec<Compute<E>> load_some(const char* p, int n) {
  if constexpr (sizeof(E) == sizeof(Compute<E>))
    return load_n(reinterpret_cast<const E*>(p), n);
  else
    return gather_as<E>(p, index_t(sizeof(E)), n);
}
template <class E> FA_INLINE void store_some(char* p, Vec<Compute<E>> x, int n) {
  if constexpr (sizeof(E) == sizeof(Compute<E>))
    store_n(reinterpret_cast<E*>(p), x, n);
  else
    scatter_as<E>(p, index_t(sizeof(E)), n, x);
}

}  // namespace
}  // namespace fusedattn
