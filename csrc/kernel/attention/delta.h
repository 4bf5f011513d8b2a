// What backward needs of each query before it begins, and the rounding of gradients at its end.
#pragma once

#include "kernel/vector/exp.h"
#include "kernel/vector/move.h"

namespace fusedattn {
namespace {

// delta = rowsum(dout * out) - dlse and lse2 = lse * log2(e) for queries [begin, end), W at a time:
// their sums over lanes, in the order of sum_lanes, are made side by side.
template <class E> FA_ENTRY void delta(const DeltaHead& h, index_t begin, index_t end) {
  using T = Compute<E>;
  const bool native = is_native<E>(h.out) && is_native<E>(h.dout);
  for (index_t q = begin; q < end; q += W<T>) {
    const int rows = int(min_index(W<T>, end - q));
    Vec<T> sum[W<T>] = {};
    for (int r = 0; r < rows; r++) {
      const char *o = h.out.data + (q + r) * h.out.row, *g = h.dout.data + (q + r) * h.dout.row;
      for (index_t at = 0; at < h.d_v * index_t(sizeof(E)) && q + r + 8 < end; at += 64) {
        prefetch_near(o + 8 * h.out.row + at);
        prefetch_near(g + 8 * h.dout.row + at);
      }
      index_t c = 0;
      if (native)
        for (; c + W<T> <= h.d_v; c += W<T>)
          sum[r] = fma<T>(load_as<E>(o + c * h.out.col), load_as<E>(g + c * h.dout.col), sum[r]);
      for (; c < h.d_v; c += W<T>) {
        const int n = int(min_index(W<T>, h.d_v - c));
        sum[r] = fma<T>(gather_as<E>(o + c * h.out.col, h.out.col, n),
                        gather_as<E>(g + c * h.dout.col, h.dout.col, n), sum[r]);
      }
    }
    transpose_registers<T>(sum);
    FA_UNROLL
    for (int i = 1; i < W<T>; i++) sum[0] += sum[i];
    T dlse[W<T>] = {};
    for (int r = 0; r < rows && h.dlse; r++)
      __builtin_memcpy(&dlse[r], h.dlse + (q + r) * h.dlse_step, sizeof(T));
    const Vec<T> lse = load_n(static_cast<const T*>(h.lse) + q, rows);
    store_n(static_cast<T*>(h.delta) + q, sum[0] - load(dlse), rows);
    store_n(static_cast<T*>(h.lse2) + q, lse * splat(T(LOG2E)), rows);
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
