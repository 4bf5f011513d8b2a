// What the backward pass on tiles does with one cell, CELL queries by CELL keys: which rules apply
// to it, P and dS from S and dP, and their cutting into operands.

inline constexpr index_t CELL = 32, BACK_KEYS_AMX = 256, BACK_QUERIES_AMX = 128;
inline constexpr int CELL_ROWS = BACK_QUERIES_AMX / CELL, CELL_COLUMNS = BACK_KEYS_AMX / CELL;

enum class Sight { none, some, all };  // of a cell's pairs; all: and no rule changes a logit

struct BackwardAmx {
  index_t k0, nk, d, d_v;
  float factor;  // scale * log2(e), or what a softcap makes of it
  bool need_ds;
  Operand k[CELL_COLUMNS], v[CELL_COLUMNS];  // words (d / 2, CELL), for each column of cells
  Operand k_pairs;                           // words (BACK_KEYS_AMX / 2, d)
  Operand q, dout;                           // rows (BACK_QUERIES_AMX, d)
  Operand q_t, dout_t;                       // rows (d, BACK_QUERIES_AMX)
  Operand p, ds;                             // words (BACK_QUERIES_AMX / 2, CELL), of one column
  Operand ds_rows;                           // rows (BACK_QUERIES_AMX, BACK_KEYS_AMX)
  float *s, *dp;               // (CELL, CELL): S and dP, which become P and dS where rules apply
  float *dense, *bent, *keep;  // (CELL, CELL): as in BackwardBlock
  float* sum;                  // of one product, before it joins others
  float *dk, *dv;              // (CELL_COLUMNS, d rounded up to TILE, CELL)
  float *ds_all, *dbias;       // (BACK_QUERIES_AMX, BACK_KEYS_AMX), (BACK_KEYS_AMX), for dbias
  // Rows with a number that cannot be cut, one bit each, and what these give to dq, (queries, d)
  uint32_t odd_k[CELL_COLUMNS], odd_v[CELL_COLUMNS], odd_q[CELL_ROWS], odd_dout[CELL_ROWS];
  float* odd_dq;
  // Of the block of queries at hand
  index_t q0, nq;
  const float *lse2, *delta;
  Sight sight[CELL_ROWS][CELL_COLUMNS];
};

// Of column c.
FA_INLINE float* dk_of(const BackwardAmx& b, index_t c) {
  return b.dk + c * up_to(b.d, TILE) * CELL;
}
FA_INLINE float* dv_of(const BackwardAmx& b, index_t c) {
  return b.dv + c * up_to(b.d_v, TILE) * CELL;
}

// lse2 or delta of a query. A NaN that the caller made may have bits that rounding carries over
// into a number.
FA_INLINE Vec<float> statistic(float x) {
  return splat(x == x ? x : __builtin_nanf(""));
}

// ---- rules ----

// What each cell of a block of queries sees. False if none sees anything.
FA_NOINLINE bool look(BackwardAmx& b, const Rules& rules) {
  const index_t k_end = b.k0 + b.nk;
  bool any = false;
  for (int r = 0; r * CELL < b.nq; r++) {
    const index_t begin = b.q0 + r * CELL, end = min_index(begin + CELL, b.q0 + b.nq);
    const Span span = visible_span(rules, begin, end, k_end);
    for (int c = 0; c * CELL < b.nk; c++) {
      const index_t low = b.k0 + c * CELL, high = min_index(low + CELL, k_end);
      Sight& sight = b.sight[r][c];
      sight = Sight::none;
      if (span.any.low >= high || span.any.high <= low) continue;
      Cover cover = Cover::all;
      if (rules.mask.data) cover = mask_cover(rules.mask, begin, end - begin, low, high - low);
      if (cover == Cover::none) continue;
      const bool whole =
          end - begin == CELL && high - low == CELL && span.all.low <= low && span.all.high >= high;
      const bool odd = b.odd_q[r] | b.odd_dout[r] | b.odd_k[c] | b.odd_v[c];
      const bool plain = whole && !odd && !has_dense(rules, cover == Cover::some) &&
                         rules.softcap <= 0 && !rules.dropout.threshold;
      sight = plain ? Sight::all : Sight::some;
      any = true;
    }
  }
  return any;
}

// The dense part of a cell: what is added to its logits, -inf where a pair is masked or beyond the
// last query or key.
template <class E>
FA_NOINLINE void dense_cell(const BackwardAmx& b, const Rules& rules, int r, int c) {
  const index_t k0 = b.k0 + c * CELL, nk = min_index(CELL, b.nk - c * CELL);
  const bool use_mask = rules.mask.data != nullptr, dense = has_dense(rules, use_mask);
  for (index_t i = 0; i < CELL; i++) {
    const index_t q = b.q0 + r * CELL + i;
    float* row = b.dense + i * CELL;
    Interval keys{0, 0};
    if (q < b.q0 + b.nq) {
      keys = visible_keys(rules, q);
      if (dense)
        dense_rows<E>(rules, use_mask, false, q, q + 1, k0, nk, row, CELL);
      else
        __builtin_memset(row, 0, CELL * sizeof(float));
      if (rules.dropout.threshold) keep_row<float>(rules.dropout, q, k0, CELL, b.keep + i * CELL);
    }
    for (index_t j = 0; j < CELL; j++)
      row[j] = j < nk && k0 + j >= keys.low && k0 + j < keys.high ? row[j] : -Bits<float>::infinity;
  }
}

