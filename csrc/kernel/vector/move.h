// Moving blocks between the user's arrays (any strides, any alignment) and the kernels' scratch.
#pragma once

#include "kernel/vector/element.h"

namespace fusedattn {
namespace {

// Are elements next to each other and aligned?
template <class E> FA_INLINE bool is_native(const Matrix& m) {
  return m.col == index_t(sizeof(E)) && m.row % index_t(sizeof(E)) == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % sizeof(E) == 0;
}
// Can the micro-kernels read rows where they are? Not if they need widening, nor if a row stride
// maps every row to the same few cache sets (multiples of 4096 bytes cost up to a third of the
// speed of a tile).
template <class E> FA_INLINE bool is_ready(const Matrix& m) {
  return sizeof(E) == sizeof(Compute<E>) && is_native<E>(m) && (m.row % 4096 != 0 || m.row == 0);
}

template <class T> FA_INLINE index_t round_up(index_t n) {
  return (n + W<T> - 1) / W<T> * W<T>;
}

// dst[r][0:ld] = src[r0 + r][0:cols] * factor, zeros beyond cols.
template <class E, class T = Compute<E>>
FA_NOINLINE void copy_rows(const Matrix& src, index_t r0, index_t rows, index_t cols, T factor,
                           T* dst, index_t ld) {
  const bool native = is_native<E>(src);
  const Vec<T> f = splat(factor);
  for (index_t r = 0; r < rows; r++) {
    const char* p = src.data + (r0 + r) * src.row;
    T* d = dst + r * ld;
    index_t c = 0;
    if (native)
      for (; c + W<T> <= cols; c += W<T>) store(d + c, load_as<E>(p + c * src.col) * f);
    for (; c < cols; c += W<T>) {
      const int n = int(min_index(W<T>, cols - c));
      const Vec<T> x =
          native ? load_some<E>(p + c * src.col, n) : gather_as<E>(p + c * src.col, src.col, n);
      store_n(d + c, x * f, int(min_index(W<T>, ld - c)));
    }
    for (; c < ld; c++) d[c] = T(0);
  }
}

// dst[c][r] = src[r0 + r][c] * factor for r < rows, zeros for r up to a multiple of W.
template <class E, class T = Compute<E>>
FA_NOINLINE void pack_transposed(const Matrix& src, index_t r0, index_t rows, index_t cols,
                                 T factor, T* dst, index_t ld) {
  const bool native = is_native<E>(src);
  const Vec<T> f = splat(factor);
  for (index_t r = 0; r < rows; r += W<T>) {
    const int nr = int(min_index(W<T>, rows - r));
    for (index_t c = 0; c < cols; c += W<T>) {
      const int nc = int(min_index(W<T>, cols - c));
      const char* p = src.data + (r0 + r) * src.row + c * src.col;
      Vec<T> t[W<T>];
      if (native && nr == W<T> && nc == W<T>) {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++) t[i] = load_as<E>(p + i * src.row) * f;
      } else {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++)
          t[i] = i < nr ? gather_as<E>(p + i * src.row, src.col, nc) * f : Vec<T>{};
      }
      transpose_registers<T>(t);
      FA_UNROLL
      for (int j = 0; j < W<T>; j++)
        if (j < nc) store(dst + (c + j) * ld + r, t[j]);
    }
  }
}

