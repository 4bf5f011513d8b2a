// What the backward pass on tiles does with one cell, CELL queries by CELL keys: which of its pairs
// are allowed, P and dS from S and dP by every rule, and their cutting into operands.

inline constexpr index_t CELL = 32, BACK_KEYS_AMX = 256, BACK_QUERIES_AMX = 128;
inline constexpr int CELL_ROWS = BACK_QUERIES_AMX / CELL, CELL_COLUMNS = BACK_KEYS_AMX / CELL;

enum class Sight { none, some, all };  // of a cell's pairs

// Cells [first, last) of a row or column that see something, one run after the other.
struct Runs {
  int count;
  struct {
    int first, last;
  } run[CELL_COLUMNS / 2];
};
FA_INLINE void add_to_runs(Runs& runs, int cell) {
  if (runs.count == 0 || runs.run[runs.count - 1].last < cell)
    runs.run[runs.count++] = {cell, cell};
  runs.run[runs.count - 1].last = cell + 1;
}

struct BackwardAmx {
  index_t k0, nk, d, d_v;
  float factor;  // scale * log2(e), or what a softcap makes of it
  bool need_ds;
  Operand k[CELL_COLUMNS], v[CELL_COLUMNS];  // words (d / 2, CELL), for each column of cells
  Operand k_pairs;                           // words (BACK_KEYS_AMX / 2, d)
  Operand q, dout;                           // rows (BACK_QUERIES_AMX, d)
  Operand q_t, dout_t;                       // rows (d, BACK_QUERIES_AMX)
  Operand p[2], ds[2];                       // words (BACK_QUERIES_AMX / 2, CELL), of two columns
  Operand ds_rows;                           // rows (BACK_QUERIES_AMX, BACK_KEYS_AMX)
  float *s[2], *dp[2];                       // (CELL, CELL): S and dP, of two cells
  float *bent, *keep;        // (CELL, CELL): dS times the slope of the softcap, dropout's 0 or 1
  float* sum;                // of one product, before it joins others
  float *dk, *dv;            // (CELL_COLUMNS, d rounded up to TILE, CELL)
  bool begun[CELL_COLUMNS];  // is there something in them?
  float *ds_all, *dbias;     // (BACK_QUERIES_AMX, BACK_KEYS_AMX), (BACK_KEYS_AMX), for dbias
  // Rows with a number that cannot be cut, one bit each, and what these give to dq, (queries, d)
  uint32_t odd_k[CELL_COLUMNS], odd_v[CELL_COLUMNS], odd_q[CELL_ROWS], odd_dout[CELL_ROWS];
  float* odd_dq;
  Fetcher fetcher;
  // Of the block of queries at hand
  index_t q0, nq;
  const float *lse2, *delta;
  Sight sight[CELL_ROWS][CELL_COLUMNS];
  uint32_t allowed[CELL_ROWS][CELL_COLUMNS][CELL];  // pairs: a word a query, a bit a key
  Runs rows[CELL_COLUMNS], columns[CELL_ROWS];      // that see something
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

// ---- which pairs are allowed ----

// Bits [low, high) of a word, as far as there are such.
FA_INLINE uint32_t bit_range(index_t low, index_t high) {
  low = max_index(low, 0);
  high = min_index(high, CELL);
  return low < high ? uint32_t((uint64_t(1) << high) - (uint64_t(1) << low)) : 0;
}
// Of the keys [k, k + n), what the mask allows a query.
FA_INLINE uint32_t mask_bits(const Matrix& mask, index_t q, index_t k, index_t n) {
  const char* p = mask.data + q * mask.row + k * mask.col;
  if (mask.col == 1) {
    const __m256i x = _mm256_maskz_loadu_epi8(bit_range(0, n), p);
    return _mm256_test_epi8_mask(x, x);
  }
  if (mask.col == 0) return *p ? bit_range(0, n) : 0;
  uint32_t bits = 0;
  for (index_t i = 0; i < n; i++) bits |= uint32_t(p[i * mask.col] != 0) << i;
  return bits;
}
FA_INLINE uint32_t segment_bits(const Segments& segments, index_t q, index_t k, index_t n) {
  uint32_t bits = 0;
  for (index_t i = 0; i < n; i++)
    bits |= uint32_t(segments.k_number[k + i] == segments.q_number[q]) << i;
  return bits;
}

// What cell (r, c) sees; `inside`: the intervals of all its queries hold all of its keys.
FA_NOINLINE Sight look_at_cell(BackwardAmx& b, const Rules& rules, bool use_mask, int r, int c,
                               bool inside) {
  const index_t key = b.k0 + c * CELL, n = min_index(CELL, b.nk - c * CELL);
  uint32_t* allowed = b.allowed[r][c];
  if (inside && n == CELL && r * CELL + CELL <= b.nq && !use_mask && !rules.segments.q_number) {
    __builtin_memset(allowed, 0xff, CELL * sizeof(uint32_t));
    return Sight::all;
  }
  uint32_t any = 0, all = ~0u;
  for (index_t i = 0; i < CELL; i++) {
    uint32_t bits = 0;
    if (r * CELL + i < b.nq) {
      const index_t q = b.q0 + r * CELL + i;
      bits = bit_range(0, n);
      if (!inside) {
        const Interval keys = visible_keys(rules, q);
        bits &= bit_range(keys.low - key, keys.high - key);
      }
      if (use_mask) bits &= mask_bits(rules.mask, q, key, n);
      if (rules.segments.q_number) bits &= segment_bits(rules.segments, q, key, n);
    }
    allowed[i] = bits;
    any |= bits;
    all &= bits;
  }
  return !any ? Sight::none : all == ~0u ? Sight::all : Sight::some;
}

// What each cell of a block of queries sees. False if none sees anything.
FA_NOINLINE bool look(BackwardAmx& b, const Rules& rules) {
  const index_t k_end = b.k0 + b.nk;
  bool any = false;
  for (Runs& rows : b.rows) rows.count = 0;
  for (Runs& columns : b.columns) columns.count = 0;
  for (int r = 0; r * CELL < b.nq; r++) {
    const index_t begin = b.q0 + r * CELL, end = min_index(begin + CELL, b.q0 + b.nq);
    const Span span = visible_span(rules, begin, end, k_end);
    for (int c = 0; c * CELL < b.nk; c++) {
      const index_t low = b.k0 + c * CELL, high = min_index(low + CELL, k_end);
      Sight& sight = b.sight[r][c];
      sight = Sight::none;
      if (span.any.low >= high || span.any.high <= low) continue;
      const Cover cover = !rules.mask.data    ? Cover::all
                          : rules.covers.said ? shared_cover(rules, begin, end - begin, low)
                                              : Cover::some;
      if (cover == Cover::none) continue;
      sight = look_at_cell(b, rules, cover == Cover::some, r, c,
                           span.all.low <= low && span.all.high >= high);
      if (sight == Sight::none) continue;
      any = true;
      add_to_runs(b.rows[c], r);
      add_to_runs(b.columns[r], c);
    }
  }
  return any;
}

// ---- P and dS ----

// What has to be done for a cell: no pair is forbidden, no rule changes a logit; no rule does; a
// softcap, or a bias or ALiBi, is the only one; any of them, dropout, or there is an odd number.
enum class Kind { all, some, bent, added, ruled };
FA_INLINE Kind kind_of(const Rules& rules) {
  const bool bent = rules.softcap > 0, added = rules.bias.data || rules.alibi_slope != 0;
  if (rules.dropout.threshold || (bent && added)) return Kind::ruled;
  return bent ? Kind::bent : added ? Kind::added : Kind::some;
}

// P and dS of W pairs; dS times the slope of the softcap.
struct PairGradients {
  Vec<float> p, ds, bent;
};
// What the rules need to know.
struct CellRules {
  const Rules& rules;
  bool bends, drops, slanted, biased, native_bias;
  Vec<float> factor, cap, kept, slope;
};
template <class E, Kind KIND>
FA_INLINE CellRules cell_rules(const BackwardAmx& b, const Rules& rules) {
  constexpr bool any = KIND == Kind::ruled, added = any || KIND == Kind::added;
  return {rules,
          KIND == Kind::bent || (any && rules.softcap > 0),
          any && rules.dropout.threshold,
          added && rules.alibi_slope != 0,
          added && rules.bias.data,
          is_native_bias<E>(rules.bias),
          splat(b.factor),
          splat(float(rules.softcap) * LOG2E_F),
          splat(float(rules.dropout.scale)),
          splat(float(-rules.alibi_slope * LOG2E))};
}
FA_INLINE Vec<float> only(uint32_t pairs, Vec<float> x) {
  return (Vec<float>)_mm512_maskz_mov_ps(__mmask16(pairs), (__m512)x);
}

// Of query q and the keys from k on, n of which exist. `bent`: tanh of the logit, with a softcap.
// keep: dropout's 0 or 1.
template <class E, Kind KIND>
FA_INLINE PairGradients pair_gradients(const CellRules& x, Vec<float> s, Vec<float> bent,
                                       Vec<float> dp, Vec<float> l, Vec<float> dl, uint32_t pairs,
                                       index_t q, index_t k, index_t n, const float* keep) {
  using T = float;
  s = x.bends ? x.cap * bent : s * x.factor;
  Vec<T> slope{}, add{};
  if (x.bends) slope = splat(1.0f) - bent * bent;
  if (x.slanted) add = alibi<T>(x.slope, lane_numbers<T>(), splat(T(q + x.rules.q_offset - k)));
  if (x.biased) {
    const Matrix& m = x.rules.bias;
    const char* p = m.data + q * m.row + k * m.col;
    const Vec<T> bias = x.native_bias && n >= W<T>
                            ? load_as<E>(p)
                            : gather_as<E>(p, m.col, int(min_index(n, W<T>)));
    add = add_bias<T>(bias, add);
    pairs &= _mm512_cmp_ps_mask((__m512)bias, (__m512)splat(-Bits<T>::infinity), _CMP_NEQ_UQ);
  }
  if (x.slanted || x.biased) s += add;
  PairGradients y;
  y.p = probability<T>(s, l);
  if (KIND != Kind::all) y.p = only(pairs, y.p);
  if (x.drops) dp *= load(keep) * x.kept;
  y.ds = y.p * (dp - dl);
  if (KIND != Kind::all) y.ds = only(pairs, y.ds);
  y.bent = x.bends ? only(pairs, y.ds * slope) : y.ds;
  if (x.drops) y.p *= load(keep);
  return y;
}

// What becomes of a cell, in steps: four queries' dropout; P and dS of two queries as operands.
struct CellSteps : Paced {
  const BackwardAmx* b;
  const Rules* rules;
  int r, c;
  Kind kind;
  bool odd;           // P and dS are wanted in s and bent as well
  index_t at, draws;  // the next step, and where those of dropout end
  float *s, *dp;
  Operand p, ds;
};

// Of queries i and i + 16 of the cell.
template <class E, Kind KIND, bool NEED_DS>
FA_INLINE void cut_pairs(const CellSteps& t, const CellRules& x, index_t i) {
  using T = float;
  constexpr int P = COMPUTED<E>;
  const BackwardAmx& b = *t.b;
  const int r = t.r, c = t.c;
  const uint32_t* allowed = b.allowed[r][c];
  Cut<P> p[2][2] = {}, ds[2][2] = {};  // two vectors of keys each
  Vec<T> bent[4] = {};
  if (x.bends) {
    FA_UNROLL
    for (int v = 0; v < 4; v++)
      bent[v] = tanh<T>(load(t.s + (i + v / 2 * CELL / 2) * CELL + v % 2 * W<T>) * x.factor);
  }
  FA_UNROLL
  for (int h = 0; h < 2; h++) {
    const index_t in_cell = i + h * CELL / 2, q = r * CELL + in_cell;
    const uint32_t pairs = KIND == Kind::all ? ~0u : allowed[in_cell];
    const Vec<T> l = pairs ? statistic(b.lse2[q]) : Vec<T>{};
    const Vec<T> dl = NEED_DS && pairs ? statistic(b.delta[q]) : Vec<T>{};
    FA_UNROLL
    for (int y = 0; y < 2; y++) {
      const uint32_t own = pairs >> y * W<T> & 0xffff;
      const index_t at = in_cell * CELL + y * W<T>, key = c * CELL + y * W<T>;
      PairGradients g{};
      if (KIND == Kind::all || own)
        g = pair_gradients<E, KIND>(x, load(t.s + at), bent[2 * h + y],
                                    NEED_DS ? load(t.dp + at) : Vec<T>{}, l, dl, own, b.q0 + q,
                                    b.k0 + key, b.nk - key, b.keep + at);
      if (KIND == Kind::ruled && t.odd) store(t.s + at, g.p), store(b.bent + at, g.bent);
      p[h][y] = cut_computed<P>(g.p);
      if (NEED_DS) ds[h][y] = cut_computed<P>(g.bent);
      if (NEED_DS && b.ds_all) store(b.ds_all + q * BACK_KEYS_AMX + key, g.ds);
    }
    if (NEED_DS)
      store_words<P>(b.ds_rows.data + q * b.ds_rows.row + c * 2 * CELL, b.ds_rows.piece, ds[h][0],
                     ds[h][1]);
  }
  FA_UNROLL
  for (int y = 0; y < 2; y++) {
    const index_t at = (r * CELL / 2 + i) * t.p.row + y * 64;
    store_words<P>(t.p.data + at, t.p.piece, p[0][y], p[1][y]);
    if (NEED_DS) store_words<P>(t.ds.data + at, t.ds.piece, ds[0][y], ds[1][y]);
  }
}
// Pairs of queries in a step: all of them where nothing goes on beside.
template <class E> inline constexpr index_t STEP_PAIRS = PIPELINED<E> ? 1 : CELL / 2;
template <class E, Kind KIND, bool NEED_DS> FA_NOINLINE void run_cell_step(Paced& steps) {
  CellSteps& t = static_cast<CellSteps&>(steps);
  step_taken(t);
  const BackwardAmx& b = *t.b;
  const index_t at = t.at++;
  if (at < t.draws) {
    const index_t q = t.r * CELL + 4 * at;
    if (q < b.nq)
      keep_rows<float>(t.rules->dropout, b.q0 + q, b.k0 + t.c * CELL, CELL, b.keep + 4 * at * CELL,
                       CELL);
    return;
  }
  const CellRules x = cell_rules<E, KIND>(b, *t.rules);
  const index_t first = (at - t.draws) * STEP_PAIRS<E>;
  for (index_t i = first; i < first + STEP_PAIRS<E>; i++) {
    if (!PIPELINED<E> && KIND > Kind::some && i % 4 == 0) keep_awake();
    cut_pairs<E, KIND, NEED_DS>(t, x, i);
  }
}
template <class E> FA_INLINE void (*cell_step(Kind kind, bool need_ds))(Paced&) {
  if (!need_ds)  // rarely
    return kind == Kind::all ? run_cell_step<E, Kind::all, false>
                             : run_cell_step<E, Kind::ruled, false>;
  if (kind == Kind::all) return run_cell_step<E, Kind::all, true>;
  if (kind == Kind::some) return run_cell_step<E, Kind::some, true>;
  if (kind == Kind::bent) return run_cell_step<E, Kind::bent, true>;
  if (kind == Kind::added) return run_cell_step<E, Kind::added, true>;
  return run_cell_step<E, Kind::ruled, true>;
}

// Of a cell that sees nothing, for dbias.
FA_NOINLINE void clear_cell(const BackwardAmx& b, int r, int c) {
  for (index_t i = 0; i < CELL; i++)
    __builtin_memset(b.ds_all + (r * CELL + i) * BACK_KEYS_AMX + c * CELL, 0, CELL * sizeof(float));
}
