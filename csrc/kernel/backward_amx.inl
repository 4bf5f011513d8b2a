// Backward on tiles: dq, dk, dv (and dbias) of one block of keys against all queries that see them,
// the same five products as in backward.inl. Keys lie in the lanes; S and dP are computed in cells
// of 32 x 32, which become operands while they are in the L1 cache; dk and dv are kept transposed.
//
//   for each block of 128 queries: q and dout are cut, as rows and transposed
//     for each column of 32 keys
//       for each 32 of the queries    S = q K^T, dP = dout V^T, P and dS, which are cut
//       dv^T += dout^T P, dk^T += q^T dS            a product over 128 queries
//     dq += dS K                                    a product over 256 keys
//
// Cost of a cell at d = 64: 40 tile products of 16 cycles with one piece, 240 with three, and 64
// vectors of P and dS at 12 cycles. Measured on a Granite Rapids: 3200 cycles in all with one
// piece, a sixth of them for cutting; 10700 with three. There a tile product takes 27 cycles, as 48
// KiB of operands come from the L2 cache for each cell, and a vector of P and dS 28, as theirs go
// there. Running tile products between the vectors hides little (3 %): beside tiles they take twice
// as long.

template <class E>
FA_INLINE void cut_queries(BackwardAmx& b, const BackwardHead& h, const Matrix& q,
                           const Matrix& dout) {
  const bool odd_q = cut_matrix<E, false, true>(q, b.q0, b.nq, b.d, b.q);
  bool odd_dout = false;
  if (h.dk.data) cut_matrix<E, true, true>(q, b.q0, b.nq, b.d, b.q_t);
  if (b.need_ds) odd_dout = cut_matrix<E, false, true>(dout, b.q0, b.nq, b.d_v, b.dout);
  if (h.dv.data) odd_dout |= cut_matrix<E, true, true>(dout, b.q0, b.nq, b.d_v, b.dout_t);
  __builtin_memset(b.odd_q, 0, sizeof(b.odd_q));
  __builtin_memset(b.odd_dout, 0, sizeof(b.odd_dout));
  if (odd_q) find_odd_rows<E>(q, b.q0, b.nq, b.d, b.odd_q);
  if (odd_dout) find_odd_rows<E>(dout, b.q0, b.nq, b.d_v, b.odd_dout);
}

template <class E> FA_INLINE void cut_keys(BackwardAmx& b, const BackwardHead& h) {
  bool odd_k = false, odd_v = false;
  for (index_t c = 0; c * CELL < b.nk; c++) {
    const index_t first = b.k0 + c * CELL, n = min_index(CELL, b.nk - c * CELL);
    odd_k |= cut_matrix<E, true, false>(h.k, first, n, b.d, b.k[c]);
    if (b.need_ds) odd_v |= cut_matrix<E, true, false>(h.v, first, n, b.d_v, b.v[c]);
  }
  if (h.dq.data) cut_matrix<E, false, false>(h.k, b.k0, b.nk, b.d, b.k_pairs);
  __builtin_memset(b.odd_k, 0, sizeof(b.odd_k));
  __builtin_memset(b.odd_v, 0, sizeof(b.odd_v));
  if (odd_k) find_odd_rows<E>(h.k, b.k0, b.nk, b.d, b.odd_k);
  if (odd_v) find_odd_rows<E>(h.v, b.k0, b.nk, b.d_v, b.odd_v);
}

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

// Tiles 0 to 3 = MI x 2 tiles of c, with rows of CELL.
template <int MI> FA_INLINE void load_sums(const float* c) {
  const index_t row = 4 * CELL;
  asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(c), "r"(row) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm1" ::"r"(c + TILE), "r"(row) : "memory");
  c += TILE * CELL;
  if (MI == 2) asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(c), "r"(row) : "memory");
  if (MI == 2) asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(c + TILE), "r"(row) : "memory");
}
// c += a b, one piece each: MI x 2 tiles.
template <int MI>
FA_INLINE void add_tile_product(const Operand& a, const Operand& b, index_t steps, float* c) {
  load_sums<MI>(c);
  for (index_t s = 0; s < steps; s++) {
    load_rows_tiles<MI>(a.data + s * 2 * DEPTH, a.row);
    load_words_tiles<2>(b.data + s * DEPTH / 2 * b.row, b.row);
    multiply_tiles<MI, 2>();
  }
  store_tiles<MI, 2>(c, 4 * CELL);
}

