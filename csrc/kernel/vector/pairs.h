// bfloat16 multiplied as it is, two elements at a time, where the instruction set can (vdpbf16ps):
// twice the multiply-adds of float32. A "word" is a pair of neighbours along the dimension that is
// summed over, packed in the 32 bits of a float; words are moved, never computed with. The sum is
// kept in float32. The instruction rounds to nearest even and takes subnormal numbers for 0.
//
// Along d the pairs lie as they are in rows of Q, K, V and dout (d even). Along keys or queries two
// rows are interleaved, once a block.
#pragma once

#include "kernel/vector/move.h"

namespace fusedattn {
namespace {

template <class E> inline constexpr bool PAIRS = false;
#if defined(__AVX512BF16__)
template <> inline constexpr bool PAIRS<BFloat> = true;
#endif

// How many operands of a product d elements make.
template <class E> FA_INLINE index_t words(index_t d) {
  return PAIRS<E> ? (d + 1) / 2 : d;
}

// a * b + c; for pairs c + a.low * b.low + a.high * b.high.
template <class E, class T = Compute<E>>
FA_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS<E>) return (Vec<T>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return fma<T>(a, b, c);
}

// An operand for all lanes. A word must not pass through arithmetic, which could change a NaN.
template <class E, class T = Compute<E>> FA_INLINE Vec<T> splat_operand(const T* p) {
  if constexpr (PAIRS<E>) {
    uint32_t w;
    __builtin_memcpy(&w, p, sizeof(w));
    return (Vec<T>)(w - Words{});
  } else {
    return splat(*p);
  }
}

// Can broadcasts read the operands of a row where they are?
template <class E> FA_INLINE bool is_ready(const Matrix& m, index_t cols) {
  if (!PAIRS<E>) return is_ready<E>(m);
  const bool aligned = m.row % 4 == 0 && reinterpret_cast<uintptr_t>(m.data) % 4 == 0;
  return is_native<E>(m) && aligned && cols % 2 == 0 && (m.row % 4096 != 0 || m.row == 0);
}

typedef float LooseWords
    __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES), aligned(2), may_alias));
FA_INLINE Vec<float> load_words(const char* p) {
  return (Vec<float>)*reinterpret_cast<const LooseWords*>(p);
}

#if defined(__AVX512BF16__)

typedef uint16_t Elements __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));

// Words (a[0], b[0]), (a[1], b[1]), ... of elements 0 to 15 (high: 16 to 31) of a and b.
template <bool HIGH, int... I>
FA_INLINE Vec<float> interleaved(Vec<float> a, Vec<float> b, Seq<I...>) {
  constexpr int first = HIGH ? 16 : 0;
  return (Vec<float>)__builtin_shufflevector((Elements)a, (Elements)b,
                                             (first + I / 2 + (I % 2 ? 32 : 0))...);
}
template <bool HIGH> FA_INLINE Vec<float> interleaved(Vec<float> a, Vec<float> b) {
  return interleaved<HIGH>(a, b, typename MakeSeq<32>::type{});
}

