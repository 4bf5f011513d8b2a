// Backward on tiles: dq, dk, dv (and dbias) of one block of keys against all queries that see them,
// the same five products as in attention/backward.h. Keys lie in the lanes; S and dP are computed
// in cells of 32 x 32, which become operands while they are in the L1 cache; dk and dv are kept
// transposed.
//
//   for each block of 128 queries: q and dout are cut, as rows and transposed
//     for each column of 32 keys
//       for each 32 of the queries    S = q K^T, dP = dout V^T, P and dS, which are cut
//       dv^T += dout^T P, dk^T += q^T dS            a product over 128 queries
//     dq += dS K                                    a product over 256 keys
//
// Cost of a cell at d = 64: 40 tile products of 16 cycles with one piece, 240 with three, and 64
// vectors of P and dS at 12 cycles. Measured on a Granite Rapids: 3200 cycles in all with one
// piece, a sixth of them for cutting; 9600 with three. There a tile product takes 25 cycles, as 48
// KiB of operands come from the L2 cache for each cell, and a vector of P and dS 28, as theirs go
// there; of those 28 half hides beside the products. Fetching hides there too: of a head of 128
// queries and keys, that was half the time.
#pragma once

#include "kernel/amx/backward_columns.h"
#include "kernel/attention/backward_loop.h"

