// Forward on tiles: the same online softmax over the same blocks of keys as attention/forward.h,
// with the two products done by AMX from pieces of 16 bits (tiles.h). Queries lie in the lanes:
//
//   S^T [keys x queries] = rows of K, words of Q^T;   O^T [dv x queries] = rows of V^T, words of
//   P^T
//
// K and V are cut once for all queries of a task; P is cut as it is made.
//
// Cost for 16 scores (one vector) at d = 64, in cycles: the products 2 * 2 * d / 32 = 4 for each
// pair of pieces in registers, so 24 for float32 and 4 for bfloat16, and half as much again for
// loads and stores of tiles; exponential, sums and cutting 10. Cutting K and V is shared by the
// queries of a task.
#pragma once

#include "kernel/amx/forward_pipeline.h"
#include "kernel/amx/forward_whole.h"

namespace fusedattn {
namespace {

// Rows [r0, r0 + rows) of k or v, gathered from pages to scratch, `cols` elements each.
template <class E>
FA_NOINLINE Matrix gather_pages(const Matrix& m, const Pages& pages, index_t page, index_t r0,
                                index_t rows, index_t cols, E* dst) {
  for (index_t r = 0; r < rows; r++) {
    const index_t at = r0 + r;
    const char* p = m.data + pages.table[at / pages.rows] * page + at % pages.rows * m.row;
    copy_elements(dst + r * cols, p, m.col, cols);
  }
  return {reinterpret_cast<char*>(dst), cols * index_t(sizeof(E)), index_t(sizeof(E))};
}
// Rows of k or v from `block` on.
template <class E>
FA_INLINE Matrix block_rows(const Matrix& m, const Pages& pages, index_t page, index_t block,
                            index_t rows, index_t cols, E* gathered) {
  if (pages.table) return gather_pages<E>(m, pages, page, block, rows, cols, gathered);
  return {m.data + block * m.row, m.row, m.col};
}

// What a task needs beside its queries. Pipelined, some of it twice or three times.
template <class E> struct ForwardScratch {
  static constexpr int twice = PIPELINED<E> ? 2 : 1, units = PIPELINED<E> ? 3 : 1;
  float *s[twice], *tile, *sums;
  Operand words[twice];
  KeyBlock keys[twice];
  E *k_rows, *v_rows;  // from pages

  FA_INLINE_MEMBER ForwardScratch(const ForwardHead& h, char*& free) {
    constexpr index_t widest = WIDEST<E> * W<float>;
    tile = carve<float>(free, KEY_BLOCK * widest);
    sums = carve<float>(free, 4 * TILE * TILE);
    for (int i = 0; i < twice; i++) {
      s[i] = carve<float>(free, KEY_BLOCK * widest);
      words[i] = words_operand(free, P_PIECES<E>, KEY_BLOCK, widest);
      keys[i] = {rows_operand(free, PIECES<E>, KEY_BLOCK, h.d),
                 rows_operand(free, PIECES<E>, h.dv, KEY_BLOCK), false, false};
    }
    k_rows = carve<E>(free, h.pages.table ? KEY_BLOCK * h.d : 0);
    v_rows = carve<E>(free, h.pages.table ? KEY_BLOCK * h.dv : 0);
  }
};
template <class E> FA_ENTRY size_t forward_scratch_on_tiles(const ForwardHead& h, index_t queries) {
  char* const from = reinterpret_cast<char*>(uintptr_t(64));
  char* free = from;
  ForwardScratch<E>(h, free);
  const index_t subs = (queries + W<float> - 1) / W<float>;
  const index_t q = PIECES<E> * as_words(nullptr, h.d, 2 * TILE).piece / 2;  // of 16 lanes, at most
  const index_t numbers = 4 * subs * W<float> * (up_to(h.dv, TILE) + 4);
  return size_t(free - from + numbers + subs * (q + index_t(sizeof(TiledQueries)) + 8 * 64) +
                16 * 64);
}

// Has the fetcher fetch what the next task needs first, beside the products of so many tiles of
// scores.
template <class E>
FA_INLINE void fetch_next_queries(Fetcher& f, const ForwardHead& h, const NextQueries& next,
                                  index_t tiles) {
  constexpr index_t P = PIECES<E>;
  queue_next_queries<E>(f, h, next);
  const index_t products = up_to(h.d, DEPTH) / DEPTH * piece_order<P, P>().n +
                           up_to(h.dv, DEPTH) / DEPTH * piece_order<P, P_PIECES<E>>().n;
  start_fetching(f, tiles * products, LINES_AT_ONCE);
}

// Keys [k0, k1) for b, and how they are computed.
template <class E>
FA_INLINE void plan_unit(const ForwardHead& h, const LogitFactor& factor, index_t block, index_t k0,
                         index_t k1, bool use_mask, Scored& b) {
  const Span& keys = b.x->keys;
  b.block = block, b.k0 = k0, b.k1 = k1, b.use_mask = use_mask;
  b.low = (k0 - block) / DEPTH * DEPTH;
  b.high = up_to(k1 - block, DEPTH);
  b.cut[0] = k0;
  b.cut[1] = max_index(k0, min_index(k1, keys.all.low));
  b.cut[2] = max_index(b.cut[1], min_index(k1, keys.all.high));
  b.cut[3] = k1;
  for (Dense<float>& dense : b.dense) dense = {};
  const bool ragged = b.cut[1] > k0 || b.cut[2] < k1, uncut_v = b.keys->uncut_v;
  b.has_dense = has_dense(h.rules, use_mask) || ragged;
  b.masked = use_mask && !has_dense(h.rules, false) && !ragged && !uncut_v;
  // Keys left out are -inf, which a factor could turn into NaN.
  const bool whole = k0 - block == b.low && k1 - block == b.high,
             uncut = b.keys->uncut_k || b.x->uncut;
  const bool bends = h.rules.softcap > 0;
  b.plan = {factor, 0,
            !bends && (!b.has_dense || b.masked) && !uncut && (whole || SCALED_QUERIES<E>),
            bends && !b.has_dense};
  // Masks are read 64 keys at a time, rows of a bias are best read in one go, and a softcap of more
  // than 8 keys does not fit beside products; where V holds what cannot be cut, masks and biases of
  // the whole block are wanted.
  if (uncut_v)
    b.plan.chunk = KEY_BLOCK;
  else if constexpr (!PIPELINED<E>)
    b.plan.chunk = b.has_dense ? 2 * DEPTH : DEPTH;
  else if (h.rules.bias.data)
    b.plan.chunk = KEY_BLOCK;
  else if (use_mask && !b.masked)
    b.plan.chunk = 2 * DEPTH;
  else
    b.plan.chunk = b.plan.bent ? 8 : TILE;
}

template <class E>
FA_ENTRY void forward_on_tiles(const ForwardHead& h, index_t q_begin, index_t q_end,
                               const NextQueries& next, void* scratch) {
  using T = float;
  const Tiles configured;
  char* free = static_cast<char*>(scratch);
  ForwardScratch<E> own(h, free);
  auto* subs = reinterpret_cast<TiledQueries*>(
      carve<char>(free, (q_end - q_begin + W<T> - 1) / W<T> * index_t(sizeof(TiledQueries))));

  const LogitFactor factor = logit_factor<E>(h);
  int n = 0;
  Interval any{h.sk, 0};
  index_t tiles = 0;  // of scores
  for (index_t q = q_begin; q < q_end; n++) {
    TiledQueries& x = subs[n];
    x.first = q;
    x.uncovered = 0;
    choose_width<T>(x, h, q_end, WIDEST<E>);
    const index_t lanes = x.vectors * W<T>, sums = up_to(h.dv, TILE) * lanes;
    const Operand operand = words_operand(free, PIECES<E>, h.d, lanes);
    x.q = reinterpret_cast<T*>(operand.data);
    x.uncut = cut_matrix<E, true, false>(h.q, q, x.count, h.d, operand, factor.in_q);
    x.risen = h.rules.alibi_slope != 0;
    x.finished = false;
    x.single =
        PIPELINED<E> && x.keys.any.high <= x.keys.any.low / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK;
    x.o = carve<T>(free, sums);
    x.max = carve<T>(free, lanes);
    x.total = x.sum = carve<T>(free, lanes);
    x.seen = carve<T>(free, lanes);
    if (!x.single) clear_sums(h, x);
    for (index_t i = 0; i < lanes; i++) x.max[i] = Bits<T>::lowest, x.sum[i] = x.seen[i] = 0;
    tiles += x.vectors * up_to(max_index(x.keys.any.high - x.keys.any.low, 0), TILE) / TILE;
    any.low = min_index(any.low, x.keys.any.low);
    any.high = max_index(any.high, x.keys.any.high);
    q += x.count;
  }
  Pipeline pipeline{h, {}, nullptr, nullptr};
  fetch_next_queries<E>(pipeline.fetcher, h, next, tiles);

  Scored units[own.units];
  index_t turn = 0;
  KeyBlock* keys = own.keys;
  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t rows = min_index(KEY_BLOCK, any.high - block);
    const Matrix k = block_rows<E>(h.k, h.pages, h.pages.k_page, block, rows, h.d, own.k_rows),
                 v = block_rows<E>(h.v, h.pages, h.pages.v_page, block, rows, h.dv, own.v_rows);
    if constexpr (PIPELINED<E>) {
      keys = own.keys + block / KEY_BLOCK % 2;
      finish_units<E>(pipeline, keys);
    }
    keys->uncut_k = cut_matrix<E, false, true>(k, 0, rows, h.d, keys->k);
    keys->uncut_v = cut_matrix<E, true, true>(v, 0, rows, h.dv, keys->v);
    for (int i = 0; i < n; i++) {
      TiledQueries& x = subs[i];
      index_t k0 = max_index(block, x.keys.any.low), k1 = min_index(block + rows, x.keys.any.high);
      if (k0 >= k1) continue;
      const Cover cover = cover_of<T>(h.rules, x, block);
      if (cover == Cover::none) continue;
      bool use_mask = cover == Cover::some;
      if (use_mask && h.rules.mask.row == 0) use_mask = trim_hidden(h.rules.mask, k0, k1);
      if (k0 >= k1) continue;
      Scored& b = units[turn % own.units];
      b.x = &x, b.keys = keys, b.k = k, b.v = v;
      b.s = own.s[turn % own.twice], b.tile = own.tile, b.sums = own.sums;
      const Operand& words = own.words[turn % own.twice];
      b.words = {words.data, as_words(nullptr, KEY_BLOCK, x.vectors * W<T>).row, words.piece};
      turn++;
      b.bias = h.rules.bias;
      const int then = i + own.twice;  // the next unit, or the one after it
      if (b.bias.data)
        b.bias.data +=
            subs[then % n].first * b.bias.row + (block + then / n * KEY_BLOCK) * b.bias.col;
      plan_unit<E>(h, factor, block, k0, k1, use_mask, b);
      if constexpr (PIPELINED<E>) {
        advance<E>(pipeline, &b);
        if (keys->uncut_v) finish_units<E>(pipeline, nullptr);  // whose masks are kept in b.tile
      } else {
        block_probabilities<E>(h, b, pipeline.fetcher);
        add_values<E>(h, b, Fetch{pipeline.fetcher});
      }
    }
  }
  if constexpr (PIPELINED<E>) finish_units<E>(pipeline, nullptr);
  for (int i = 0; i < n; i++) {
    TiledQueries& x = subs[i];
    if (x.finished) continue;
    if (x.single) clear_sums(h, x);  // that saw no key
    finish<E>(h, x);
  }
}

}  // namespace
}  // namespace fusedattn
