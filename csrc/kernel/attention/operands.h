// Rows of keys and values as operands of the products, where they lie or copied. Called by forward,
// few and backward on multiply-adds.
#pragma once

#include "kernel/vector/pairs.h"

namespace fusedattn {
namespace {

// Operands of the products for `rows` keys: words along d, words of two keys.
template <class E, class T = Compute<E>>
FA_INLINE Rows<T> key_rows(const Matrix& k, index_t r0, index_t rows, index_t d, T* scratch,
                           bool in_place) {
  if constexpr (PAIRS<E>) {
    if (in_place) return {reinterpret_cast<const T*>(k.data + r0 * k.row), k.row / 4};
    copy_words(k, r0, rows, d, scratch, words<E>(d));
    return {scratch, words<E>(d)};
  } else {
    return rows_at<E>(k, r0, rows, d, scratch, d, in_place);
  }
}
template <class E, class T = Compute<E>>
FA_INLINE Rows<T> value_rows(const Matrix& v, index_t r0, index_t rows, index_t d_v, T* scratch,
                             bool in_place) {
  if constexpr (PAIRS<E>) {
    interleave_rows(v, r0, rows, d_v, scratch, round_up<T>(d_v));
    return {scratch, round_up<T>(d_v)};
  } else {
    return rows_at<E>(v, r0, rows, d_v, scratch, d_v, in_place);
  }
}

// Is every element of V finite for n keys from `key` of the block?
template <class E, class T = Compute<E>>
FA_INLINE bool finite_values(Rows<T> v, index_t key, index_t n, index_t d_v) {
  if constexpr (PAIRS<E>)
    return all_finite_words({v.data + key / 2 * v.ld, v.ld}, (key + n + 1) / 2 - key / 2, d_v);
  else
    return all_finite<T>({v.data + key * v.ld, v.ld}, n, d_v);
}

}  // namespace
}  // namespace fusedattn