// dst[r0 + r][c] = src[c][r] * factor[r] for r < rows, c < cols; src has rows up to a multiple of
// W.
template <class E, class T = Compute<E>>
FA_NOINLINE void unpack_transposed(const T* src, index_t ld, const T* factor, const Matrix& dst,
                                   index_t r0, index_t rows, index_t cols) {
  const bool native = is_native<E>(dst);
  for (index_t r = 0; r < rows; r += W<T>) {
    const int nr = int(min_index(W<T>, rows - r));
    const Vec<T> f = load(factor + r);
    for (index_t c = 0; c < cols; c += W<T>) {
      const int nc = int(min_index(W<T>, cols - c));
      Vec<T> t[W<T>] = {};
      FA_UNROLL
      for (int j = 0; j < W<T>; j++)
        if (j < nc) t[j] = load(src + (c + j) * ld + r) * f;
      transpose_registers<T>(t);
      char* p = dst.data + (r0 + r) * dst.row + c * dst.col;
      if (native && nr == W<T> && nc == W<T>) {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++) store_as<E>(p + i * dst.row, t[i]);
      } else if (native) {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++)
          if (i < nr) store_some<E>(p + i * dst.row, t[i], nc);
      } else {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++)
          if (i < nr) scatter_as<E>(p + i * dst.row, dst.col, nc, t[i]);
      }
    }
  }
}

// n elements that lie `step` bytes apart, as they are, side by side.
template <class E> FA_INLINE void copy_elements(E* to, const char* from, index_t step, index_t n) {
  if (step == index_t(sizeof(E))) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(E));
    return;
  }
  for (index_t i = 0; i < n; i++) __builtin_memcpy(to + i, from + i * step, sizeof(E));
}

// dst[r0 + r][0:cols] = src[r][0:cols] * factor
template <class E, class T = Compute<E>>
FA_NOINLINE void store_rows(const T* src, index_t ld, T factor, const Matrix& dst, index_t r0,
                            index_t rows, index_t cols) {
  const bool native = is_native<E>(dst);
  const Vec<T> f = splat(factor);
  for (index_t r = 0; r < rows; r++) {
    char* p = dst.data + (r0 + r) * dst.row;
    for (index_t at = 0; at < cols * index_t(sizeof(E)); at += 64)
      __builtin_prefetch(p + 8 * dst.row + at, 1, 3);
    index_t c = 0;
    if (native)
      for (; c + W<T> <= cols; c += W<T>) store_as<E>(p + c * dst.col, load(src + r * ld + c) * f);
    for (; c < cols; c += W<T>) {
      const int n = int(min_index(W<T>, cols - c));
      const Vec<T> x = load_n(src + r * ld + c, n) * f;
      if (native)
        store_some<E>(p + c * dst.col, x, n);
      else
        scatter_as<E>(p + c * dst.col, dst.col, n, x);
    }
  }
}

// Rows of a block where the micro-kernels can read them: in place if that is as good, else copied
// to scratch.
template <class T> struct Rows {
  const T* data;
  index_t ld;
};
template <class E, class T = Compute<E>>
FA_INLINE Rows<T> rows_at(const Matrix& m, index_t r0, index_t rows, index_t cols, T* scratch,
                          index_t scratch_ld, bool in_place) {
  if (in_place)
    return {reinterpret_cast<const T*>(m.data + r0 * m.row), m.row / index_t(sizeof(T))};
  copy_rows<E>(m, r0, rows, cols, T(1), scratch, scratch_ld);
  return {scratch, scratch_ld};
}

// Is every element finite? x * 0 is 0 for finite x and NaN otherwise.
template <class T> FA_NOINLINE bool all_finite(Rows<T> m, index_t rows, index_t cols) {
  constexpr int chains = 4;  // sums that need not wait for each other
  Vec<T> zero{}, sum[chains] = {};
  for (index_t r = 0; r < rows; r += chains) {
    const T* p[chains];
    FA_UNROLL
    for (int i = 0; i < chains; i++) p[i] = m.data + min_index(r + i, rows - 1) * m.ld;
    index_t c = 0;
    for (; c + W<T> <= cols; c += W<T>) {
      FA_UNROLL
      for (int i = 0; i < chains; i++) sum[i] = fma<T>(load(p[i] + c), zero, sum[i]);
    }
    if (c == cols) continue;
    FA_UNROLL
    for (int i = 0; i < chains; i++) sum[i] = fma<T>(load_n(p[i] + c, int(cols - c)), zero, sum[i]);
  }
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) == T(0);
}

}  // namespace
}  // namespace fusedattn
