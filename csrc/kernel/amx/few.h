// Forward for a few queries on tiles: the softmax of few_rows.h, row by row, between products
// that have the bits of amx/forward.h's (few_products.h):
//
//   S^T [keys x rows] = rows of K, words of Q^T;   O [rows x d_v] = rows of P, words of V
//
// All rows of the group are the columns, or the rows, of one tile. K is cut where it lies along d
// and V in pairs of rows, so neither is transposed.
#pragma once

#include "kernel/amx/few_products.h"
#include "kernel/amx/forward_whole.h"
#include "kernel/attention/few_rows.h"

namespace fusedattn {
namespace {

// Logits of rows or keys that could not be cut, by hand; s[key][row].
template <class E>
FA_NOINLINE void score_uncut_few(const Row<float>* rows, int count, const FewRows& k, index_t n,
                                 index_t d, float factor, float* s) {
  for (index_t i = 0; i < n; i++) {
    const Matrix key = k.at(i);
    const bool uncut_key = has_uncut<E>(key, 0, d);
    for (int r = 0; r < count; r++) {
      const Matrix& q = rows[r].head->q;
      if (uncut_key || has_uncut<E>(q, rows[r].query, d))
        s[i * TILE + r] = dot_rows<E>(key, 0, q, rows[r].query, d) * factor;
    }
  }
}

// What could not be cut of V, for the rows that may see it; p[key] from key k0.
template <class E>
FA_NOINLINE void add_uncut_few_values(const Row<float>& x, const FewRows& v, index_t first,
                                      index_t n, index_t d_v, float* sums) {
  for (index_t key = 0; key < n; key++) {
    if (x.has_dense && x.dense[key] == -Bits<float>::infinity) continue;
    for (index_t c = 0; c < d_v; c++) {
      const float value = number_at<E>(v.at(first + key), 0, c);
      if (cannot_be_cut(value)) sums[c] += x.p[key] * value;
    }
  }
}

inline constexpr int TILED_FEW = int(TILE);  // queries at most, over all heads of the group

// Scratch of one call, in blocks of KEY_BLOCK keys; d up to a multiple of 32, d_v of 16.
template <class E> struct TiledFewScratch {
  index_t d, d_v, p_row = KEY_BLOCK + 2 * W<float>;
  E *q, *k_rows, *v_rows;       // (TILED_FEW, d), (KEY_BLOCK, d), (KEY_BLOCK, d_v)
  float *o, *sums, *p, *dense;  // (TILE, d_v) twice, (TILED_FEW, p_row) twice
  float* s;                     // (KEY_BLOCK, TILE)
  Operand q_cut, p_cut;         // words (d, TILE), rows (TILE, KEY_BLOCK)
  Operand k_cut, v_cut;         // rows (32, d), words (32, d_v)
  char* pieces;                 // two blocks of K or V, in tiles

  FA_INLINE_MEMBER TiledFewScratch(const ForwardHead& h, Layout& scratch)
      : d(up_to(h.d, DEPTH)), d_v(up_to(h.d_v, TILE)) {
    q = scratch.take<E>(TILED_FEW * h.d);
    k_rows = scratch.take<E>(KEY_BLOCK * d);
    v_rows = scratch.take<E>(KEY_BLOCK * d_v);
    o = scratch.take<float>(TILE * d_v);
    sums = scratch.take<float>(TILE * d_v);
    p = scratch.take<float>(TILED_FEW * p_row);
    dense = scratch.take<float>(TILED_FEW * p_row);
    s = scratch.take<float>(KEY_BLOCK * TILE);
    q_cut = words_operand(scratch, PIECES<E>, d, TILE);
    p_cut = rows_operand(scratch, P_PIECES<E>, TILE, KEY_BLOCK);
    k_cut = rows_operand(scratch, PIECES<E>, DEPTH, d);
    v_cut = words_operand(scratch, PIECES<E>, DEPTH, d_v);
    pieces = scratch.take<char>(2 * CUT_TILES * TILE_BYTES);
  }
};
template <class E> FA_ENTRY size_t few_scratch_on_tiles(const ForwardHead& h) {
  Layout measure(nullptr);
  TiledFewScratch<E>(h, measure);
  return measure.bytes();
}

template <class E>
FA_INLINE bool is_whole(const Matrix& m, const Pages& pages, index_t cols, index_t ld) {
  return !pages.table && is_native<E>(m) && cols == ld;
}
// Rows [r0, r0 + rows) of k or v, `cols` elements each, copies in rows of `ld` elements.
template <class E>
FA_NOINLINE FewRows few_rows(const Matrix& m, const Pages& pages, index_t page, index_t r0,
                             index_t rows, index_t cols, index_t ld, E* copy) {
  const index_t split = is_whole<E>(m, pages, cols, ld) ? rows / DEPTH * DEPTH : 0;
  for (index_t r = split; r < up_to(rows, DEPTH); r++) {
    E* to = copy + (r - split) * ld;
    const index_t at = r0 + r, whole = r < rows ? cols : 0;
    const char* from = m.data;
    if (whole)
      from +=
          pages.table ? pages.table[at / pages.rows] * page + at % pages.rows * m.row : at * m.row;
    copy_elements(to, from, m.col, whole);
    __builtin_memset(to + whole, 0, size_t(ld - whole) * sizeof(E));
  }
  return {{m.data + r0 * m.row, m.row, m.col},
          {reinterpret_cast<char*>(copy), ld * index_t(sizeof(E)), index_t(sizeof(E))},
          split};
}

// The products where something cannot be cut: with 0 in its place, then put right by hand.
template <class E>
FA_NOINLINE void few_careful_scores(const Row<float>* rows, int count, const FewRows& k, index_t n,
                                    const LogitFactor& factor, const TiledFewScratch<E>& x) {
  const Tiles tiles;
  for (index_t i = 0; i < n; i += DEPTH) {
    cut_matrix<E, false, true>(k.at(i), 0, DEPTH, x.d, x.k_cut);
    multiply_operands<PIECES<E>, PIECES<E>>(DEPTH, TILE, x.d, x.k_cut, x.q_cut, x.s + i * TILE,
                                            4 * TILE);
  }
  score_uncut_few<E>(rows, count, k, n, rows[0].head->d, factor.in_q, x.s);
}
template <class E>
FA_NOINLINE void few_careful_products(const FewRows& v, index_t n, const TiledFewScratch<E>& x,
                                      float* sums) {
  constexpr int P = P_PIECES<E>;
  const Tiles tiles;
  for (index_t i = 0; i < n; i += DEPTH) {
    cut_matrix<E, false, false>(v.at(i), 0, DEPTH, x.d_v, x.v_cut);
    const Operand p{x.p_cut.data + 2 * i, x.p_cut.row, x.p_cut.piece};
    if (PIPELINED<E> && i == 0)
      multiply_operands<P, PIECES<E>, true>(TILE, x.d_v, DEPTH, p, x.v_cut, sums, 4 * x.d_v);
    else
      multiply_operands<P, PIECES<E>, true, true>(TILE, x.d_v, DEPTH, p, x.v_cut, sums, 4 * x.d_v);
  }
}

// 1. scores of keys [0, n) of a block (a multiple of 32): p[row][key]
template <class E>
FA_NOINLINE void few_scores_of_block(const Row<float>* rows, int count, bool uncut_q,
                                     const FewRows& k, index_t n, const FewTiles& tiles,
                                     FewFetch& fetch, const TiledFewScratch<E>& x) {
  const LogitFactor factor = logit_factor<E>(*rows[0].head);
  few_scores_on_tiles<E>(k, n, x.d / DEPTH, x.q_cut, tiles.columns, x.s, x.pieces, fetch);
  bool finite = false;
  with_count<TILED_FEW>(tiles.columns, [&]<int C>() FA_LAMBDA {
    if constexpr ((C & (C - 1)) == 0) finite = few_columns<C>(n, x.s, x.p, x.p_row, factor.after);
  });
  if (finite && !uncut_q) return;
  few_careful_scores<E>(rows, count, k, n, factor, x);
  for (int r = 0; r < count; r++)
    for (index_t i = 0; i < n; i++) x.p[r * x.p_row + i] = x.s[i * TILE + r] * factor.after;
  tiles.configure();
}

// 2. P = exp2(S - max) of keys [k0, k0 + n), cut into row r of P, whose first key is a multiple of
// 32, `before` keys earlier.
template <class E>
FA_NOINLINE void few_exponentials(Row<float>& x, int r, index_t k0, index_t n, index_t before,
                                  const Operand& words) {
  using T = float;
  constexpr int P = P_PIECES<E>;
  few_rules<E>(x, k0, n);
  T* p = x.p - before;
  const index_t all = up_to(before + n, DEPTH);
  for (index_t i = 0; i < before; i++) p[i] = -Bits<T>::infinity;
  for (index_t i = before + round_up<T>(n); i < all; i++) p[i] = -Bits<T>::infinity;
  T max = few_max(x, p, all);
  if constexpr (!PIPELINED<E>) {
    T first = x.max;
    for (index_t i = 0; i < all && first == Bits<T>::lowest; i += DEPTH)
      first = few_max(x, p + i, DEPTH);
    max = next_max(first, max);
  }
  x.rescale = exp2<T>(splat(x.max) - splat(max))[0];
  x.max = max;
  for (index_t i = 0; i < all; i += DEPTH) {
    const Vec<T> a = exp2<T>(load(p + i) - splat(max)),
                 b = exp2<T>(load(p + i + W<T>) - splat(max));
    store(p + i, a);
    store(p + i + W<T>, b);
    store_words<P>(words.data + r * words.row + 2 * i, words.piece, cut_computed<P>(a),
                   cut_computed<P>(b));
  }
}

// total[r] += p[r][key] for 32 keys and R rows, in the order of amx/forward.h.
template <int R> FA_INLINE void add_in_order(const float* p, index_t p_row, float* total) {
  float sum[R];
  for (int r = 0; r < R; r++) sum[r] = total[r];
  FA_UNROLL
  for (int i = 0; i < int(TILE); i++)
    for (int r = 0; r < R; r++) sum[r] = (sum[r] + p[r * p_row + i]) + p[r * p_row + i + TILE];
  for (int r = 0; r < R; r++) total[r] = sum[r];
}

// 3. O = O * rescale + P V, as add_values does it, and the sums of P
template <class E>
FA_NOINLINE void few_values_of_block(Row<float>* rows, int count, const FewRows& v, index_t before,
                                     index_t n, const FewTiles& tiles, FewFetch& fetch,
                                     const TiledFewScratch<E>& x) {
  constexpr bool apart = PIPELINED<E>;  // the block's own sum is made, and then joins
  const index_t all = up_to(before + n, DEPTH), d_v = rows[0].head->d_v;
  for (int r = 0; !apart && r < count; r++)
    for (index_t c = 0; rows[r].rescale != 1 && c < x.d_v; c += W<float>)
      store(rows[r].o + c, load(rows[r].o + c) * splat(rows[r].rescale));
  const size_t bytes = size_t(count * x.d_v) * sizeof(float);
  if (!apart) __builtin_memcpy(x.sums, x.o, bytes);  // what was there before, should it be needed
  float* const sums = apart ? x.sums : x.o;
  float total[TILED_FEW] = {};
  few_values_on_tiles<E, !apart>(v, all, x.d_v / TILE, x.p_cut, sums, x.pieces, fetch,
                                 [&](index_t key) FA_LAMBDA {
                                   const float* p = x.p + key;
                                   int r = 0;
                                   for (; r + 4 <= count; r += 4)
                                     add_in_order<4>(p + r * x.p_row, x.p_row, total + r);
                                   for (; r < count; r++)
                                     add_in_order<1>(p + r * x.p_row, x.p_row, total + r);
                                 });
  AllFinite finite;
  for (index_t i = 0; i < count * x.d_v; i += W<float>) finite.add(load(sums + i));
  const bool uncut = !finite.all();
  if (uncut) {
    if (!apart) __builtin_memcpy(x.o, x.sums, bytes);
    few_careful_products<E>(v, all, x, sums);
    tiles.configure();
  }
  for (int r = 0; r < count; r++) {
    Row<float>& row = rows[r];
    const Vec<float> rescale = splat(row.rescale);
    row.total = row.sum = fma<float>(splat(row.sum), rescale, splat(total[r]))[0];
    for (index_t c = 0; apart && c < x.d_v; c += W<float>)
      store(row.o + c, fma<float>(load(row.o + c), rescale, load(x.sums + r * x.d_v + c)));
    if (uncut) add_uncut_few_values<E>(row, v, before, n, d_v, row.o);
  }
}

template <class E>
FA_ENTRY void forward_few_on_tiles(const ForwardHead* heads, index_t group, void* scratch) {
  using T = float;
  const ForwardHead& h = heads[0];
  Layout layout(scratch);
  const TiledFewScratch<E> x(h, layout);

  Row<T> rows[TILED_FEW];
  int count;
  const Interval any = begin_rows(heads, group, rows, count, [&](Row<T>& row, int r) FA_LAMBDA {
    row.o = x.o + r * x.d_v;
    row.dense = x.dense + r * x.p_row;
    const Matrix& q = row.head->q;
    copy_elements(x.q + r * h.d, q.data + row.query * q.row, q.col, h.d);
  });
  __builtin_memset(x.o, 0, size_t(count * x.d_v) * sizeof(T));
  const bool uncut_q = cut_matrix<E, true, false>(
      {reinterpret_cast<char*>(x.q), h.d * index_t(sizeof(E)), index_t(sizeof(E))}, 0, count, h.d,
      x.q_cut, logit_factor<E>(h).in_q);

  const FewTiles tiles(count);
  const index_t first = any.low / DEPTH * DEPTH;
  FewFetch k_fetch(h.k, first, x.d * index_t(sizeof(E)), false,
                   is_whole<E>(h.k, h.pages, h.d, x.d)),
      v_fetch(h.v, first, x.d_v * index_t(sizeof(E)), true,
              is_whole<E>(h.v, h.pages, h.d_v, x.d_v));
  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t k0 = max_index(block, any.low), k1 = min_index(block + KEY_BLOCK, any.high);
    const index_t base = k0 / DEPTH * DEPTH, n = k1 - k0, before = k0 - base, all = k1 - base;
    const FewRows k = few_rows<E>(h.k, h.pages, h.pages.k_page, base, all, h.d, x.d, x.k_rows);
    const FewRows v = few_rows<E>(h.v, h.pages, h.pages.v_page, base, all, h.d_v, x.d_v, x.v_rows);
    few_scores_of_block<E>(rows, count, uncut_q, k, up_to(all, DEPTH), tiles, k_fetch, x);
    for (int r = 0; r < count; r++) {
      rows[r].p = x.p + r * x.p_row + before;
      few_exponentials<E>(rows[r], r, k0, n, before, x.p_cut);
      if (r % 4 == 3) keep_awake();
    }
    few_values_of_block<E>(rows, count, v, before, n, tiles, v_fetch, x);
  }

  finish_few<E>(rows, count, x.d_v);
}

}  // namespace
}  // namespace fusedattn
