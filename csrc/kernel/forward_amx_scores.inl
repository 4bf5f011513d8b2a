// Scores of the forward pass on tiles, 32 keys or a few times as many at a time, and the rules.

// A block of keys, cut, and whether something in it could not be.
struct KeyBlock {
  Operand k, v;  // rows (keys x d), rows (dv x keys)
  bool odd_k, odd_v;
};

template <class E> FA_NOINLINE bool is_odd_row(const Matrix& m, index_t r, index_t cols) {
  bool odd = false;
  for (index_t c = 0; c < cols; c++) odd |= is_odd(number_at<E>(m, r, c));
  return odd;
}
template <class E>
FA_NOINLINE float dot_rows(const Matrix& a, index_t i, const Matrix& b, index_t j, index_t d) {
  float sum = 0;
  for (index_t c = 0; c < d; c++) sum += number_at<E>(a, i, c) * number_at<E>(b, j, c);
  return sum;
}

// The factor of the logits is in the operand of Q where its pieces hold any number, else it is
// applied to the products.
template <class E> inline constexpr bool SCALED_QUERIES = PIECES<E> == 3;
struct LogitFactor {
  float in_q, after;
};
template <class E> FA_INLINE LogitFactor logit_factor(const ForwardHead& h) {
  const float factor = float(logit_factors<float>(h.scale, h.rules).before);
  return SCALED_QUERIES<E> ? LogitFactor{factor, 1} : LogitFactor{1, factor};
}

// Logits of keys or queries with numbers that could not be cut, by hand; s[key][query].
template <class E>
FA_NOINLINE void mend_scores(const Matrix& k, index_t key, index_t n, const Matrix& q,
                             index_t query, index_t count, index_t d, float factor, float* s,
                             index_t lanes) {
  bool odd_query[LANES<float>];
  for (index_t j = 0; j < count; j++) odd_query[j] = is_odd_row<E>(q, query + j, d);
  for (index_t i = 0; i < n; i++) {
    const bool odd_key = is_odd_row<E>(k, key + i, d);
    for (index_t j = 0; j < count; j++)
      if (odd_key || odd_query[j])
        s[i * lanes + j] = dot_rows<E>(k, key + i, q, query + j, d) * factor;
  }
}

// S = factor * S in log2 units (of SCALED_QUERIES it is), softcap, the dense part; the maximum over
// keys joins max_io.
template <class E, bool BENT, bool DENSE, int NQ>
FA_NOINLINE void finish_scores(index_t n, float* s, float factor, float cap,
                               const Dense<float>& dense, float* max_io, float* seen) {
  using T = float;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity), f = splat(factor), c = splat(cap);
  Vec<T> max[NQ], any[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) max[j] = load(max_io + j * W<T>), any[j] = load(seen + j * W<T>);
  for (index_t i = 0; i < n; i++) {
    T* const at = s + i * NQ * W<T>;
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      Vec<T> x = load(at + j * W<T>);
      if constexpr (!SCALED_QUERIES<E>) x *= f;
      if constexpr (BENT) x = c * tanh<T>(x);
      if constexpr (DENSE) {
        const Vec<T> add = dense_at(dense, i, j);
        x = add == minus_inf ? minus_inf : x + add;
        any[j] = add == minus_inf ? any[j] : splat(T(1));
      }
      max[j] = max_or_second<T>(x, max[j]);
      store(at + j * W<T>, x);
    }
  }
  keep_awake();
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    store(max_io + j * W<T>, max[j]);
    store(seen + j * W<T>, DENSE ? any[j] : splat(T(1)));
  }
}

// One sub-block of queries against keys [k0, k1) of one block. Tiles of keys [low, high), numbered
// from the beginning of the block.
struct Scored {
  Queries<float>* x;
  index_t block, k0, k1, low, high;
  index_t cut[4];  // ranges: ragged, seen by every query, ragged
  Dense<float> dense[3];
  bool use_mask, has_dense, masked;  // masked: by a mask and nothing else
  float *s, *tile;                   // (128, lanes) each
  float* sums;                       // 32 x 32
  Operand words;                     // P
  Fetcher fetcher;                   // of what the next task reads
  Matrix bias;  // of the sub-block and block that come next, to be fetched; or null
  // Of 64 keys: a bit for each of 32, 1 where a mask shows it to the query.
  alignas(64) uint32_t shown[2][LANES<float>];
  // Of the block: what P is relative to, the largest logit, the factor of what was summed up
  // before, the sum of P.
  alignas(64) float max[LANES<float>], block_max[LANES<float>], rescale[LANES<float>],
      sum[LANES<float>];
};