namespace fusedattn {
namespace {

template <class E>
FA_INLINE void cut_queries(TiledBackwardBlock& b, const BackwardHead& h, const Matrix& q,
                           const Matrix& dout) {
  const bool uncut_q = cut_matrix<E, false, true>(q, b.q0, b.nq, b.d, b.q);
  if (h.dk.data) cut_again<E, true, true>(q, b.q0, b.nq, b.d, b.q_t, uncut_q);
  bool uncut_dout = false;
  if (b.need_ds) uncut_dout = cut_matrix<E, false, true>(dout, b.q0, b.nq, b.d_v, b.dout);
  if (h.dv.data && b.need_ds)
    cut_again<E, true, true>(dout, b.q0, b.nq, b.d_v, b.dout_t, uncut_dout);
  else if (h.dv.data)
    uncut_dout = cut_matrix<E, true, true>(dout, b.q0, b.nq, b.d_v, b.dout_t);
  __builtin_memset(b.uncut_q, 0, sizeof(b.uncut_q));
  __builtin_memset(b.uncut_dout, 0, sizeof(b.uncut_dout));
  if (uncut_q) find_uncut_rows<E>(q, b.q0, b.nq, b.d, b.uncut_q);
  if (uncut_dout) find_uncut_rows<E>(dout, b.q0, b.nq, b.d_v, b.uncut_dout);
}

template <class E> FA_INLINE void cut_keys(TiledBackwardBlock& b, const BackwardHead& h) {
  bool uncut_k = false, uncut_v = false;
  for (index_t c = 0; c * CELL < b.nk; c++) {
    const index_t first = b.k0 + c * CELL, n = min_index(CELL, b.nk - c * CELL);
    const index_t then = first + n, end = min_index(then + CELL, b.k0 + b.nk);
    fetch_crowded_rows(h.k, then, end, b.d * index_t(sizeof(E)));
    fetch_crowded_rows(h.v, then, end, b.d_v * index_t(sizeof(E)));
    uncut_k |= cut_matrix<E, true, false>(h.k, first, n, b.d, b.k[c]);
    if (b.need_ds) uncut_v |= cut_matrix<E, true, false>(h.v, first, n, b.d_v, b.v[c]);
  }
  if (h.dq.data) cut_again<E, false, false>(h.k, b.k0, b.nk, b.d, b.k_pairs, uncut_k);
  __builtin_memset(b.uncut_k, 0, sizeof(b.uncut_k));
  __builtin_memset(b.uncut_v, 0, sizeof(b.uncut_v));
  if (uncut_k) find_uncut_rows<E>(h.k, b.k0, b.nk, b.d, b.uncut_k);
  if (uncut_v) find_uncut_rows<E>(h.v, b.k0, b.nk, b.d_v, b.uncut_v);
}

// dbias += dS, at `to`.
FA_NOINLINE void add_to_dbias(const TiledBackwardBlock& b, const Matrix& to) {
  for (index_t q = 0; q < b.nq; q++)
    for (index_t k = 0; k < b.nk; k++)
      *reinterpret_cast<float*>(to.data + q * to.row + k * to.col) +=
          b.ds_all[q * TILED_BACK_KEYS + k];
}

// Has the fetcher fetch what comes after this block of queries: the next one, or what becomes of
// this block of keys and then the next one.
template <class E>
FA_NOINLINE void fetch_next(const BackwardHead& h, TiledBackwardBlock& b, index_t g) {
  Fetcher& f = b.fetcher;
  clear_fetcher(f);
  const index_t size = sizeof(E), q_bytes = b.d * size, v_bytes = b.d_v * size;
  const auto at_head = [&](Matrix m, index_t bytes) {
    if (m.data) m.data += g * bytes;
    return m;
  };
  const auto fetch_dense = [&](const Matrix& mask, const Matrix& bias, index_t begin, index_t end,
                               index_t key, index_t keys) {
    if (mask.col == 1) fetch_rows(f, {mask.data + key, mask.row, 1}, begin, end, keys);
    if (bias.col == size)
      fetch_rows(f, {bias.data + key * size, bias.row, size}, begin, end, keys * size);
  };
  index_t q0 = b.q0 + TILED_BACK_QUERIES;
  for (; g < h.group; g++, q0 = 0)
    for (; q0 < h.sq; q0 += TILED_BACK_QUERIES) {
      const Interval keys = h.visible[q0 / TILED_BACK_QUERIES];
      if (keys.low >= b.k0 + b.nk || keys.high <= b.k0) continue;
      const index_t end = min_index(q0 + TILED_BACK_QUERIES, h.sq);
      fetch_rows(f, at_head(h.dq, h.dq_head), q0, end, b.d * index_t(sizeof(float)));
      fetch_dense(at_head(h.rules.mask, h.mask_head), at_head(h.rules.bias, h.bias_head), q0, end,
                  b.k0, b.nk);
      fetch_rows(f, at_head(h.dout, h.dout_head), q0, end, v_bytes);
      fetch_rows(f, at_head(h.q, h.q_head), q0, end, q_bytes);
      return;
    }
  const NextKeys& next = h.next;
  const index_t first = min_index(next.sq, TILED_BACK_QUERIES), all = min_index(next.sq, 512);
  fetch_dense(next.mask, next.bias, 0, first, next.begin, next.end - next.begin);
  if (next.out.data) fetch_rows(f, next.dout, first, all, v_bytes);
  fetch_rows(f, next.dq, 0, all, b.d * index_t(sizeof(float)));
  fetch_rows(f, next.out, 0, all, v_bytes);
  fetch_rows(f, next.dout, 0, first, v_bytes);
  fetch_rows(f, next.q, 0, first, q_bytes);
  fetch_rows(f, next.v, next.begin, next.end, v_bytes);
  fetch_rows(f, next.k, next.begin, next.end, q_bytes);
  fetch_rows(f, h.dv, b.k0, b.k0 + b.nk, v_bytes);
  fetch_rows(f, h.dk, b.k0, b.k0 + b.nk, q_bytes);
}

// Products of tiles in a block of queries, about.
template <class E> FA_INLINE index_t products_in_block(const TiledBackwardBlock& b) {
  const index_t d = up_to(b.d, DEPTH) / DEPTH, d_v = up_to(b.d_v, DEPTH) / DEPTH;
  const index_t q_tiles = up_to(b.nq, TILE) / TILE, k_tiles = up_to(b.nk, TILE) / TILE,
                q_cells = up_to(b.nq, CELL) / CELL, k_cells = up_to(b.nk, CELL) / CELL;
  index_t cells = 0;
  for (const Runs& rows : b.rows)
    for (int i = 0; i < rows.count; i++) cells += rows.run[i].last - rows.run[i].first;
  const index_t all = (d + d_v) * k_tiles * (q_tiles + 2 * q_cells) + 2 * d * q_tiles * k_cells;
  constexpr int P = PIECES<E>, each = P == 3 ? 6 : P * P;
  return each * all * cells / (q_cells * k_cells);
}

// The engine of backward_over_queries on tiles, and its scratch.
template <class E> struct TiledBackward : TiledBackwardBlock {
  using T = float;
  static constexpr index_t QUERIES = TILED_BACK_QUERIES;

  const BackwardHead& h;

  FA_INLINE_MEMBER TiledBackward(const BackwardHead& head, index_t key_block, Layout& scratch)
      : h(head) {
    constexpr int P = PIECES<E>, C = COMPUTED<E>;
    constexpr index_t keys = TILED_BACK_KEYS, queries = TILED_BACK_QUERIES;
    TiledBackwardBlock& b = *this;
    b.k0 = key_block * keys;
    b.nk = min_index(keys, h.sk - b.k0);
    b.d = h.d, b.d_v = h.d_v;
    b.factor = float(logit_factors<float>(h.scale, h.rules).before);
    b.need_ds = h.dq.data || h.dk.data || h.dbias.data;
    // An odd number of cache lines from row to row: on a Granite Rapids tiles are read from the L2
    // cache at 2.5 TFLOP/s, against 1.6 with two lines and 1.1 with sixteen.
    const auto operand = [&](int pieces, index_t height, index_t bytes) FA_LAMBDA {
      const index_t row = up_to(bytes, 128) + 64, piece = up_to(height, DEPTH) * row;
      return Operand{scratch.take<char>(pieces * piece), row, piece};
    };
    for (int c = 0; c < CELL_COLUMNS; c++) {
      b.k[c] = operand(P, up_to(b.d, DEPTH) / 2, 4 * CELL);
      b.v[c] = operand(P, up_to(b.d_v, DEPTH) / 2, 4 * CELL);
    }
    b.k_pairs = operand(P, keys / 2, 4 * b.d);
    b.q = operand(P, queries, 2 * b.d);
    b.dout = operand(P, queries, 2 * b.d_v);
    b.q_t = operand(P, b.d, 2 * queries);
    b.dout_t = operand(P, b.d_v, 2 * queries);
    for (int i = 0; i < 2; i++) {
      b.p[i] = operand(C, queries / 2, 4 * CELL);
      b.ds[i] = operand(C, queries / 2, 4 * CELL);
    }
    b.ds_rows = operand(C, queries, 2 * keys);
    for (int i = 0; i < 4; i++) {
      (i % 2 ? b.dp : b.s)[i / 2] = scratch.take<float>(CELL * CELL);
      scratch.skip(1088);  // or one's stores would look like what the other's loads wait for
    }
    b.bent = scratch.take<float>(CELL * CELL);
    b.keep = scratch.take<float>(CELL * CELL);
    b.sum = scratch.take<float>(CELL * up_to(max_index(b.d, b.d_v), DEPTH));
    b.dk = scratch.take<float>(keys * up_to(b.d, TILE));
    b.dv = scratch.take<float>(keys * up_to(b.d_v, TILE));
    b.ds_all = h.dbias.data ? scratch.take<float>(queries * keys) : nullptr;
    b.dbias = scratch.take<float>(keys);
    b.uncut_dq = scratch.take<float>(queries * b.d);
  }

  // The keys become operands, and nothing is summed up yet.
  FA_INLINE_MEMBER void take_keys() {
    for (bool& column : begun) column = false;
    __builtin_memset(dbias, 0, TILED_BACK_KEYS * sizeof(float));
    cut_keys<E>(*this, h);
  }
  FA_INLINE_MEMBER bool begin(const QueryBlock& block) {
    q0 = block.q0, nq = block.nq;
    lse2 = reinterpret_cast<const float*>(block.lse2);
    delta = reinterpret_cast<const float*>(block.delta);
    cut_queries<E>(*this, h, block.q, block.dout);
    if (!cover_cells(*this, block.rules)) return false;
    if (has_uncut_keys()) __builtin_memset(uncut_dq, 0, size_t(QUERIES * d) * sizeof(float));
    fetch_next<E>(h, *this, block.g);
    start_fetching(fetcher, products_in_block<E>(*this), LINES_AT_ONCE);
    backward_columns<E>(*this, h, block.rules, block.q, block.dout);
    return true;
  }
  FA_INLINE_MEMBER void add_dq(const QueryBlock& block) {
    add_queries<E>(*this, h, block.g, has_uncut_keys());
  }
  FA_INLINE_MEMBER void add_dbias(const Matrix& to, index_t) { add_to_dbias(*this, to); }
  FA_INLINE_MEMBER void end() {
    float dk_scale[CELL], dv_scale[CELL];
    for (index_t i = 0; i < CELL; i++)
      dk_scale[i] = float(h.scale), dv_scale[i] = float(h.rules.dropout.scale);
    for (index_t c = 0; c * CELL < nk; c++) {
      const index_t first = k0 + c * CELL, n = min_index(CELL, nk - c * CELL);
      const index_t then = first + n, last = min_index(then + CELL, k0 + nk);
      fetch_crowded_rows(h.dk, then, last, d * index_t(sizeof(E)));
      fetch_crowded_rows(h.dv, then, last, d_v * index_t(sizeof(E)));
      begin_column(*this, int(c));
      if (h.dk.data) unpack_transposed<E>(dk_of(*this, c), CELL, dk_scale, h.dk, first, n, d);
      if (h.dv.data) unpack_transposed<E>(dv_of(*this, c), CELL, dv_scale, h.dv, first, n, d_v);
    }
  }

  FA_INLINE_MEMBER bool has_uncut_keys() const {
    uint32_t any = 0;
    for (const uint32_t bits : uncut_k) any |= bits;
    return any != 0;
  }
};

template <class E> FA_ENTRY size_t backward_scratch_on_tiles(const BackwardHead& h) {
  Layout measure(nullptr);
  TiledBackward<E>(h, 0, measure);
  return measure.bytes();
}
template <class E>
FA_ENTRY void backward_on_tiles(const BackwardHead& h, index_t key_block, void* scratch) {
  Layout layout(scratch);
  TiledBackward<E> engine(h, key_block, layout);
  engine.take_keys();
  const Tiles tiles;
  backward_over_queries(engine, h);
  engine.end();
}

}  // namespace
}  // namespace fusedattn
