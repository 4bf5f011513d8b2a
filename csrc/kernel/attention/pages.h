// Keys and values that lie in pages, gathered into scratch as operands of products.
// Forward and few alone call it: backward takes no pages.
#pragma once

#include "kernel/vector/pairs.h"

namespace fusedattn {
namespace {

#if defined(__AVX512BF16__)
// interleave_rows where the rows lie in pages.
FA_NOINLINE void interleave_pages(const Matrix& src, const Pages& pages, index_t page, index_t r0,
                                  index_t rows, index_t cols, float* dst, index_t ld) {
  const bool native = is_native<BFloat>(src);
  const auto row = [&](index_t r) {
    return src.data + pages.table[r / pages.rows] * page + r % pages.rows * src.row;
  };
  for (index_t r = 0; r < rows; r += 2)
    interleave_two(row(r0 + r), r + 1 < rows ? row(r0 + r + 1) : nullptr, src.col, cols, native,
                   dst + r / 2 * ld, ld);
}
#endif

// Operands of rows [r0, r0 + rows) of k or v, gathered from pages; `page` is the bytes from one
// page to the next.
template <class E, class T = Compute<E>>
FA_INLINE void copy_pages(const Matrix& m, const Pages& pages, index_t page, index_t r0,
                          index_t rows, index_t cols, T* dst, index_t ld) {
  for (index_t r = r0; r < r0 + rows;) {
    const index_t at = r % pages.rows, n = min_index(pages.rows - at, r0 + rows - r);
    Matrix one = m;
    one.data += pages.table[r / pages.rows] * page;
    copy_operands<E>(one, at, n, cols, T(1), dst + (r - r0) * ld, ld);
    r += n;
  }
}

// The same of v: words of two keys.
template <class E, class T = Compute<E>>
FA_INLINE void copy_value_pages(const Matrix& v, const Pages& pages, index_t r0, index_t rows,
                                index_t cols, T* dst, index_t ld) {
  if constexpr (PAIRS<E>)
    interleave_pages(v, pages, pages.v_page, r0, rows, cols, dst, ld);
  else
    copy_pages<E>(v, pages, pages.v_page, r0, rows, cols, dst, ld);
}

}  // namespace
}  // namespace fusedattn
