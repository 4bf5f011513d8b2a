// The steps of the forward pass on tiles over one block of keys: scores, rules, exponentials,
// values.

// Pieces of P: enough for what is summed up in float32 and rounded to E.
template <class E> inline constexpr int P_PIECES = PIECES<E> == 3 ? 3 : 2;

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

// S = factor * S in log2 units, softcap, the dense part; the maximum over keys joins max_io.
template <bool BENT, bool DENSE, int NQ>
FA_NOINLINE void finish_scores(index_t n, float* s, float factor, float cap,
                               const Dense<float>& dense, float* max_io, float* seen) {
  using T = float;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity), f = splat(factor), c = splat(cap);
  Vec<T> max[NQ], any[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) max[j] = load(max_io + j * W<T>), any[j] = load(seen + j * W<T>);
  for (index_t i = 0; i < n; i++) {
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      T* at = s + (i * NQ + j) * W<T>;
      Vec<T> x = load(at) * f;
      if (BENT) x = c * tanh<T>(x);
      if (DENSE) {
        const Vec<T> add = dense_at(dense, i, j);
        x = add == minus_inf ? minus_inf : x + add;
        any[j] = add == minus_inf ? any[j] : splat(T(1));
      }
      max[j] = max_or_second<T>(x, max[j]);
      store(at, x);
    }
  }
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    store(max_io + j * W<T>, max[j]);
    store(seen + j * W<T>, DENSE ? any[j] : splat(T(1)));
  }
}

// What P = exp2(S - max) of a query is relative to: a logit that is less than the largest so far by
// no more than SLACK, so that a block's maximum need not be known before its exponentials. It stays
// what it was until a block exceeds it by more, then it is that block's maximum. The first one is
// the maximum of the first 32 keys of which the query sees one, if that will do for the block.
inline constexpr float SLACK = 8;
template <class V> FA_INLINE V next_max(V before, V block) {
  return block > before + SLACK ? block : before;
}

// One sub-block of queries against keys [k0, k1) of one block. Tiles of keys [low, high), numbered
// from the beginning of the block.
struct Scored {
  Queries<float>* x;
  index_t block, k0, k1, low, high;
  index_t cut[4];  // ranges: ragged, seen by every query, ragged
  Dense<float> dense[3];
  bool use_mask;
  float *s, *tile;  // (128, lanes) each
  float* sums;      // 32 x 32
  Operand words;    // P
  Matrix bias;      // of the sub-block and block that come next, to be fetched; or null
  // Of the block: what P is relative to, the largest logit, the factor of what was summed up
  // before, the sum of P.
  alignas(64) float max[LANES<float>], block_max[LANES<float>], rescale[LANES<float>],
      sum[LANES<float>];
};

// P = exp2(S - max) of 32 keys, cut into words, and its sum.
// RAW: S is what the product gave; its factor is to be applied, and its maximum joins block_max.
// KEPT: P takes the place of S and is cut later.
template <class E, bool RAW, bool KEPT>
FA_NOINLINE void exponentials(Scored& b, index_t key, float* s, float factor, const Operand& words,
                              Ahead& ahead) {
  using T = float;
  constexpr int P = P_PIECES<E>, half = int(DEPTH / 2);
  const index_t lanes = b.x->vectors * W<T>;
  const Vec<T> f = splat(factor);
  for (index_t j = 0; j < lanes; j += W<T>) {
    const Vec<T> top = load(b.max + j);
    Vec<T> sum = load(b.sum + j), max = load(b.block_max + j);
    T* at = s + j;
    char* to = words.data + 4 * j;
    for (int i = 0; i < half; i++, at += lanes, to += words.row) {
      Vec<T> x = load(at), y = load(at + half * lanes);
      if constexpr (RAW) {
        if constexpr (!SCALED_QUERIES<E>) x *= f, y *= f;
        max = max_or_second<T>(y, max_or_second<T>(x, max));
      }
      x = exp2<T>(x - top);
      y = exp2<T>(y - top);
      sum = (sum + x) + y;
      if constexpr (KEPT) {
        store(at, x);
        store(at + half * lanes, y);
      } else {
        store_words<P>(to, words.piece, cut_computed<P>(x), cut_computed<P>(y));
      }
      if (b.bias.data) {
        const char* p = b.bias.data + (j + i) * b.bias.row + key * b.bias.col;
        prefetch_far(p);
        if (sizeof(E) == 4) prefetch_far(p + 64);
      }
      if (j == 0 && ahead.burst) {
        fetch_ahead(ahead);
        fetch_ahead(ahead);
      }
    }
    store(b.sum + j, sum);
    if constexpr (RAW) store(b.block_max + j, max);
  }
}
// 32 keys that were kept.
template <class E> FA_NOINLINE void to_words(index_t lanes, const float* p, const Operand& words) {
  constexpr int P = P_PIECES<E>;
  constexpr index_t half = DEPTH / 2;
  for (index_t i = 0; i < half; i++)
    for (index_t j = 0; j < lanes; j += W<float>)
      store_words<P>(words.data + i * words.row + 4 * j, words.piece,
                     cut_computed<P>(load(p + i * lanes + j)),
                     cut_computed<P>(load(p + (i + half) * lanes + j)));
}
// What was cut into words, put together again.
FA_INLINE float word_element(const Operand& words, int pieces, index_t key, index_t column) {
  float sum = 0;
  const index_t row = key / DEPTH * (DEPTH / 2) + key % (DEPTH / 2);
  for (int n = pieces - 1; n >= 0; n--) {
    uint32_t w;
    __builtin_memcpy(&w, words.data + n * words.piece + row * words.row + 4 * column, 4);
    w = key % DEPTH >= DEPTH / 2 ? w & 0xffff0000 : w << 16;
    float x;
    __builtin_memcpy(&x, &w, 4);
    sum += x;
  }
  return sum;
}

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
  if (!in_tile && !bent && !(later && factor == 1)) run(finish_scores<false, false, NQ>);
  if (!in_tile && bent) run(finish_scores<true, false, NQ>);
  if (in_tile && !bent) run(finish_scores<false, true, NQ>);
  if (in_tile && bent) run(finish_scores<true, true, NQ>);
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
  multiply_operands<PIECES<E>, PIECES<E>>(
      end - key, lanes, h.d, {keys.k.data + key * keys.k.row, keys.k.row, keys.k.piece}, q, s,
      4 * lanes);
  const index_t low = max_index(key, b.k0 - b.block), high = min_index(end, b.k1 - b.block);
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