FA_INLINE void clear_scores(float* s, index_t n, index_t lanes) {
  for (index_t i = 0; i < n * lanes; i += W<float>) store(s + i, splat(-Bits<float>::infinity));
}

// Rules of keys [from, to), all in range r; s from `from` on. x.seen and the block's maximum.
template <class E, int NQ>
FA_INLINE void apply_range(const Rules& rules, Scored& b, int r, index_t from, index_t to,
                           bool tiled, float factor, float* s) {
  Queries<float>& x = *b.x;
  const bool bent = rules.softcap > 0, ragged = r != 1;
  const bool plain = !ragged && !has_dense(rules, b.use_mask),
             in_tile = !plain && (tiled || (!ragged && dense_is_per_key(rules, b.use_mask)));
  if (in_tile)
    b.dense[r] = dense_tile<E>(rules, x, b.use_mask, ragged, from, to,
                               b.tile + (from - b.block) * NQ * W<float>);
  alignas(64) float ignored[LANES<float>], unseen[LANES<float>];
  const bool later = !plain && !in_tile;  // the dense part is added then
  const auto run = [&](auto f) __attribute__((always_inline)) {
    f(to - from, s, factor, float(rules.softcap) * float(LOG2E), b.dense[r],
      later ? ignored : b.block_max, later ? unseen : x.seen);
  };
  if (!in_tile && !bent && !(later && factor == 1)) run(finish_scores<E, false, false, NQ>);
  if (!in_tile && bent) run(finish_scores<E, true, false, NQ>);
  if (in_tile && !bent) run(finish_scores<E, false, true, NQ>);
  if (in_tile && bent) run(finish_scores<E, true, true, NQ>);
  if (later) make_and_add_dense<E>(rules, x, b.use_mask, ragged, from, to, s, b.block_max);
}

// How a block is computed: `strip` keys at a time; RAW: with nothing between product and
// exponentials.
struct Plan {
  LogitFactor factor;
  index_t strip;
  bool raw;
};
// Scores of the strip from tile `key` on, and its rules unless they are left to exponentials.
template <class E>
FA_NOINLINE void score_strip(const ForwardHead& h, Scored& b, const Matrix& k, const KeyBlock& keys,
                             const Plan& plan, bool rules, index_t key, float* s) {
  Queries<float>& x = *b.x;
  const index_t lanes = x.vectors * W<float>, end = min_index(key + plan.strip, b.high);
  const Operand q = as_words(reinterpret_cast<char*>(x.q), h.d, lanes);
  const index_t low = max_index(key, b.k0 - b.block), high = min_index(end, b.k1 - b.block);
  multiply_operands<PIECES<E>, PIECES<E>>(
      high - key, lanes, h.d, {keys.k.data + key * keys.k.row, keys.k.row, keys.k.piece}, q, s,
      4 * lanes, Fetch{b.fetcher});
  if (keys.odd_k || x.odd)
    mend_scores<E>(k, low, high - low, h.q, x.first, x.count, h.d, plan.factor.in_q,
                   s + (low - key) * lanes, lanes);
  for (int r = 0; rules && r < 3; r++) {
    const index_t from = max_index(b.cut[r], b.block + low),
                  to = min_index(b.cut[r + 1], b.block + high);
    if (from >= to) continue;
    const auto apply = [&](auto f) __attribute__((always_inline)) {
      f(h.rules, b, r, from, to, keys.odd_v, plan.factor.after, s + (from - b.block - key) * lanes);
    };
    if (x.vectors == 1) apply(apply_range<E, 1>);
    if (x.vectors == 2) apply(apply_range<E, 2>);
    if (x.vectors == 3) apply(apply_range<E, 3>);
    if (x.vectors == 4) apply(apply_range<E, 4>);
  }
  clear_scores(s, low - key, lanes);
  clear_scores(s + (high - key) * lanes, end - high, lanes);
}
