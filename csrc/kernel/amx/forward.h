// Forward on tiles: the same online softmax over the same blocks of keys as attention/forward.h,
// with the two products done by AMX from pieces of 16 bits (tiles.h). Queries lie in the lanes:
//
//   S^T [keys x queries] = rows of K, words of Q^T;   O^T [d_v x queries] = rows of V^T, words of
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
#include "kernel/attention/forward_loop.h"

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

// Has the fetcher fetch what the next task reads first, beside the products of so many tiles of
// scores.
template <class E>
FA_INLINE void fetch_next_queries(Fetcher& f, const ForwardHead& h, const NextQueries& next,
                                  index_t tiles) {
  constexpr index_t P = PIECES<E>;
  queue_next_queries<E>(f, h, next);
  const index_t products = up_to(h.d, DEPTH) / DEPTH * piece_order<P, P>().n +
                           up_to(h.d_v, DEPTH) / DEPTH * piece_order<P, P_PIECES<E>>().n;
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

// The engine of forward_in_blocks on tiles, and its scratch: pipelined, some of it twice or three
// times.
template <class E> struct TiledForward {
  using T = float;
  static constexpr int widest = WIDEST<E>, twice = PIPELINED<E> ? 2 : 1,
                       in_flight = PIPELINED<E> ? 3 : 1;
  static constexpr bool trims = true;

  const ForwardHead& h;
  const NextQueries& next;
  const index_t begin_at;  // the first query
  const LogitFactor factor;
  float *s[twice], *tile, *products;
  Operand words[twice];
  KeyBlock keys[twice];
  E *k_rows, *v_rows;  // from pages
  TiledQueries* subs;
  char* q;  // words of all sub-blocks' queries, one sub-block after the other
  T* o;     // of all queries: (d_v, lanes) of each sub-block
  T* sums;  // three numbers
  int count = 0;
  index_t tiles = 0;  // of scores
  Pipeline pipeline;
  Scored units[in_flight];
  index_t turn = 0;
  KeyBlock* block_keys;
  Matrix k{}, v{};

  FA_INLINE_MEMBER TiledForward(const ForwardHead& head, index_t q_begin, index_t queries,
                                const NextQueries& then, Layout& scratch)
      : h(head),
        next(then),
        begin_at(q_begin),
        factor(logit_factor<E>(head)),
        pipeline{head, {}, nullptr, nullptr},
        block_keys(keys) {
    constexpr index_t most = WIDEST<E> * W<T>;
    tile = scratch.take<float>(KEY_BLOCK * most);
    products = scratch.take<float>(4 * TILE * TILE);
    for (int i = 0; i < twice; i++) {
      s[i] = scratch.take<float>(KEY_BLOCK * most);
      words[i] = words_operand(scratch, P_PIECES<E>, KEY_BLOCK, most);
      keys[i] = {rows_operand(scratch, PIECES<E>, KEY_BLOCK, h.d),
                 rows_operand(scratch, PIECES<E>, h.d_v, KEY_BLOCK), false, false};
    }
    k_rows = scratch.take<E>(h.pages.table ? KEY_BLOCK * h.d : 0);
    v_rows = scratch.take<E>(h.pages.table ? KEY_BLOCK * h.d_v : 0);
    // All sub-blocks but the last are full, so their lanes add up to this. Words of two vectors of
    // queries lie furthest apart for what they hold.
    const index_t lanes = round_up<T>(queries);
    subs = scratch.take<TiledQueries>(lanes / W<T>);
    q = scratch.take<char>(PIECES<E> * as_words(nullptr, h.d, 2 * TILE).piece * (lanes / TILE + 1) /
                           2);
    o = scratch.take<T>(up_to(h.d_v, TILE) * lanes);
    sums = scratch.take<T>(3 * lanes);
  }

  FA_INLINE_MEMBER void begin(TiledQueries& x) {
    const index_t lanes = x.vectors * W<T>, at = x.first - begin_at;
    const Operand operand = as_words(q, h.d, lanes);
    q += PIECES<E> * operand.piece;
    x.q = reinterpret_cast<T*>(operand.data);
    x.uncut = cut_matrix<E, true, false>(h.q, x.first, x.count, h.d, operand, factor.in_q);
    x.risen = adds_by_position(h.rules);
    x.finished = false;
    x.single =
        PIPELINED<E> && x.keys.any.high <= x.keys.any.low / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK;
    x.o = o + up_to(h.d_v, TILE) * at;
    x.max = sums + 3 * at;
    x.total = x.sum = x.max + lanes;
    x.seen = x.sum + lanes;
    if (!x.single) clear_sums(h, x);
    for (index_t i = 0; i < lanes; i++) x.max[i] = Bits<T>::lowest, x.sum[i] = x.seen[i] = 0;
    tiles += x.vectors * up_to(max_index(x.keys.any.high - x.keys.any.low, 0), TILE) / TILE;
  }
  FA_INLINE_MEMBER void plan(int sub_blocks, Interval) {
    count = sub_blocks;
    fetch_next_queries<E>(pipeline.fetcher, h, next, tiles);
  }
  FA_INLINE_MEMBER void take_keys(index_t block, index_t rows) {
    k = block_rows<E>(h.k, h.pages, h.pages.k_page, block, rows, h.d, k_rows);
    v = block_rows<E>(h.v, h.pages, h.pages.v_page, block, rows, h.d_v, v_rows);
    if constexpr (PIPELINED<E>) {
      block_keys = keys + block / KEY_BLOCK % 2;
      finish_units<E>(pipeline, block_keys);
    }
    block_keys->uncut_k = cut_matrix<E, false, true>(k, 0, rows, h.d, block_keys->k);
    block_keys->uncut_v = cut_matrix<E, true, true>(v, 0, rows, h.d_v, block_keys->v);
  }
  FA_INLINE_MEMBER void attend(int i, index_t block, index_t k0, index_t k1, bool use_mask) {
    TiledQueries& x = subs[i];
    Scored& b = units[turn % in_flight];
    b.x = &x, b.keys = block_keys, b.k = k, b.v = v;
    b.s = s[turn % twice], b.tile = tile, b.sums = products;
    const Operand& own = words[turn % twice];
    b.words = {own.data, as_words(nullptr, KEY_BLOCK, x.vectors * W<T>).row, own.piece};
    turn++;
    b.bias = h.rules.bias;
    const int then = i + twice;  // the next unit, or the one after it
    if (b.bias.data)
      b.bias.data +=
          subs[then % count].first * b.bias.row + (block + then / count * KEY_BLOCK) * b.bias.col;
    plan_unit<E>(h, factor, block, k0, k1, use_mask, b);
    if constexpr (PIPELINED<E>) {
      advance<E>(pipeline, &b);
      if (block_keys->uncut_v)
        finish_units<E>(pipeline, nullptr);  // whose masks are kept in b.tile
    } else {
      block_probabilities<E>(h, b, pipeline.fetcher);
      add_values<E>(h, b, Fetch{pipeline.fetcher});
    }
  }
  FA_INLINE_MEMBER void end(int) {
    if constexpr (PIPELINED<E>) finish_units<E>(pipeline, nullptr);
    for (int i = 0; i < count; i++) {
      TiledQueries& x = subs[i];
      if (x.finished) continue;
      if (x.single) clear_sums(h, x);  // that saw no key
      finish<E>(h, x);
    }
  }
};

template <class E> FA_ENTRY size_t forward_scratch_on_tiles(const ForwardHead& h, index_t queries) {
  Layout measure(nullptr);
  TiledForward<E>(h, 0, queries, {}, measure);
  return measure.bytes();
}
template <class E>
FA_ENTRY void forward_on_tiles(const ForwardHead& h, index_t q_begin, index_t q_end,
                               const NextQueries& next, void* scratch) {
  const Tiles configured;
  Layout layout(scratch);
  TiledForward<E> engine(h, q_begin, q_end - q_begin, next, layout);
  forward_in_blocks(engine, h, q_begin, q_end);
}

}  // namespace
}  // namespace fusedattn