// The maxima of 32 keys, for queries that have seen none so far.
FA_NOINLINE void first_max(Scored& b, const float* s, float factor) {
  using T = float;
  const index_t lanes = b.x->vectors * W<T>;
  const Vec<T> lowest = splat(Bits<T>::lowest), f = splat(factor);
  for (index_t j = 0; j < lanes; j += W<T>) {
    const Vec<T> max = load(b.max + j);
    if (!any_lane(max == lowest)) continue;
    Vec<T> here = lowest;
    for (index_t i = 0; i < DEPTH; i++) here = max_or_second<T>(load(s + i * lanes + j) * f, here);
    store(b.max + j, max == lowest ? here : max);
  }
}
FA_INLINE void begin_block(Scored& b, index_t lanes) {
  __builtin_memcpy(b.max, b.x->max, size_t(lanes) * sizeof(float));
  for (index_t i = 0; i < lanes; i += W<float>) {
    store(b.block_max + i, splat(Bits<float>::lowest));
    store(b.sum + i, Vec<float>{});
  }
}

// P of 32 keys; dropout.
template <class E>
FA_INLINE void probabilities(const ForwardHead& h, Scored& b, bool raw, float factor, index_t key,
                             float* s, Ahead& ahead) {
  const index_t lanes = b.x->vectors * W<float>;
  const Operand words{b.words.data + key / 2 * b.words.row, b.words.row, b.words.piece};
  if (raw) return exponentials<E, true, false>(b, key, s, factor, words, ahead);
  if (!h.rules.dropout.threshold) return exponentials<E, false, false>(b, key, s, 1, words, ahead);
  exponentials<E, false, true>(b, key, s, 1, words, ahead);
  const auto drop = [&](auto f) __attribute__((always_inline)) {
    f(h.rules.dropout, b.x->first, b.block + key, DEPTH, s);
  };
  if (b.x->vectors == 1) drop(drop_tile<E, 1>);
  if (b.x->vectors == 2) drop(drop_tile<E, 2>);
  if (b.x->vectors == 3) drop(drop_tile<E, 3>);
  if (b.x->vectors == 4) drop(drop_tile<E, 4>);
  to_words<E>(lanes, s, words);
}

