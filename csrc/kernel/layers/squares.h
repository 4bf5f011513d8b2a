// The sum of the squares of many numbers: the norm of gradients, by which they are clipped.
#pragma once

#include "kernel/vector/column_sums.h"

namespace fusedattn {
namespace {

// Of elements [begin, end): in T for a piece, whose partial sums are short, in double over pieces.
template <class T>
FA_ENTRY double sum_of_squares(const void* elements, index_t begin, index_t end) {
  constexpr index_t piece = 1024;
  double total = 0;
  for (index_t at = begin; at < end; at += piece) {
    const T* x = static_cast<const T*>(elements) + at;
    ColumnSums<T> sum;
    for_summed_columns<T>(min_index(piece, end - at),
                          [&](index_t c, int lanes, int part) FA_LAMBDA {
                            const Vec<T> v = lanes == W<T> ? load(x + c) : load_n(x + c, lanes);
                            sum.part[part] = fma<T>(v, v, sum.part[part]);
                          });
    total += double(add_up(sum));
  }
  return total;
}

}  // namespace
}  // namespace fusedattn
