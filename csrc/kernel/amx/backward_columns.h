// The steps of the backward pass on tiles over one block of queries and one of keys: P and dS, cell
// by cell, then the products that add them up over those cells that see something.
#pragma once

#include "kernel/amx/backward_cell.h"
#include "kernel/amx/backward_uncut.h"

namespace fusedattn {
namespace {

// to[r][0:cols] += sum[r][0:cols] * factor
FA_NOINLINE void add_rows(float* to, index_t to_row, const float* sum, index_t sum_row,
                          index_t rows, index_t cols, float factor) {
  const Vec<float> f = splat(factor);
  for (index_t r = 0; r < rows; r++, to += to_row, sum += sum_row) {
    index_t c = 0;
    for (; c + W<float> <= cols; c += W<float>)
      store(to + c, fma<float>(load(sum + c), f, load(to + c)));
    if (c < cols) {
      const int n = int(cols - c);
      store_n(to + c, fma<float>(load_n(sum + c, n), f, load_n(to + c, n)), n);
    }
  }
}

// c (rows of c_row bytes) = a b, or where ADD c += a b, a sum over those cells along it that see
// something.
template <int PA, int PB, bool ADD, class Work>
FA_INLINE void multiply_runs(index_t m, index_t n, const Operand& a, const Operand& b,
                             const Runs& runs, float* c, index_t c_row, Work work) {
  for (int i = 0; i < runs.count; i++) {
    const index_t first = runs.run[i].first * CELL, depth = runs.run[i].last * CELL - first;
    const Operand at{a.data + first * 2, a.row, a.piece},
        bt{b.data + first / 2 * b.row, b.row, b.piece};
    if (i == 0)
      multiply_operands<PA, PB, false, ADD>(m, n, depth, at, bt, c, c_row, work);
    else
      multiply_operands<PA, PB, false, true>(m, n, depth, at, bt, c, c_row, work);
  }
}

// gradient (n, CELL) += rows p over the queries of `runs`: rows (n, queries), p words of `keys`
// keys. Of one piece the sums go on in the tiles; of several, the block's sum comes first and joins
// then, with fewer roundings.
template <class E, class Work>
FA_INLINE void add_column(const TiledBackwardBlock& b, const Operand& rows, const Operand& p,
                          const Runs& runs, index_t n, index_t keys, bool begun, float* gradient,
                          Work work) {
  if constexpr (COMPUTED<E> == 1) {
    if (begun)
      multiply_runs<1, 1, true>(n, keys, rows, p, runs, gradient, 4 * CELL, work);
    else
      multiply_runs<1, 1, false>(n, keys, rows, p, runs, gradient, 4 * CELL, work);
  } else {
    float* sum = begun ? b.sum : gradient;
    multiply_runs<PIECES<E>, COMPUTED<E>, false>(n, keys, rows, p, runs, sum, 4 * CELL, work);
    if (begun) add_rows(gradient, CELL, sum, CELL, n, CELL, 1.0f);
  }
}

FA_INLINE void begin_column(TiledBackwardBlock& b, int c) {
  if (b.begun[c]) return;
  b.begun[c] = true;
  __builtin_memset(dk_of(b, c), 0, size_t(up_to(b.d, TILE) * CELL) * sizeof(float));
  __builtin_memset(dv_of(b, c), 0, size_t(up_to(b.d_v, TILE) * CELL) * sizeof(float));
}

// A column of cells whose P and dS are operands (`turn` says which): what is left to add to dv and
// dk, `width` columns of them at a time.
struct Column {
  int c, turn;
  index_t at, parts, v_parts, width;
  bool begun;  // was there something in dk and dv?
};

// The cells of one block of queries on their way. While the scores of one and a part of the column
// before are multiplied, P and dS of the last one are made and cut beside the products, evenly
// spread: 4 vectors of them for every 12 products are best, 2 or 8 gain nothing.
struct Cells {
  TiledBackwardBlock& b;
  const BackwardHead& h;
  const Rules& rules;
  const Matrix &q, &dout;
  bool waiting = false;  // a cell for its P and dS
  CellSteps steps{};
  Column column{};
  int turn = 0, columns = 0;  // which s and dp, which p and ds
};

// S and dP of cell (r, c) are there: what is to be done with them.
template <class E> FA_INLINE void begin_cell(Cells& x, int r, int c) {
  TiledBackwardBlock& b = x.b;
  CellSteps& t = x.steps;
  const Rules& rules = x.rules;
  t.b = &b, t.rules = &rules;
  t.r = r, t.c = c;
  t.s = b.s[x.turn], t.dp = b.dp[x.turn];
  t.p = b.p[x.columns], t.ds = b.ds[x.columns];
  t.uncut = b.uncut_q[r] | b.uncut_dout[r] | b.uncut_k[c] | b.uncut_v[c];
  t.kind = t.uncut ? Kind::ruled : kind_of(rules);
  if (t.kind == Kind::some && b.cover[r][c] == Cover::all) t.kind = Kind::all;
  t.at = 0;
  t.draws = rules.dropout.threshold ? CELL / 4 : 0;
  t.left = t.draws + CELL / 2 / STEP_PAIRS<E>;
  t.run = cell_step<E>(t.kind, b.need_ds);
  x.waiting = true;
  if (!t.uncut) return;
  const index_t first = b.q0 + r * CELL, key = b.k0 + c * CELL;
  if (rules.bias.data) forbid_by_bias<E>(b, rules.bias, r, c);
  const uint32_t* allowed = b.allowed[r][c];
  if (b.uncut_q[r] | b.uncut_k[c])
    score_uncut_pairs<E>(allowed, t.s, x.q, first, b.uncut_q[r], x.h.k, key, b.uncut_k[c], b.d);
  if (b.need_ds && (b.uncut_dout[r] | b.uncut_v[c]))
    score_uncut_pairs<E>(allowed, t.dp, x.dout, first, b.uncut_dout[r], x.h.v, key, b.uncut_v[c],
                         b.d_v);
}
// The next part of the column before.
template <class E, class Work> FA_INLINE void add_part(Cells& x, Work work) {
  TiledBackwardBlock& b = x.b;
  Column& column = x.column;
  const int c = column.c;
  const index_t i = column.at++;
  const bool values = i < column.v_parts;
  const index_t first = (values ? i : i - column.v_parts) * column.width, d = values ? b.d_v : b.d;
  const Operand &all = values ? b.dout_t : b.q_t, &p = (values ? b.p : b.ds)[column.turn];
  add_column<E>(b, {all.data + first * all.row, all.row, all.piece}, p, b.rows[c],
                min_index(column.width, d - first), min_index(CELL, b.nk - c * CELL), column.begun,
                (values ? dv_of(b, c) : dk_of(b, c)) + first * CELL, work);
}
// What uncut numbers in it give to the gradients; if it was the last of its column, that is next.
template <class E> FA_NOINLINE void end_cell(Cells& x) {
  TiledBackwardBlock& b = x.b;
  const BackwardHead& h = x.h;
  const CellSteps& t = x.steps;
  const int r = t.r, c = t.c;
  x.waiting = false;
  if (t.uncut) {
    const uint32_t* allowed = b.allowed[r][c];
    const index_t first = b.q0 + r * CELL, key = b.k0 + c * CELL;
    begin_column(b, c);
    if (h.dv.data && b.uncut_dout[r])
      add_uncut_queries<E>(allowed, t.s, x.dout, first, b.uncut_dout[r], b.d_v, dv_of(b, c));
    if (h.dk.data && b.uncut_q[r])
      add_uncut_queries<E>(allowed, b.bent, x.q, first, b.uncut_q[r], b.d, dk_of(b, c));
    if (h.dq.data && b.uncut_k[c])
      add_uncut_keys<E>(allowed, b.bent, h.k, key, b.uncut_k[c], b.d, b.uncut_dq + r * CELL * b.d);
  }
  const Runs& rows = b.rows[c];
  if (rows.run[rows.count - 1].last != r + 1) return;
  while (x.column.at < x.column.parts) add_part<E>(x, Fetch{b.fetcher});
  const index_t width = PIPELINED<E> ? CELL : max_index(b.d, b.d_v);
  const index_t v_parts = h.dv.data ? (b.d_v + width - 1) / width : 0,
                k_parts = h.dk.data ? (b.d + width - 1) / width : 0;
  x.column = {c, x.columns, 0, v_parts + k_parts, v_parts, width, b.begun[c]};
  b.begun[c] = true;
  if constexpr (PIPELINED<E>) x.columns ^= 1;
}

FA_INLINE index_t cells_of(const Runs& runs) {
  index_t n = 0;
  for (int i = 0; i < runs.count; i++) n += runs.run[i].last - runs.run[i].first;
  return n;
}

// Products of cell (r, c), or where r < 0 none, and of so many parts of the column before.
template <class E> FA_NOINLINE void advance_cells(Cells& x, int r, int c, index_t parts) {
  TiledBackwardBlock& b = x.b;
  constexpr int P = PIECES<E>;
  constexpr index_t each = 4 * piece_order<P, P>().n,
                    each_part = 4 * piece_order<P, COMPUTED<E>>().n;
  parts = min_index(parts, x.column.parts - x.column.at);
  index_t products = parts ? parts * cells_of(b.rows[x.column.c]) * each_part : 0;
  if (r >= 0)
    products += each * (up_to(b.d, DEPTH) + (b.need_ds ? up_to(b.d_v, DEPTH) : 0)) / DEPTH;
  start_steps(x.steps, products);
  const auto beside = [&] {
    if constexpr (PIPELINED<E>)
      return FetchAndStep{b.fetcher, x.steps};
    else
      return Fetch{b.fetcher};
  }();
  if (r >= 0) {
    if constexpr (PIPELINED<E>) x.turn ^= 1;
    const auto strip = [&](const Operand& rows) FA_LAMBDA {
      return Operand{rows.data + r * CELL * rows.row, rows.row, rows.piece};
    };
    const index_t nq = min_index(CELL, b.nq - r * CELL), nk = min_index(CELL, b.nk - c * CELL);
    multiply_operands<P, P>(nq, nk, b.d, strip(b.q), b.k[c], b.s[x.turn], 4 * CELL, beside);
    if (b.need_ds)
      multiply_operands<P, P>(nq, nk, b.d_v, strip(b.dout), b.v[c], b.dp[x.turn], 4 * CELL, beside);
  }
  for (; parts > 0; parts--) add_part<E>(x, beside);
  const auto finish = [&] {
    finish_steps(x.steps, x.steps.kind > Kind::some);
    if (x.waiting) end_cell<E>(x);
  };
  finish();
  if (r >= 0) begin_cell<E>(x, r, c);
  if constexpr (PIPELINED<E>) return;
  finish();  // of numbers in one piece there are too few products to run anything beside
  while (x.column.at < x.column.parts) add_part<E>(x, Fetch{b.fetcher});
}

// P and dS of all cells; what they give to dk and dv.
template <class E>
FA_INLINE void backward_columns(TiledBackwardBlock& b, const BackwardHead& h, const Rules& rules,
                                const Matrix& q, const Matrix& dout) {
  Cells x{b, h, rules, q, dout};
  for (int c = 0; c * CELL < b.nk; c++) {
    bool first = true;
    for (int r = 0; r * CELL < b.nq; r++)
      if (b.cover[r][c] != Cover::none) {
        const index_t parts = x.column.parts, cells = cells_of(b.rows[c]);
        advance_cells<E>(x, r, c, first ? parts : (parts + cells - 1) / cells);
        first = false;
      } else if (b.ds_all) {
        clear_cell(b, r, c);
      }
  }
  for (int i = 0; i < 2; i++) advance_cells<E>(x, -1, 0, x.column.parts);
}

template <class E>
FA_INLINE void add_queries(TiledBackwardBlock& b, const BackwardHead& h, index_t g, bool uncut) {
  const index_t row = h.dq.row / index_t(sizeof(float)), ld = up_to(b.d, DEPTH);
  float* dq = reinterpret_cast<float*>(h.dq.data + g * h.dq_head + b.q0 * h.dq.row);
  Fetch fetch{b.fetcher};
  for (int r = 0; r * CELL < b.nq; r++) {
    if (b.columns[r].count == 0) continue;
    const Operand& s = b.ds_rows;
    const Operand rows{s.data + r * CELL * s.row, s.row, s.piece};
    const index_t n = min_index(CELL, b.nq - r * CELL);
    multiply_runs<COMPUTED<E>, PIECES<E>, false>(n, b.d, rows, b.k_pairs, b.columns[r], b.sum,
                                                 4 * ld, fetch);
    add_rows(dq + r * CELL * row, row, b.sum, ld, n, b.d, float(h.scale));
    if (uncut)
      add_rows(dq + r * CELL * row, row, b.uncut_dq + r * CELL * b.d, b.d, n, b.d, float(h.scale));
  }
}

}  // namespace
}  // namespace fusedattn