// gradient (n, CELL) += rows p over the queries of cells [first, last): rows (n, queries), p words.
// Of one piece the sums go on in the tiles; of several, the block's sum comes first and joins then,
// with fewer roundings.
template <class E>
FA_INLINE void add_column(const BackwardAmx& b, const Operand& rows, const Operand& p, int first,
                          int last, index_t n, float* gradient) {
  const Operand a{rows.data + first * 2 * CELL, rows.row, rows.piece},
      w{p.data + first * CELL / 2 * p.row, p.row, p.piece};
  if constexpr (COMPUTED<E> == 1) {
    for (index_t i = 0; i < n; i += CELL) {
      const Operand at{a.data + i * a.row, a.row, a.piece};
      if (n - i > TILE)
        add_tile_product<2>(at, w, last - first, gradient + i * CELL);
      else
        add_tile_product<1>(at, w, last - first, gradient + i * CELL);
    }
  } else {
    multiply_operands<PIECES<E>, COMPUTED<E>>(n, CELL, (last - first) * CELL, a, w, b.sum,
                                              4 * CELL);
    add_rows(gradient, CELL, b.sum, CELL, n, CELL, 1.0f);
  }
}

// P and dS of one cell as operands; what odd numbers in it give to the gradients.
template <class E>
FA_INLINE void backward_cell(const BackwardAmx& b, const BackwardHead& h, const Rules& rules,
                             const Matrix& q, const Matrix& dout, int r, int c) {
  constexpr int P = PIECES<E>;
  const auto strip = [&](const Operand& rows) __attribute__((always_inline)) {
    return Operand{rows.data + r * CELL * rows.row, rows.row, rows.piece};
  };
  tile_product<P, P, 2, 2>(strip(b.q), b.k[c], up_to(b.d, DEPTH) / DEPTH, b.s, 4 * CELL);
  if (b.need_ds)
    tile_product<P, P, 2, 2>(strip(b.dout), b.v[c], up_to(b.d_v, DEPTH) / DEPTH, b.dp, 4 * CELL);
  if (b.sight[r][c] == Sight::all) {
    if (b.need_ds)
      cut_cell<E, true, true>(b, rules, r, c);
    else
      cut_cell<E, true, false>(b, rules, r, c);
    return;
  }
  const index_t first = b.q0 + r * CELL, key = b.k0 + c * CELL;
  dense_cell<E>(b, rules, r, c);
  if (b.odd_q[r] | b.odd_k[c])
    repair_scores<E>(b, b.s, q, first, b.odd_q[r], h.k, key, b.odd_k[c], b.d);
  if (b.need_ds && (b.odd_dout[r] | b.odd_v[c]))
    repair_scores<E>(b, b.dp, dout, first, b.odd_dout[r], h.v, key, b.odd_v[c], b.d_v);
  apply_rules(b, rules, r);
  if (b.need_ds)
    cut_cell<E, false, true>(b, rules, r, c);
  else
    cut_cell<E, false, false>(b, rules, r, c);
  if (h.dv.data && b.odd_dout[r])
    repair_keys<E>(b, b.s, dout, first, b.odd_dout[r], b.d_v, dv_of(b, c));
  if (h.dk.data && b.odd_q[r]) repair_keys<E>(b, b.bent, q, first, b.odd_q[r], b.d, dk_of(b, c));
  if (h.dq.data && b.odd_k[c])
    repair_queries<E>(b, b.bent, h.k, key, b.odd_k[c], b.d, b.odd_dq + r * CELL * b.d);
}

