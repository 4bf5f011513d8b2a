// The register tile behind all seven products of attention and its gradients.
//
// Cost model: a tile of NI x NJ vectors does NI * NJ multiply-adds for NJ vector loads and NI
// broadcasts. With 32 registers 6 x 4, 8 x 3, 12 x 2 and 16 x 1 keep two 512-bit multiply-adds a
// cycle fed with at most two loads (95 % of the peak where 4 x 4 reaches 92 %); with 16 registers 6
// x 2 needs 8 loads for 12 multiply-adds, which two load ports hide.
#pragma once

#include "kernel/vector/pairs.h"

namespace fusedattn {
namespace {

#if FUSEDATTN_REGISTERS == 32
inline constexpr int MAX_NJ = 4;
template <int NJ> inline constexpr int tile_rows = NJ == 1 ? 16 : 24 / NJ;
#else
inline constexpr int MAX_NJ = 2;
template <int NJ> inline constexpr int tile_rows = NJ == 1 ? 8 : 6;
#endif

// Calls tile.operator()<n>(first) for tiles of n rows that make up m rows: n is NI, until what is
// left makes two tiles of nearly the same height, for a tile of one or two rows is starved.
template <int NI, class F> FA_INLINE void in_tiles(index_t m, F&& tile) {
  index_t i = 0;
  for (; m - i == NI || m - i >= 2 * NI - 1; i += NI) tile.template operator()<NI>(i);
#pragma GCC unroll 1
  while (i < m) {
    const index_t left = m - i, rows = left > NI ? (left + 1) / 2 : left;
    with_count<NI - 1>(rows, [&]<int LOW>() FA_LAMBDA { tile.template operator()<LOW>(i); });
    i += rows;
  }
}

// acc[i][j] += sum over p < n of a[i * a_row + p * a_col] * b[p * b_row + j * W + lane].
// One chain of multiply-adds for each element, p ascending: the bits do not depend on the tile's
// shape. Where E is multiplied in pairs (pairs.h), a and b hold words and p counts words.
template <class E, int NI, int NJ, class T = Compute<E>>
FA_INLINE void multiply_tile(Vec<T> (&acc)[NI][NJ], const T* a, index_t a_row, index_t a_col,
                             const T* b, index_t b_row, index_t n) {
  const auto step = [&](const T* ap, const T* bp) FA_LAMBDA {
    Vec<T> bv[NJ];
    FA_UNROLL
    for (int j = 0; j < NJ; j++) {
      bv[j] = load(bp + j * W<T>);
      keep_in_register(bv[j]);
    }
    FA_UNROLL
    for (int i = 0; i < NI; i++) {
      const Vec<T> av = splat_operand<E>(ap + i * a_row);
      FA_UNROLL
      for (int j = 0; j < NJ; j++) acc[i][j] = multiply_add<E>(av, bv[j], acc[i][j]);
    }
  };
  index_t p = 0;
#pragma GCC unroll 1
  for (; p + 2 <= n; p += 2) {
    step(a, b);
    step(a + a_col, b + b_row);
    a += 2 * a_col;
    b += 2 * b_row;
  }
  if (p < n) step(a, b);
}

// c[i][0:n] += sum over p < k of a[i * a_row + p * a_col] * b[p][0:n], for i < m. Rows of b are
// readable up to a multiple of W (padded); rows of c are written up to n only. The sum is made
// first and then added: long chains lose digits.
template <class E, int NI, int NJ, class T = Compute<E>>
FA_INLINE void accumulate_tile(const T* a, index_t a_row, index_t a_col, const T* b, index_t b_row,
                               T* c, index_t c_row, index_t k, int last) {
  Vec<T> acc[NI][NJ] = {};
  multiply_tile<E, NI, NJ>(acc, a, a_row, a_col, b, b_row, k);
  FA_UNROLL
  for (int i = 0; i < NI; i++) {
    T *row = c + i * c_row, *end = row + (NJ - 1) * W<T>;
    FA_UNROLL
    for (int j = 0; j < NJ - 1; j++) store(row + j * W<T>, load(row + j * W<T>) + acc[i][j]);
    if (last == W<T>)
      store(end, load(end) + acc[i][NJ - 1]);
    else
      store_n(end, load_n(end, last) + acc[i][NJ - 1], last);
  }
}

// Which of a's strides is 1 is known at compile time: A_ROW1 (a transposed) or not.
template <class E, int NJ, bool A_ROW1, class T = Compute<E>>
FA_NOINLINE void accumulate_columns(index_t m, index_t k, const T* a, index_t a_ld, const T* b,
                                    index_t b_row, T* c, index_t c_row, int last) {
  const index_t a_row = A_ROW1 ? 1 : a_ld, a_col = A_ROW1 ? a_ld : 1;
  in_tiles<tile_rows<NJ>>(m, [&]<int NI>(index_t i) FA_LAMBDA {
    accumulate_tile<E, NI, NJ>(a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, k,
                               last);
  });
}

// Vectors in the next column group when `left` are left: as even as possible, so that no group is a
// single one by bad luck.
FA_INLINE int next_group(index_t left) {
  const index_t groups = (left + MAX_NJ - 1) / MAX_NJ;
  return int((left + groups - 1) / groups);
}

template <class E, bool A_ROW1, class T = Compute<E>>
FA_INLINE void accumulate(index_t m, index_t n, index_t k, const T* a, index_t a_ld, const T* b,
                          index_t b_row, T* c, index_t c_row) {
  const index_t vectors = (n + W<T> - 1) / W<T>;
  for (index_t j = 0; j < vectors;) {
    const int nj = next_group(vectors - j);
    const int last = int(n - (j + nj - 1) * W<T> < W<T> ? n - (j + nj - 1) * W<T> : W<T>);
    const T* bj = b + j * W<T>;
    T* cj = c + j * W<T>;
    with_count<MAX_NJ>(nj, [&]<int NJ>() FA_LAMBDA {
      accumulate_columns<E, NJ, A_ROW1>(m, k, a, a_ld, bj, b_row, cj, c_row, last);
    });
    j += nj;
  }
}

}  // namespace
}  // namespace fusedattn