// P and dS in the places of S and dP, by every rule; `bent` is dS times the slope of the softcap.
FA_NOINLINE void apply_rules(const BackwardAmx& b, const Rules& rules, int r) {
  using T = float;
  const Vec<T> zero{}, one = splat(1.0f), cap = splat(T(rules.softcap) * LOG2E_F),
                       kept = splat(T(rules.dropout.scale)), factor = splat(b.factor);
  const bool bends = rules.softcap > 0, drops = rules.dropout.threshold;
  for (index_t i = 0; i < CELL; i++) {
    const bool in = r * CELL + i < b.nq;
    const Vec<T> l = statistic(in ? b.lse2[r * CELL + i] : 0.0f);
    const Vec<T> dl = statistic(in ? b.delta[r * CELL + i] : 0.0f);
    for (index_t at = i * CELL; at < (i + 1) * CELL; at += W<T>) {
      const Vec<T> add = load(b.dense + at);
      const IntVec<T> masked = add == splat(-Bits<T>::infinity);
      Vec<T> s = load(b.s + at) * factor, slope = one;
      if (bends) {
        const Vec<T> t = tanh<T>(s);
        slope = one - t * t;
        s = cap * t;
      }
      Vec<T> p = probability<T>(s + add, l);
      p = masked ? zero : p;
      if (b.need_ds) {
        Vec<T> dp = load(b.dp + at);
        if (drops) dp *= load(b.keep + at) * kept;
        Vec<T> ds = p * (dp - dl);
        ds = masked ? zero : ds;
        store(b.dp + at, ds);
        ds *= slope;
        store(b.bent + at, masked ? zero : ds);
      }
      store(b.s + at, drops && in ? p * load(b.keep + at) : p);
    }
  }
}

// ---- operands ----

// The operands of a cell. PLAIN: s and dp hold S and dP of pairs that no rule touches.
template <class E, bool PLAIN, bool NEED_DS>
FA_NOINLINE void cut_cell(const BackwardAmx& b, const Rules& rules, int r, int c) {
  using T = float;
  constexpr int P = COMPUTED<E>;
  const Vec<T> factor = splat(b.factor);
  const float* grads = PLAIN || rules.softcap <= 0 ? b.dp : b.bent;
  for (index_t i = 0; i < CELL / 2; i++) {
    Cut<P> p[2][2], ds[2][2];  // of queries i and i + 16, two vectors of keys
    FA_UNROLL
    for (int x = 0; x < 2; x++) {
      const index_t in_cell = i + x * CELL / 2, q = r * CELL + in_cell;
      const Vec<T> l = PLAIN ? statistic(b.lse2[q]) : Vec<T>{};
      const Vec<T> dl = PLAIN && NEED_DS ? statistic(b.delta[q]) : Vec<T>{};
      FA_UNROLL
      for (int y = 0; y < 2; y++) {
        const index_t at = in_cell * CELL + y * W<T>;
        Vec<T> prob = load(b.s + at), grad = NEED_DS ? load(grads + at) : Vec<T>{};
        if (PLAIN) prob = probability<T>(prob * factor, l);
        if (PLAIN && NEED_DS) grad = prob * (grad - dl);
        p[x][y] = cut_computed<P>(prob);
        if (NEED_DS) ds[x][y] = cut_computed<P>(grad);
        if (PLAIN && NEED_DS && b.ds_all)
          store(b.ds_all + q * BACK_KEYS_AMX + c * CELL + y * W<T>, grad);
      }
      if (NEED_DS)
        store_words<P>(b.ds_rows.data + q * b.ds_rows.row + c * 2 * CELL, b.ds_rows.piece, ds[x][0],
                       ds[x][1]);
    }
    FA_UNROLL
    for (int y = 0; y < 2; y++) {
      const index_t at = (r * CELL / 2 + i) * b.p.row + y * 64;
      store_words<P>(b.p.data + at, b.p.piece, p[0][y], p[1][y]);
      if (NEED_DS) store_words<P>(b.ds.data + at, b.ds.piece, ds[0][y], ds[1][y]);
    }
  }
  if (!PLAIN && NEED_DS && b.ds_all)
    for (index_t i = 0; i < CELL; i++)
      __builtin_memcpy(b.ds_all + (r * CELL + i) * BACK_KEYS_AMX + c * CELL, b.dp + i * CELL,
                       CELL * sizeof(T));
}

// The operands of a cell that sees nothing, which lies between others that do.
FA_NOINLINE void clear_cell(const BackwardAmx& b, int pieces, int r, int c) {
  for (int n = 0; n < pieces; n++) {
    const index_t at = r * CELL / 2 * b.p.row, bytes = CELL / 2 * b.p.row;
    __builtin_memset(b.p.data + n * b.p.piece + at, 0, size_t(bytes));
    __builtin_memset(b.ds.data + n * b.ds.piece + at, 0, size_t(bytes));
    for (index_t i = 0; i < CELL; i++)
      __builtin_memset(
          b.ds_rows.data + n * b.ds_rows.piece + (r * CELL + i) * b.ds_rows.row + c * 2 * CELL, 0,
          2 * CELL);
  }
  for (index_t i = 0; i < CELL && b.ds_all; i++)
    __builtin_memset(b.ds_all + (r * CELL + i) * BACK_KEYS_AMX + c * CELL, 0, CELL * sizeof(float));
}
