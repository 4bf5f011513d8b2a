// Sums over the columns of a row whose bits do not depend on how wide a vector is.
//
// Columns come in groups of 64 bytes, the widest vector there is: 16 of float32, 8 of float64.
// Partial sum i holds column i of every group, in the order of the groups, and the total is that of
// the partial sums in their order. Instruction sets with narrower vectors keep several vectors of
// partial sums, which also need not wait for each other.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

template <class T> struct ColumnSums {
  static constexpr int vectors = 64 / FUSEDATTN_VECTOR_BYTES;
  Vec<T> part[vectors] = {};
};

// The columns of a row, W at a time: body(column, lanes, part), where `part` says which vector of
// partial sums is theirs.
template <class T, class F> FA_INLINE void for_summed_columns(index_t width, F&& body) {
  constexpr int vectors = ColumnSums<T>::vectors;
  index_t c = 0;
  for (; c + vectors * W<T> <= width; c += vectors * W<T>) {
    FA_UNROLL
    for (int v = 0; v < vectors; v++) body(c + v * W<T>, W<T>, v);
  }
  FA_UNROLL
  for (int v = 0; v < vectors; v++, c += W<T>) {
    if (c >= width) break;
    body(c, int(min_index(W<T>, width - c)), v);
  }
}

// The totals of a few rows, which share the time that it takes to add partial sums one after
// another. They start from 0, which makes -0 of a partial sum 0: whether columns beyond the row
// were added to it as zeros depends on how wide a vector is.
inline constexpr int FEW_ROWS = 4;
template <class T> FA_INLINE void add_up(const ColumnSums<T> (&rows)[FEW_ROWS], T* totals) {
  typedef T Some __attribute__((vector_size(16)));
  Some sum[FEW_ROWS / SQUARE<T>] = {};
  FA_UNROLL
  for (int v = 0; v < ColumnSums<T>::vectors; v++) {
    FA_UNROLL
    for (int s = 0; s < FEW_ROWS / SQUARE<T>; s++) {
      Vec<T> part[SQUARE<T>];
      FA_UNROLL
      for (int r = 0; r < SQUARE<T>; r++) part[r] = rows[s * SQUARE<T> + r].part[v];
      transpose_squares<T>(part);
      FA_UNROLL
      for (int square = 0; square < W<T> / SQUARE<T>; square++) {
        FA_UNROLL
        for (int i = 0; i < SQUARE<T>; i++) {
          Some next;
          __builtin_memcpy(&next, reinterpret_cast<const char*>(&part[i]) + 16 * square, 16);
          sum[s] += next;
        }
      }
    }
  }
  __builtin_memcpy(totals, sum, sizeof(sum));
}
template <class T> FA_INLINE T add_up(const ColumnSums<T>& row) {
  T sum = 0;
  FA_UNROLL
  for (int v = 0; v < ColumnSums<T>::vectors; v++) {
    FA_UNROLL
    for (int i = 0; i < W<T>; i++) sum += row.part[v][i];
  }
  return sum;
}

}  // namespace
}  // namespace fusedattn