// P of a block, and the maximum and the factors that go with it. First from the maximum of the
// blocks before, strip by strip, while scores are in the L1 cache; if a logit exceeds that by too
// much, again from the block's. Where that happened in the last block, only maxima are computed at
// first.
template <class E>
FA_NOINLINE void block_probabilities(const ForwardHead& h, Scored& b, const Matrix& k,
                                     const KeyBlock& keys, const Plan& plan, Ahead& ahead) {
  using T = float;
  Queries<T>& x = *b.x;
  const index_t lanes = x.vectors * W<T>;
  begin_block(b, lanes);
  const bool later = x.risen, raw = plan.raw && !later;  // later: exponentials of the whole block
  const float factor = raw ? plan.factor.after : 1;
  for (index_t key = b.low; key < b.high; key += plan.strip) {
    T* s = b.s + (later ? key * lanes : 0);
    score_strip<E>(h, b, k, keys, plan, !raw, key, s);
    for (index_t i = 0; i < min_index(plan.strip, b.high - key); i += DEPTH) {
      first_max(b, s + i * lanes, factor);
      if (!later) probabilities<E>(h, b, raw, factor, key + i, s + i * lanes, ahead);
    }
  }
  IntVec<T> grown{};
  for (index_t i = 0; i < lanes; i += W<T>) {
    const Vec<T> before = load(b.max + i), max = next_max(before, load(b.block_max + i));
    grown |= max != before;
    store(b.max + i, max);
  }
  x.risen = any_lane(grown);
  if (x.risen && !later) {
    for (index_t i = 0; i < lanes; i += W<T>) store(b.sum + i, Vec<T>{});
    for (index_t key = b.low; key < b.high; key += plan.strip)
      score_strip<E>(h, b, k, keys, plan, true, key, b.s + key * lanes);
  }
  for (index_t key = b.low; (x.risen || later) && key < b.high; key += DEPTH)
    probabilities<E>(h, b, false, 1, key, b.s + key * lanes, ahead);
  IntVec<T> moved{};
  for (index_t i = 0; i < lanes; i += W<T>) {
    const Vec<T> before = load(x.max + i), max = load(b.max + i), r = exp2<T>(before - max);
    moved |= before != max;
    store(b.rescale + i, r);
    store(x.max + i, max);
    store(x.sum + i, fma<T>(load(x.sum + i), r, load(b.sum + i)));
    if (plan.raw) store(x.seen + i, splat(T(1)));
  }
  // Of three pieces, what was summed up is rescaled when the block's sum joins it.
  if (P_PIECES<E> < 3 && any_lane(moved))
    for (index_t c = 0; c < h.dv; c++)
      for (index_t i = 0; i < lanes; i += W<T>) {
        T* o = x.o + c * lanes + i;
        store(o, load(o) * load(b.rescale + i));
      }
}

// What could not be cut of V, for the queries that may see it.
template <class E> FA_NOINLINE void mend_values(const Scored& b, const Matrix& v, index_t dv) {
  const index_t lanes = b.x->vectors * W<float>;
  for (index_t key = b.k0; key < b.k1; key++) {
    const int r = (key >= b.cut[1]) + (key >= b.cut[2]);
    const Dense<float>& dense = b.dense[r];
    for (index_t c = 0; c < dv; c++) {
      const float value = number_at<E>(v, key - b.block, c);
      if (!is_odd(value)) continue;
      for (index_t j = 0; j < lanes; j++) {
        const index_t lane = j % W<float>;
        if (!dense.data ||
            dense_at(dense, key - b.cut[r], int(j / W<float>))[lane] != -Bits<float>::infinity)
          b.x->o[c * lanes + j] += word_element(b.words, P_PIECES<E>, key - b.block, j) * value;
      }
    }
  }
}

// O = O * rescale + P V. Of float32 the block's own sum is made first and then joins, with fewer
// roundings; else O is rescaled, and the sums go on in the tiles.
template <class E>
FA_NOINLINE void add_values(const ForwardHead& h, const Scored& b, const Matrix& v,
                            const KeyBlock& keys) {
  using T = float;
  Queries<T>& x = *b.x;
  constexpr int P = P_PIECES<E>;
  const index_t lanes = x.vectors * W<T>, steps = (b.high - b.low) / DEPTH;
  in_tile_pairs(h.dv, lanes, [&]<int MI, int NJ>(index_t i, index_t j) FA_TILE {
    const Operand rows{keys.v.data + i * keys.v.row + 2 * b.low, keys.v.row, keys.v.piece},
        words{b.words.data + b.low / 2 * b.words.row + 4 * j, b.words.row, b.words.piece};
    T* o = x.o + i * lanes + j;
    if constexpr (P == 3) {
      tile_product<PIECES<E>, P, MI, NJ>(rows, words, steps, b.sums, 8 * TILE);
      for (index_t c = 0; c < MI * TILE; c++) {
        FA_UNROLL
        for (int n = 0; n < NJ; n++) {
          T* at = o + c * lanes + n * TILE;
          store(at, fma<T>(load(at), load(b.rescale + j + n * TILE),
                           load(b.sums + c * 2 * TILE + n * TILE)));
        }
      }
    } else {
      tile_product<PIECES<E>, P, MI, NJ, false, true>(rows, words, steps, o, 4 * lanes);
    }
  });
  if (keys.odd_v) mend_values<E>(b, v, h.dv);
}
