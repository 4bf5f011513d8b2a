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
#include "kernel/attention/turns.h"

namespace fusedattn {
namespace {

template <class E>
FA_INLINE void cut_queries(TiledBackward& b, const BackwardHead& h, const Matrix& q,
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

template <class E> FA_INLINE void cut_keys(TiledBackward& b, const BackwardHead& h) {
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
FA_NOINLINE void add_to_dbias(const TiledBackward& b, const Matrix& to) {
  for (index_t q = 0; q < b.nq; q++)
    for (index_t k = 0; k < b.nk; k++)
      *reinterpret_cast<float*>(to.data + q * to.row + k * to.col) +=
          b.ds_all[q * TILED_BACK_KEYS + k];
}

// Has the fetcher fetch what comes after this block of queries: the next one, or what becomes of
// this block of keys and then the next one.
template <class E> FA_NOINLINE void fetch_next(const BackwardHead& h, TiledBackward& b, index_t g) {
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
template <class E> FA_INLINE index_t products_in_block(const TiledBackward& b) {
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

// One block of queries [q0, q0 + nq) of query head g.
template <class E>
FA_NOINLINE void backward_queries(const BackwardHead& h, TiledBackward& b, index_t g) {
  const index_t turn = b.q0 / TILED_BACK_QUERIES;
  const Turn dq_turn = turn_at(h.dq_turns, g, turn), bias_turn = turn_at(h.bias_turns, g, turn);
  const bool bias_per_key = h.dbias.row == 0;
  Rules rules = h.rules;
  if (rules.mask.data) rules.mask.data += g * h.mask_head;
  if (rules.bias.data) rules.bias.data += g * h.bias_head;
  if (h.alibi_slopes) rules.alibi_slope = h.alibi_slopes[g];
  rules.dropout.head += uint32_t(g);
  Matrix q = h.q, dout = h.dout;
  q.data += g * h.q_head;
  dout.data += g * h.dout_head;
  const Interval visible = h.visible[turn];
  if (visible.low < b.k0 + b.nk && visible.high > b.k0) {
    b.lse2 = static_cast<const float*>(h.lse2) + g * h.stat_head + b.q0;
    b.delta = static_cast<const float*>(h.delta) + g * h.stat_head + b.q0;
    cut_queries<E>(b, h, q, dout);
    if (look(b, rules)) {
      bool uncut = false;
      for (const uint32_t bits : b.uncut_k) uncut |= bits != 0;
      if (uncut) __builtin_memset(b.uncut_dq, 0, size_t(TILED_BACK_QUERIES * b.d) * sizeof(float));
      fetch_next<E>(h, b, g);
      start_fetching(b.fetcher, products_in_block<E>(b), LINES_AT_ONCE);
      backward_columns<E>(b, h, rules, q, dout);
      wait(h, dq_turn);
      if (h.dq.data) add_queries<E>(b, h, g, uncut);
      if (h.dbias.data && bias_per_key) {
        add_to_dbias(b, {reinterpret_cast<char*>(b.dbias), 0, index_t(sizeof(float))});
      } else if (h.dbias.data) {
        wait(h, bias_turn);
        add_to_dbias(b, {h.dbias.data + g * h.dbias_head + b.q0 * h.dbias.row + b.k0 * h.dbias.col,
                         h.dbias.row, h.dbias.col});
      }
    }
  }
  pass_on(h, dq_turn);
  if (!bias_per_key) pass_on(h, bias_turn);
}

// As finish_bias.
FA_NOINLINE void finish_bias(const BackwardHead& h, const TiledBackward& b, index_t g) {
  const Turn turn = turn_at(h.bias_turns, g, 0);
  wait(h, turn);
  for (index_t k = 0; k < b.nk; k++)
    *reinterpret_cast<float*>(h.dbias.data + g * h.dbias_head + (b.k0 + k) * h.dbias.col) +=
        b.dbias[k];
  pass_on(h, turn);
  __builtin_memset(b.dbias, 0, TILED_BACK_KEYS * sizeof(float));
}

// Carves what a block needs off the scratch; returns the rest.
template <class E> FA_INLINE char* lay_out(const BackwardHead& h, char* scratch, TiledBackward& b) {
  constexpr int P = PIECES<E>, C = COMPUTED<E>;
  const index_t keys = TILED_BACK_KEYS, queries = TILED_BACK_QUERIES, cell = CELL * CELL;
  // An odd number of cache lines from row to row: tiles are read from the L2 cache at 2.5 TFLOP/s,
  // against 1.6 with two lines and 1.1 with sixteen.
  const auto operand = [&](int pieces, index_t rows, index_t bytes) {
    const index_t row = up_to(bytes, 128) + 64, piece = up_to(rows, DEPTH) * row;
    return Operand{carve<char>(scratch, pieces * piece), row, piece};
  };
  b.d = h.d, b.d_v = h.d_v;
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
    (i % 2 ? b.dp : b.s)[i / 2] = carve<float>(scratch, cell);
    scratch += 1088;  // or one's stores would look like what the other's loads wait for
  }
  b.bent = carve<float>(scratch, cell);
  b.keep = carve<float>(scratch, cell);
  b.sum = carve<float>(scratch, CELL * up_to(max_index(b.d, b.d_v), DEPTH));
  b.dk = carve<float>(scratch, keys * up_to(b.d, TILE));
  b.dv = carve<float>(scratch, keys * up_to(b.d_v, TILE));
  b.ds_all = h.dbias.data ? carve<float>(scratch, queries * keys) : nullptr;
  b.dbias = carve<float>(scratch, keys);
  b.uncut_dq = carve<float>(scratch, queries * b.d);
  return scratch;
}
template <class E> FA_ENTRY size_t backward_scratch_on_tiles(const BackwardHead& h) {
  static char base[64];
  TiledBackward b;
  return size_t(lay_out<E>(h, base, b) - base);
}

template <class E>
FA_ENTRY void backward_on_tiles(const BackwardHead& h, index_t key_block, void* scratch) {
  TiledBackward b;
  lay_out<E>(h, static_cast<char*>(scratch), b);
  b.k0 = key_block * TILED_BACK_KEYS;
  b.nk = min_index(TILED_BACK_KEYS, h.sk - b.k0);
  b.factor = float(logit_factors<float>(h.scale, h.rules).before);
  b.need_ds = h.dq.data || h.dk.data || h.dbias.data;
  for (bool& begun : b.begun) begun = false;
  __builtin_memset(b.dbias, 0, TILED_BACK_KEYS * sizeof(float));
  cut_keys<E>(b, h);
  const Tiles tiles;
  for (index_t g = 0; g < h.group; g++) {
    for (b.q0 = 0; b.q0 < h.sq; b.q0 += TILED_BACK_QUERIES) {
      b.nq = min_index(TILED_BACK_QUERIES, h.sq - b.q0);
      backward_queries<E>(h, b, g);
    }
    if (h.dbias.data && h.dbias.row == 0) finish_bias(h, b, g);
  }
  float dk_scale[CELL], dv_scale[CELL];
  for (index_t i = 0; i < CELL; i++)
    dk_scale[i] = float(h.scale), dv_scale[i] = float(h.rules.dropout.scale);
  for (index_t c = 0; c * CELL < b.nk; c++) {
    const index_t first = b.k0 + c * CELL, n = min_index(CELL, b.nk - c * CELL);
    const index_t then = first + n, end = min_index(then + CELL, b.k0 + b.nk);
    fetch_crowded_rows(h.dk, then, end, b.d * index_t(sizeof(E)));
    fetch_crowded_rows(h.dv, then, end, b.d_v * index_t(sizeof(E)));
    begin_column(b, int(c));
    if (h.dk.data) unpack_transposed<E>(dk_of(b, c), CELL, dk_scale, h.dk, first, n, b.d);
    if (h.dv.data) unpack_transposed<E>(dv_of(b, c), CELL, dv_scale, h.dv, first, n, b.d_v);
  }
}

}  // namespace
}  // namespace fusedattn
