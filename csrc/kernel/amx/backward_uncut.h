// Uncut numbers (tiles.h) entered the operands of backward as 0. What they should have given is put
// right here, pair by pair and for allowed pairs only: slow, and right.
#pragma once

#include "kernel/amx/backward_allowed.h"
#include "kernel/amx/cut.h"

namespace fusedattn {
namespace {

// rows[r / CELL] bit r % CELL: is there such a number in row r0 + r?
template <class E>
FA_NOINLINE void find_uncut_rows(const Matrix& m, index_t r0, index_t rows, index_t cols,
                                 uint32_t* bits) {
  for (index_t r = 0; r < rows; r++)
    for (index_t c = 0; c < cols; c++)
      if (cannot_be_cut(number_at<E>(m, r0 + r, c))) {
        bits[r / CELL] |= 1u << r % CELL;
        break;
      }
}

// Takes pairs whose bias is -inf from the allowed ones of cell (r, c).
template <class E>
FA_NOINLINE void forbid_by_bias(TiledBackwardBlock& b, const Matrix& bias, int r, int c) {
  for (index_t i = 0; i < CELL; i++)
    for (index_t j = 0; j < CELL; j++) {
      uint32_t& allowed = b.allowed[r][c][i];
      if ((allowed >> j & 1) &&
          number_at<E>(bias, b.q0 + r * CELL + i, b.k0 + c * CELL + j) == -Bits<float>::infinity)
        allowed &= ~(1u << j);
    }
}

// scores (CELL x CELL) of allowed pairs with an uncut row = a[r] . b[c], over n.
template <class E>
FA_NOINLINE void score_uncut_pairs(const uint32_t* allowed, float* scores, const Matrix& rows,
                                   index_t r0, uint32_t uncut_rows, const Matrix& columns,
                                   index_t c0, uint32_t uncut_columns, index_t n) {
  for (index_t i = 0; i < CELL; i++)
    for (index_t j = 0; j < CELL; j++) {
      const bool uncut = (uncut_rows >> i | uncut_columns >> j) & 1;
      if (!uncut || !(allowed[i] >> j & 1)) continue;
      const char *x = rows.data + (r0 + i) * rows.row, *y = columns.data + (c0 + j) * columns.row;
      Vec<float> sum{};
      for (index_t k = 0; k < n; k += W<float>) {
        const int width = int(min_index(W<float>, n - k));
        sum = fma<float>(gather_as<E>(x + k * rows.col, rows.col, width),
                         gather_as<E>(y + k * columns.col, columns.col, width), sum);
      }
      scores[i * CELL + j] = sum_lanes<float>(sum);
    }
}

// What uncut numbers of `rows`, those of queries, give to a gradient by keys, (n, CELL): p^T rows.
template <class E>
FA_NOINLINE void add_uncut_queries(const uint32_t* allowed, const float* p, const Matrix& rows,
                                   index_t r0, uint32_t uncut, index_t n, float* gradient) {
  for (index_t i = 0; i < CELL; i++)
    for (index_t x = 0; (uncut >> i & 1) && x < n; x++) {
      const float value = number_at<E>(rows, r0 + i, x);
      for (index_t j = 0; j < CELL && cannot_be_cut(value); j++)
        if (allowed[i] >> j & 1) gradient[x * CELL + j] += p[i * CELL + j] * value;
    }
}
// What uncut numbers of K give to dq, (CELL, n): ds k.
template <class E>
FA_NOINLINE void add_uncut_keys(const uint32_t* allowed, const float* ds, const Matrix& k,
                                index_t k0, uint32_t uncut, index_t n, float* dq) {
  for (index_t j = 0; j < CELL; j++)
    for (index_t x = 0; (uncut >> j & 1) && x < n; x++) {
      const float value = number_at<E>(k, k0 + j, x);
      for (index_t i = 0; i < CELL && cannot_be_cut(value); i++)
        if (allowed[i] >> j & 1) dq[i * n + x] += ds[i * CELL + j] * value;
    }
}

}  // namespace
}  // namespace fusedattn