// P and dS of all cells; what they give to dk and dv.
template <class E>
FA_INLINE void backward_columns(const BackwardAmx& b, const BackwardHead& h, const Rules& rules,
                                const Matrix& q, const Matrix& dout, const Interval* seen) {
  for (int c = 0; c * CELL < b.nk; c++) {
    int first = CELL_ROWS, last = 0;
    for (int r = 0; r * CELL < b.nq; r++)
      if (b.sight[r][c] != Sight::none) first = r < first ? r : first, last = r + 1;
    for (int r = 0; r * CELL < b.nq; r++)
      if (b.sight[r][c] != Sight::none)
        backward_cell<E>(b, h, rules, q, dout, r, c);
      else if (b.ds_all || (r >= first && r < last) || (c >= seen[r].low && c < seen[r].high))
        clear_cell(b, COMPUTED<E>, r, c);
    if (first >= last) continue;
    if (h.dv.data) add_column<E>(b, b.dout_t, b.p, first, last, b.d_v, dv_of(b, c));
    if (h.dk.data) add_column<E>(b, b.q_t, b.ds, first, last, b.d, dk_of(b, c));
  }
}

template <class E>
FA_INLINE void add_queries(const BackwardAmx& b, const BackwardHead& h, index_t g,
                           const Interval* seen, bool odd) {
  const index_t row = h.dq.row / index_t(sizeof(float)), ld = up_to(b.d, DEPTH);
  float* dq = reinterpret_cast<float*>(h.dq.data + g * h.dq_head + b.q0 * h.dq.row);
  for (int r = 0; r * CELL < b.nq; r++) {
    const Interval columns = seen[r];
    if (columns.low >= columns.high) continue;
    const Operand &s = b.ds_rows, &k = b.k_pairs;
    const Operand rows{s.data + r * CELL * s.row + columns.low * 2 * CELL, s.row, s.piece},
        words{k.data + columns.low * (CELL / 2) * k.row, k.row, k.piece};
    multiply_operands<COMPUTED<E>, PIECES<E>>(CELL, b.d, (columns.high - columns.low) * CELL, rows,
                                              words, b.sum, 4 * ld);
    const index_t n = min_index(CELL, b.nq - r * CELL);
    add_rows(dq + r * CELL * row, row, b.sum, ld, n, b.d, float(h.scale));
    if (odd)
      add_rows(dq + r * CELL * row, row, b.odd_dq + r * CELL * b.d, b.d, n, b.d, float(h.scale));
  }
}

// dbias += dS, at `to`.
FA_NOINLINE void add_bias(const BackwardAmx& b, const Matrix& to) {
  for (index_t q = 0; q < b.nq; q++)
    for (index_t k = 0; k < b.nk; k++)
      *reinterpret_cast<float*>(to.data + q * to.row + k * to.col) +=
          b.ds_all[q * BACK_KEYS_AMX + k];
}

// One block of queries [q0, q0 + nq) of query head g.
template <class E>
FA_NOINLINE void backward_queries(const BackwardHead& h, BackwardAmx& b, index_t g) {
  const index_t turn = b.q0 / BACK_QUERIES_AMX;
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
      bool odd = false;
      for (const uint32_t bits : b.odd_k) odd |= bits != 0;
      if (odd) __builtin_memset(b.odd_dq, 0, size_t(BACK_QUERIES_AMX * b.d) * sizeof(float));
      Interval seen[CELL_ROWS] = {};  // columns that a row of cells sees
      for (int r = 0; r * CELL < b.nq; r++)
        for (int c = 0; c * CELL < b.nk; c++)
          if (b.sight[r][c] != Sight::none) seen[r] = {seen[r].high ? seen[r].low : c, c + 1};
      backward_columns<E>(b, h, rules, q, dout, seen);
      wait(h, dq_turn);
      if (h.dq.data) add_queries<E>(b, h, g, seen, odd);
      if (h.dbias.data && bias_per_key) {
        add_bias(b, {reinterpret_cast<char*>(b.dbias), 0, index_t(sizeof(float))});
      } else if (h.dbias.data) {
        wait(h, bias_turn);
        add_bias(b, {h.dbias.data + g * h.dbias_head + b.q0 * h.dbias.row + b.k0 * h.dbias.col,
                     h.dbias.row, h.dbias.col});
      }
    }
  }
  pass_on(h, dq_turn);
  if (!bias_per_key) pass_on(h, bias_turn);
}

// As finish_bias.
FA_NOINLINE void finish_bias(const BackwardHead& h, const BackwardAmx& b, index_t g) {
  const Turn turn = turn_at(h.bias_turns, g, 0);
  wait(h, turn);
  for (index_t k = 0; k < b.nk; k++)
    *reinterpret_cast<float*>(h.dbias.data + g * h.dbias_head + (b.k0 + k) * h.dbias.col) +=
        b.dbias[k];
  pass_on(h, turn);
  __builtin_memset(b.dbias, 0, BACK_KEYS_AMX * sizeof(float));
}