// 32 numbers rounded to nearest even: elements in order, 0 to 15 of a, then those of b.
FA_INLINE Vec<float> rounded(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
// Words (a[0], b[0]), (a[1], b[1]), ... of numbers rounded to nearest even.
template <int... I> FA_INLINE Vec<float> zipped(Elements x, Seq<I...>) {
  return (Vec<float>)__builtin_shufflevector(x, x, (I / 2 + (I % 2 ? 16 : 0))...);
}
FA_INLINE Vec<float> rounded_words(Vec<float> a, Vec<float> b) {
  return zipped((Elements)rounded(a, b), typename MakeSeq<32>::type{});
}

FA_INLINE Vec<float> ones_words() {
  return (Vec<float>)(0x3f803f80 - Words{});
}

// Up to 32 elements of a row from column c, as words; 0 beyond the row.
FA_INLINE Vec<float> words_at(const char* row, index_t col, index_t c, index_t cols, bool native) {
  if (native && c + 32 <= cols) return load_words(row + 2 * c);
  alignas(64) BFloat x[32] = {};
  const index_t n = min_index(32, cols - c);
  for (index_t i = 0; i < n; i++) __builtin_memcpy(&x[i], row + (c + i) * col, 2);
  return load_words(reinterpret_cast<const char*>(x));
}

// dst[r][0:ld] = the words of src[r0 + r][0:cols], zeros beyond.
FA_NOINLINE void copy_words(const Matrix& src, index_t r0, index_t rows, index_t cols, float* dst,
                            index_t ld) {
  const bool native = is_native<BFloat>(src);
  for (index_t r = 0; r < rows; r++) {
    const char* p = src.data + (r0 + r) * src.row;
    for (index_t w = 0; w < ld; w += W<float>) {
      const Vec<float> x = 2 * w < cols ? words_at(p, src.col, 2 * w, cols, native) : Vec<float>{};
      store_n(dst + r * ld + w, x, int(min_index(W<float>, ld - w)));
    }
  }
}

// dst[w][r] = word w of src[r0 + r] for r < rows, zeros for r up to a multiple of W.
FA_NOINLINE void pack_words(const Matrix& src, index_t r0, index_t rows, index_t cols, float* dst,
                            index_t ld) {
  const bool native = is_native<BFloat>(src);
  for (index_t r = 0; r < rows; r += W<float>) {
    const int nr = int(min_index(W<float>, rows - r));
    for (index_t w = 0; 2 * w < cols; w += W<float>) {
      const int nw = int(min_index(W<float>, words<BFloat>(cols) - w));
      const char* p = src.data + (r0 + r) * src.row;
      Vec<float> t[W<float>];
      FA_UNROLL
      for (int i = 0; i < W<float>; i++)
        t[i] = i < nr ? words_at(p + i * src.row, src.col, 2 * w, cols, native) : Vec<float>{};
      transpose_registers<float>(t);
      FA_UNROLL
      for (int j = 0; j < W<float>; j++)
        if (j < nw) store(dst + (w + j) * ld + r, t[j]);
    }
  }
}

// dst[c] = (a[c], b[c]) for c < ld (a multiple of W), 0 beyond `cols`; b null: all 0.
FA_INLINE void interleave_two(const char* a, const char* b, index_t col, index_t cols, bool native,
                              float* dst, index_t ld) {
  for (index_t c = 0; c < ld; c += 32) {
    const Vec<float> x = words_at(a, col, c, cols, native);
    const Vec<float> y = b ? words_at(b, col, c, cols, native) : Vec<float>{};
    store(dst + c, interleaved<false>(x, y));
    if (c + W<float> < ld) store(dst + c + W<float>, interleaved<true>(x, y));
  }
}

// dst[i] = rows r0 + 2 i and r0 + 2 i + 1 of src, interleaved; zeros beyond `rows` and `cols`.
FA_NOINLINE void interleave_rows(const Matrix& src, index_t r0, index_t rows, index_t cols,
                                 float* dst, index_t ld) {
  const bool native = is_native<BFloat>(src);
  for (index_t r = 0; r < rows; r += 2) {
    const char* p = src.data + (r0 + r) * src.row;
    interleave_two(p, r + 1 < rows ? p + src.row : nullptr, src.col, cols, native, dst + r / 2 * ld,
                   ld);
  }
}

// x without its low or high elements where their entry of the dense part is -inf.
FA_INLINE Vec<float> masked_words(Vec<float> x, float dense_low, float dense_high) {
  const uint32_t low = dense_low != -Bits<float>::infinity ? 0xffff : 0;
  const uint32_t high = dense_high != -Bits<float>::infinity ? 0xffff0000 : 0;
  return (Vec<float>)((Words)x & (low | high));
}

// Is every element of these words finite?
FA_NOINLINE bool all_finite_words(Rows<float> m, index_t rows, index_t cols) {
  Words not_finite{};
  for (index_t r = 0; r < rows; r++)
    for (index_t c = 0; c < cols; c += W<float>) {
      const Words w = (Words)load_n(m.data + r * m.ld + c, int(min_index(W<float>, cols - c)));
      not_finite |= (Words)((w & 0x7f800000) == 0x7f800000) | (Words)((w & 0x7f80) == 0x7f80);
    }
  uint32_t any = 0;
  for (int i = 0; i < W<float>; i++) any |= not_finite[i];
  return any == 0;
}

#endif

// Rows as operands in scratch: numbers times factor, or words as they are.
template <class E, class T = Compute<E>>
FA_INLINE void copy_operands(const Matrix& src, index_t r0, index_t rows, index_t cols, T factor,
                             T* dst, index_t ld) {
  if constexpr (PAIRS<E>)
    copy_words(src, r0, rows, cols, dst, ld);
  else
    copy_rows<E>(src, r0, rows, cols, factor, dst, ld);
}

}  // namespace
}  // namespace fusedattn
