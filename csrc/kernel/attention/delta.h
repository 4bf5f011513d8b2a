// What backward needs of each query before it begins, and the rounding of gradients at its end.
#pragma once

#include "kernel/vector/column_sums.h"
#include "kernel/vector/exp.h"
#include "kernel/vector/move.h"

namespace fusedattn {
namespace {

// sums = those of dout * out over the columns of one query. NATIVE: their elements lie side by
// side.
template <class E, bool NATIVE, class T = Compute<E>>
FA_INLINE ColumnSums<T> sum_products(const char* o, index_t o_step, const char* g, index_t g_step,
                                     index_t columns) {
  ColumnSums<T> sums;
  for_summed_columns<T>(columns, [&](index_t c, int lanes, int part) FA_LAMBDA {
    const char *from = o + c * o_step, *with = g + c * g_step;
    if (NATIVE && lanes == W<T>)
      sums.part[part] = fma<T>(load_as<E>(from), load_as<E>(with), sums.part[part]);
    else
      sums.part[part] = fma<T>(gather_as<E>(from, o_step, lanes), gather_as<E>(with, g_step, lanes),
                               sums.part[part]);
  });
  return sums;
}

// delta = rowsum(dout * out) - dlse and lse2 = lse * log2(e) for queries [begin, end).
template <class E> FA_ENTRY void delta(const DeltaHead& h, index_t begin, index_t end) {
  using T = Compute<E>;
  const bool native = is_native<E>(h.out) && is_native<E>(h.dout);
  const T* lse = static_cast<const T*>(h.lse);
  ColumnSums<T> sums[FEW_ROWS];
  for (index_t q0 = begin; q0 < end; q0 += FEW_ROWS) {
    const int rows = int(min_index(FEW_ROWS, end - q0));
    for (int r = 0; r < rows; r++) {
      const index_t q = q0 + r;
      const char *o = h.out.data + q * h.out.row, *g = h.dout.data + q * h.dout.row;
      for (index_t at = 0; at < h.d_v * index_t(sizeof(E)) && q + 8 < end; at += 64) {
        prefetch_near(o + 8 * h.out.row + at);
        prefetch_near(g + 8 * h.dout.row + at);
      }
      sums[r] = native ? sum_products<E, true>(o, h.out.col, g, h.dout.col, h.d_v)
                       : sum_products<E, false>(o, h.out.col, g, h.dout.col, h.d_v);
    }
    T total[FEW_ROWS];
    add_up<T>(sums, total);
    for (int r = 0; r < rows; r++) {
      T dlse = 0;
      if (h.dlse) __builtin_memcpy(&dlse, h.dlse + (q0 + r) * h.dlse_step, sizeof(T));
      static_cast<T*>(h.delta)[q0 + r] = total[r] - dlse;
      static_cast<T*>(h.lse2)[q0 + r] = lse[q0 + r] * T(LOG2E);
    }
  }
}

// Rounds rows of a gradient that was summed in the compute type, times a factor.
template <class E>
FA_ENTRY void round_rows(const void* sums, double factor, const Matrix& dst, index_t begin,
                         index_t end, index_t cols) {
  using T = Compute<E>;
  store_rows<E>(static_cast<const T*>(sums) + begin * cols, cols, T(factor), dst, begin,
                end - begin, cols);
}

}  // namespace
}  // namespace fusedattn