// Carves what a block needs off the scratch; returns the rest.
template <class E> FA_INLINE char* lay_out(const BackwardHead& h, char* scratch, BackwardAmx& b) {
  constexpr int P = PIECES<E>, C = COMPUTED<E>;
  const index_t keys = BACK_KEYS_AMX, queries = BACK_QUERIES_AMX, cell = CELL * CELL;
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
  b.p = operand(C, queries / 2, 4 * CELL);
  b.ds = operand(C, queries / 2, 4 * CELL);
  b.ds_rows = operand(C, queries, 2 * keys);
  b.s = carve<float>(scratch, cell);
  scratch += 1088;  // or dP's stores would look like what S's loads wait for
  b.dp = carve<float>(scratch, cell);
  b.dense = carve<float>(scratch, cell);
  b.bent = carve<float>(scratch, cell);
  b.keep = carve<float>(scratch, cell);
  b.sum = carve<float>(scratch, CELL * up_to(max_index(b.d, b.d_v), DEPTH));
  b.dk = carve<float>(scratch, keys * up_to(b.d, TILE));
  b.dv = carve<float>(scratch, keys * up_to(b.d_v, TILE));
  b.ds_all = h.dbias.data ? carve<float>(scratch, queries * keys) : nullptr;
  b.dbias = carve<float>(scratch, keys);
  b.odd_dq = carve<float>(scratch, queries * b.d);
  return scratch;
}
template <class E> static size_t backward_scratch_amx(const BackwardHead& h) {
  static char base[64];
  BackwardAmx b;
  return size_t(lay_out<E>(h, base, b) - base);
}

template <class E>
static void backward_amx(const BackwardHead& h, index_t key_block, void* scratch) {
  BackwardAmx b;
  lay_out<E>(h, static_cast<char*>(scratch), b);
  b.k0 = key_block * BACK_KEYS_AMX;
  b.nk = min_index(BACK_KEYS_AMX, h.sk - b.k0);
  b.factor = float(logit_factors<float>(h.scale, h.rules).before);
  b.need_ds = h.dq.data || h.dk.data || h.dbias.data;
  __builtin_memset(b.dk, 0, size_t(up_to(b.nk, CELL) * up_to(b.d, TILE)) * sizeof(float));
  __builtin_memset(b.dv, 0, size_t(up_to(b.nk, CELL) * up_to(b.d_v, TILE)) * sizeof(float));
  __builtin_memset(b.dbias, 0, BACK_KEYS_AMX * sizeof(float));
  cut_keys<E>(b, h);
  const Tiles tiles;
  for (index_t g = 0; g < h.group; g++) {
    for (b.q0 = 0; b.q0 < h.sq; b.q0 += BACK_QUERIES_AMX) {
      b.nq = min_index(BACK_QUERIES_AMX, h.sq - b.q0);
      backward_queries<E>(h, b, g);
    }
    if (h.dbias.data && h.dbias.row == 0) finish_bias(h, b, g);
  }
  float dk_scale[CELL], dv_scale[CELL];
  for (index_t i = 0; i < CELL; i++)
    dk_scale[i] = float(h.scale), dv_scale[i] = float(h.rules.dropout.scale);
  for (index_t c = 0; c * CELL < b.nk; c++) {
    const index_t first = b.k0 + c * CELL, n = min_index(CELL, b.nk - c * CELL);
    if (h.dk.data) unpack_transposed<E>(dk_of(b, c), CELL, dk_scale, h.dk, first, n, b.d);
    if (h.dv.data) unpack_transposed<E>(dv_of(b, c), CELL, dv_scale, h.dv, first, n, b.d_v);
  }
}

static void visible_blocks_amx(const Rules& rules, index_t sq, index_t sk, Interval* blocks) {
  for (index_t q = 0; q < sq; q += BACK_QUERIES_AMX)
    *blocks++ = visible_span(rules, q, min_index(q + BACK_QUERIES_AMX, sq), sk).any;
}
