// Cutting numbers into bfloat16 pieces, and matrices into the operands of tiles.h's products.
// Numbers i and i + 16 of each 32 along a sum make a word, in the operands on both sides: so a word
// is made of two vectors without a shuffle, and one function cuts matrices in all four ways.
// Whatever is computed (P and dS) is cut in the same way.
#pragma once

#include "kernel/amx/tiles.h"
#include "kernel/vector/move.h"

namespace fusedattn {
namespace {

// Pieces of 16 numbers: float32 numbers whose lower 16 bits are 0.
template <int P> struct Cut {
  Vec<float> piece[P];
};
FA_INLINE Vec<float> upper(Vec<float> x) {
  return (Vec<float>)((Words)x & 0xffff0000);
}
// Words (low[i], high[i]) of the upper halves.
FA_INLINE Vec<float> pair_words(Vec<float> low, Vec<float> high) {
  constexpr int high_and_mask_or_low = 0xEA;
  return (Vec<float>)_mm512_ternarylogic_epi32((__m512i)high, _mm512_set1_epi32(-65536),
                                               (__m512i)((Words)low >> 16), high_and_mask_or_low);
}
// P and dS of 16-bit types: bfloat16 takes them rounded to one piece, float16 as they are.
template <class E> inline constexpr int COMPUTED = PIECES<E> == 1 ? 1 : 3;

// The lower halves of the last piece may be anything: pair_words drops them.
template <int P> FA_INLINE void store_words(char* at, index_t piece, Cut<P> low, Cut<P> high) {
  FA_UNROLL
  for (int n = 0; n < P; n++)
    store(reinterpret_cast<float*>(at + n * piece), pair_words(low.piece[n], high.piece[n]));
}
// One piece is rounded to nearest, several are truncated. NaN stays NaN.
template <int P> FA_INLINE Cut<P> cut_computed(Vec<float> x) {
  if constexpr (P == 1) return {{(Vec<float>)((Words)x + 0x8000)}};
  Cut<P> c;
  FA_UNROLL
  for (int i = 0; i < P; i++) {
    c.piece[i] = x;
    if (i + 1 < P) x -= upper(x);
  }
  return c;
}
// Of an operand that was found to be free of numbers that cannot be cut, or is made so.
template <int P> FA_INLINE Cut<P> cut_number(Vec<float> x) {
  if constexpr (P == 3) {
    const Vec<float> first = upper((Vec<float>)((Words)x + 0x8000));
    x -= first;
    return {{first, x, x - upper(x)}};
  } else if constexpr (P == 2) {
    return {{x, x - upper(x)}};
  } else {
    return {{x}};
  }
}

// W x W numbers of src from row r and column c, 0 beyond, as rows or columns.
template <class E, bool TRANSPOSE>
FA_INLINE void load_block(const Matrix& src, index_t r, index_t rows, index_t c, index_t cols,
                          bool native, Vec<float> (&x)[TILE]) {
  const char* p = src.data + r * src.row;
  if (native && r + TILE <= rows && c + TILE <= cols) {
    FA_UNROLL
    for (int i = 0; i < TILE; i++) x[i] = load_as<E>(p + i * src.row + c * src.col);
  } else {
    const int n = int(max_index(0, min_index(TILE, cols - c)));
    for (int i = 0; i < TILE; i++) {
      const char* at = p + i * src.row + c * src.col;
      x[i] = r + i >= rows ? Vec<float>{}
             : native      ? load_some<E>(at, n)
                           : gather_as<E>(at, src.col, n);
    }
  }
  if constexpr (TRANSPOSE) transpose_registers<float>(x);
}

inline constexpr uint32_t FIRST_UNCUT = 0x7f7f8000;  // numbers from here on cannot be cut
// What becomes of uncut numbers: they are looked for, known to be absent, or replaced by 0.
enum class Uncut { sought, absent, replaced };
template <Uncut UNCUT> FA_INLINE Vec<float> look_for_uncut(Vec<float> x, Words& largest) {
  if constexpr (UNCUT == Uncut::absent) return x;
  const Words magnitude = (Words)x & 0x7fffffff;
  if constexpr (UNCUT == Uncut::replaced) return magnitude >= FIRST_UNCUT ? Vec<float>{} : x;
  largest = (Words)_mm512_maskz_max_epu32(0xffff, (__m512i)largest, (__m512i)magnitude);
  return x;
}

// dst = rows [r0, r0 + rows) of src, or their transpose, as an operand: as rows (the sum goes along
// its rows) or as words (along its columns). True if a number was found that cannot be cut.
// `factor` is applied to float32 transposed to words.
template <class E, bool TRANSPOSE, bool AS_ROWS, Uncut UNCUT>
FA_NOINLINE bool cut_matrix(const Matrix& src, index_t r0, index_t rows, index_t cols,
                            const Operand& dst, float factor = 1) {
  constexpr bool along = TRANSPOSE != AS_ROWS;  // does the sum go along src's rows?
  constexpr int P = PIECES<E>;
  const bool native = is_native<E>(src);
  const Matrix from{src.data + r0 * src.row, src.row, src.col};
  Words largest{};
  for (index_t r = 0; r < rows; r += along ? TILE : DEPTH)
    for (index_t c = 0; c < cols; c += along ? DEPTH : TILE) {
      const index_t outer = along ? r : c, sum = along ? c : r;
      const index_t r2 = r + (along ? 0 : TILE), c2 = c + (along ? TILE : 0);
      char* at = dst.data + (AS_ROWS ? outer * dst.row + 2 * sum : sum / 2 * dst.row + 4 * outer);
      const auto put = [&](int i, Vec<float> low, Vec<float> high) FA_LAMBDA {
        if (P == 3 && TRANSPOSE && !AS_ROWS) low *= splat(factor), high *= splat(factor);
        low = look_for_uncut<UNCUT>(low, largest);
        high = look_for_uncut<UNCUT>(high, largest);
        store_words<P>(at + i * dst.row, dst.piece, cut_number<P>(low), cut_number<P>(high));
      };
      if (!TRANSPOSE && native && r2 + TILE <= rows && c2 + TILE <= cols) {
        const char *p = from.data + r * from.row + c * from.col,
                   *p2 = from.data + r2 * from.row + c2 * from.col;
        FA_UNROLL
        for (int i = 0; i < TILE; i++)
          put(i, load_as<E>(p + i * from.row), load_as<E>(p2 + i * from.row));
        continue;
      }
      Vec<float> low[TILE], high[TILE];
      load_block<E, TRANSPOSE>(from, r, rows, c, cols, native, low);
      load_block<E, TRANSPOSE>(from, r2, rows, c2, cols, native, high);
      FA_UNROLL
      for (int i = 0; i < TILE; i++) put(i, low[i], high[i]);
    }
  return any_lane<float>((IntVec<float>)(largest >= FIRST_UNCUT));
}
template <class E, bool TRANSPOSE, bool AS_ROWS>
FA_INLINE bool cut_matrix(const Matrix& src, index_t r0, index_t rows, index_t cols,
                          const Operand& dst, float factor = 1) {
  const bool uncut =
      cut_matrix<E, TRANSPOSE, AS_ROWS, Uncut::sought>(src, r0, rows, cols, dst, factor);
  if (uncut) cut_matrix<E, TRANSPOSE, AS_ROWS, Uncut::replaced>(src, r0, rows, cols, dst, factor);
  return uncut;
}
// The same of a matrix that was cut before, when `uncut` was found.
template <class E, bool TRANSPOSE, bool AS_ROWS>
FA_INLINE void cut_again(const Matrix& src, index_t r0, index_t rows, index_t cols,
                         const Operand& dst, bool uncut) {
  if (uncut)
    cut_matrix<E, TRANSPOSE, AS_ROWS, Uncut::replaced>(src, r0, rows, cols, dst);
  else
    cut_matrix<E, TRANSPOSE, AS_ROWS, Uncut::absent>(src, r0, rows, cols, dst);
}

// ---- what cannot be cut, by hand ----

// Element (r, c) of a matrix, as a number.
template <class E> FA_INLINE float number_at(const Matrix& m, index_t r, index_t c) {
  return gather_as<E>(m.data + r * m.row + c * m.col, 0, 1)[0];
}
FA_INLINE bool cannot_be_cut(float x) {
  return !(__builtin_fabsf(x) < 0x1.ffp127f);  // rounds to infinity in bfloat16
}

}  // namespace
}  // namespace fusedattn
