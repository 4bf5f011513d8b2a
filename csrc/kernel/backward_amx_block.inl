// The steps of the backward pass on tiles over one block of queries and one of keys: P and dS, cell
// by cell, then the products that add them up over those cells that see something.

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
template <int PA, int PB, bool ADD>
FA_INLINE void multiply_runs(index_t m, index_t n, const Operand& a, const Operand& b,
                             const Runs& runs, float* c, index_t c_row, Fetch& fetch) {
  for (int i = 0; i < runs.count; i++) {
    const index_t first = runs.run[i].first * CELL, depth = runs.run[i].last * CELL - first;
    const Operand at{a.data + first * 2, a.row, a.piece},
        bt{b.data + first / 2 * b.row, b.row, b.piece};
    if (i == 0)
      multiply_operands<PA, PB, false, ADD>(m, n, depth, at, bt, c, c_row, fetch);
    else
      multiply_operands<PA, PB, false, true>(m, n, depth, at, bt, c, c_row, fetch);
  }
}

// gradient (n, CELL) += rows p over the queries of `runs`: rows (n, queries), p words of `keys`
// keys. Of one piece the sums go on in the tiles; of several, the block's sum comes first and joins
// then, with fewer roundings.
template <class E>
FA_INLINE void add_column(const BackwardAmx& b, const Operand& rows, const Operand& p,
                          const Runs& runs, index_t n, index_t keys, bool begun, float* gradient,
                          Fetch& fetch) {
  if constexpr (COMPUTED<E> == 1) {
    if (begun)
      multiply_runs<1, 1, true>(n, keys, rows, p, runs, gradient, 4 * CELL, fetch);
    else
      multiply_runs<1, 1, false>(n, keys, rows, p, runs, gradient, 4 * CELL, fetch);
  } else {
    float* sum = begun ? b.sum : gradient;
    multiply_runs<PIECES<E>, COMPUTED<E>, false>(n, keys, rows, p, runs, sum, 4 * CELL, fetch);
    if (begun) add_rows(gradient, CELL, sum, CELL, n, CELL, 1.0f);
  }
}

FA_INLINE void begin_column(BackwardAmx& b, int c) {
  if (b.begun[c]) return;
  b.begun[c] = true;
  __builtin_memset(dk_of(b, c), 0, size_t(up_to(b.d, TILE) * CELL) * sizeof(float));
  __builtin_memset(dv_of(b, c), 0, size_t(up_to(b.d_v, TILE) * CELL) * sizeof(float));
}

// P and dS of one cell as operands; what odd numbers in it give to the gradients.
template <class E>
FA_INLINE void backward_cell(BackwardAmx& b, const BackwardHead& h, const Rules& rules,
                             const Matrix& q, const Matrix& dout, int r, int c) {
  const auto strip = [&](const Operand& rows) __attribute__((always_inline)) {
    return Operand{rows.data + r * CELL * rows.row, rows.row, rows.piece};
  };
  const index_t nq = min_index(CELL, b.nq - r * CELL), nk = min_index(CELL, b.nk - c * CELL);
  constexpr int P = PIECES<E>;
  const Fetch fetch{b.fetcher};
  multiply_operands<P, P>(nq, nk, b.d, strip(b.q), b.k[c], b.s, 4 * CELL, fetch);
  if (b.need_ds)
    multiply_operands<P, P>(nq, nk, b.d_v, strip(b.dout), b.v[c], b.dp, 4 * CELL, fetch);
  const bool odd = b.odd_q[r] | b.odd_dout[r] | b.odd_k[c] | b.odd_v[c];
  Kind kind = odd ? Kind::ruled : kind_of(rules);
  if (kind == Kind::some && b.sight[r][c] == Sight::all) kind = Kind::all;
  if (kind != Kind::ruled) return cut_cell<E>(b, rules, r, c, kind, false);
  const index_t first = b.q0 + r * CELL, key = b.k0 + c * CELL;
  if (rules.dropout.threshold)
    for (index_t i = 0; i < CELL && r * CELL + i < b.nq; i += 4) {
      keep_rows<float>(rules.dropout, first + i, key, CELL, b.keep + i * CELL, CELL);
      if (i % 8 == 0) keep_awake();
    }
  if (odd && rules.bias.data) forbid_by_bias<E>(b, rules.bias, r, c);
  const uint32_t* allowed = b.allowed[r][c];
  if (b.odd_q[r] | b.odd_k[c])
    repair_scores<E>(allowed, b.s, q, first, b.odd_q[r], h.k, key, b.odd_k[c], b.d);
  if (b.need_ds && (b.odd_dout[r] | b.odd_v[c]))
    repair_scores<E>(allowed, b.dp, dout, first, b.odd_dout[r], h.v, key, b.odd_v[c], b.d_v);
  cut_cell<E>(b, rules, r, c, kind, odd);
  if (!odd) return;
  begin_column(b, c);
  if (h.dv.data && b.odd_dout[r])
    repair_keys<E>(allowed, b.s, dout, first, b.odd_dout[r], b.d_v, dv_of(b, c));
  if (h.dk.data && b.odd_q[r])
    repair_keys<E>(allowed, b.bent, q, first, b.odd_q[r], b.d, dk_of(b, c));
  if (h.dq.data && b.odd_k[c])
    repair_queries<E>(allowed, b.bent, h.k, key, b.odd_k[c], b.d, b.odd_dq + r * CELL * b.d);
}

// P and dS of all cells; what they give to dk and dv.
template <class E>
FA_INLINE void backward_columns(BackwardAmx& b, const BackwardHead& h, const Rules& rules,
                                const Matrix& q, const Matrix& dout) {
  Fetch fetch{b.fetcher};
  for (int c = 0; c * CELL < b.nk; c++) {
    for (int r = 0; r * CELL < b.nq; r++)
      if (b.sight[r][c] != Sight::none)
        backward_cell<E>(b, h, rules, q, dout, r, c);
      else if (b.ds_all)
        clear_cell(b, r, c);
    if (b.rows[c].count == 0) continue;
    const index_t keys = min_index(CELL, b.nk - c * CELL);
    const bool begun = b.begun[c];
    if (h.dv.data)
      add_column<E>(b, b.dout_t, b.p, b.rows[c], b.d_v, keys, begun, dv_of(b, c), fetch);
    if (h.dk.data) add_column<E>(b, b.q_t, b.ds, b.rows[c], b.d, keys, begun, dk_of(b, c), fetch);
    b.begun[c] = true;
  }
}

template <class E>
FA_INLINE void add_queries(BackwardAmx& b, const BackwardHead& h, index_t g, bool odd) {
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
    if (odd)
      add_rows(dq + r * CELL * row, row, b.odd_dq + r * CELL * b.d, b.d, n, b.d, float(h.scale));
  }
}
