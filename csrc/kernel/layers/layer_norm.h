// Layer normalisation (Ba, Kiros and Hinton, arXiv:1607.06450) and its gradient. Rows go a few at a
// time, as the totals of their columns do.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

template <class T> FA_ENTRY void layer_norm(const LayerNorm& n, index_t begin, index_t end) {
  const T *weight = static_cast<const T*>(n.weight), *bias = static_cast<const T*>(n.bias);
  const T share = T(1) / T(n.width);
  ColumnSums<T> sums[FEW_ROWS];
  for (index_t r0 = begin; r0 < end; r0 += FEW_ROWS) {
    const int rows = int(min_index(FEW_ROWS, end - r0));
    T mean[FEW_ROWS], variance[FEW_ROWS];
    for (int r = 0; r < rows; r++) {
      const T* x = row_of<const T>(n.x, r0 + r);
      prefetch_near(row_of<const T>(n.x, r0 + r + 1));
      ColumnSums<T> sum;
      for_summed_columns<T>(n.width, [&](index_t c, int lanes, int part)
                                         FA_LAMBDA { sum.part[part] += load_lanes(x + c, lanes); });
      sums[r] = sum;
    }
    add_up<T>(sums, mean);
    for (int r = 0; r < rows; r++) {
      const T* x = row_of<const T>(n.x, r0 + r);
      mean[r] *= share;
      const Vec<T> middle = splat(mean[r]);
      ColumnSums<T> squares;
      for_summed_columns<T>(n.width, [&](index_t c, int lanes, int part) FA_LAMBDA {
        // The lanes beyond the row must add nothing: the mean is taken from them too.
        const Vec<T> d = lanes == W<T> ? load(x + c) - middle
                                       : lanes_below<T>(load_n(x + c, lanes) - middle, lanes);
        squares.part[part] = fma<T>(d, d, squares.part[part]);
      });
      sums[r] = squares;
    }
    add_up<T>(sums, variance);
    for (int r = 0; r < rows; r++) {
      const T* x = row_of<const T>(n.x, r0 + r);
      T* y = row_of<T>(n.y, r0 + r);
      const T rstd = T(1) / T(__builtin_sqrt(variance[r] * share + T(n.eps)));
      static_cast<T*>(n.mean)[r0 + r] = mean[r];
      static_cast<T*>(n.rstd)[r0 + r] = rstd;
      for_columns<T>(n.width, [&](index_t c, int lanes) FA_LAMBDA {
        const Vec<T> h = (load_lanes(x + c, lanes) - splat(mean[r])) * splat(rstd);
        store_lanes(y + c, fma<T>(h, load_lanes(weight + c, lanes), load_lanes(bias + c, lanes)),
                    lanes);
      });
    }
  }
}

// With h = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - h mean(g h)).
template <class T>
FA_ENTRY void layer_norm_backward(const LayerNormBackward& n, index_t begin, index_t end) {
  const T* weight = static_cast<const T*>(n.weight);
  T *dweight = static_cast<T*>(n.dweight), *dbias = static_cast<T*>(n.dbias);
  const T share = T(1) / T(n.width);
  // Wide rows, whose totals cost little, go one at a time, so as to be in the L1 cache still.
  const index_t step = n.width * index_t(sizeof(T)) > 4096 ? 1 : FEW_ROWS;
  ColumnSums<T> sums[FEW_ROWS], sums_along[FEW_ROWS];
  for (index_t r0 = begin; r0 < end; r0 += step) {
    const int rows = int(min_index(step, end - r0));
    T m1[FEW_ROWS], m2[FEW_ROWS];
    for (int r = 0; r < rows; r++) {
      const T *x = row_of<const T>(n.x, r0 + r), *dy = row_of<const T>(n.dy, r0 + r);
      const Vec<T> mean = splat(static_cast<const T*>(n.mean)[r0 + r]),
                   rstd = splat(static_cast<const T*>(n.rstd)[r0 + r]);
      ColumnSums<T> sum, along;
      for_summed_columns<T>(n.width, [&](index_t c, int lanes, int part) FA_LAMBDA {
        const Vec<T> d = load_lanes(dy + c, lanes);
        Vec<T> h = (load_lanes(x + c, lanes) - mean) * rstd;
        if (lanes != W<T>) h = lanes_below<T>(h, lanes);     // mean * rstd may be infinite
        const Vec<T> g = d * load_lanes(weight + c, lanes);  // 0 beyond the row
        sum.part[part] += g;
        along.part[part] = fma<T>(g, h, along.part[part]);
        store_lanes(dweight + c, fma<T>(d, h, load_lanes(dweight + c, lanes)), lanes);
        store_lanes(dbias + c, load_lanes(dbias + c, lanes) + d, lanes);
      });
      sums[r] = sum;
      sums_along[r] = along;
    }
    add_up<T>(sums, m1);
    add_up<T>(sums_along, m2);
    for (int r = 0; r < rows; r++) {
      const T *x = row_of<const T>(n.x, r0 + r), *dy = row_of<const T>(n.dy, r0 + r);
      T* dx = row_of<T>(n.dx, r0 + r);
      const Vec<T> mean = splat(static_cast<const T*>(n.mean)[r0 + r]),
                   rstd = splat(static_cast<const T*>(n.rstd)[r0 + r]), own1 = splat(m1[r] * share),
                   own2 = splat(m2[r] * share);
      for_columns<T>(n.width, [&](index_t c, int lanes) FA_LAMBDA {
        const Vec<T> h = (load_lanes(x + c, lanes) - mean) * rstd;
        const Vec<T> g = load_lanes(dy + c, lanes) * load_lanes(weight + c, lanes);
        store_lanes(dx + c, rstd * (g - own1 - h * own2), lanes);
      });
    }
  }
}

}  // namespace
}  // namespace fusedattn
