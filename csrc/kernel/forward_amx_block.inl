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

// Logits of keys or queries with numbers that could not be cut, by hand; s[key][query].
template <class E>
FA_NOINLINE void mend_scores(const Matrix& k, index_t key, index_t n, const Matrix& q,
                             index_t query, index_t count, index_t d, float* s, index_t lanes) {
  bool odd_query[LANES<float>];
  for (index_t j = 0; j < count; j++) odd_query[j] = is_odd_row<E>(q, query + j, d);
  for (index_t i = 0; i < n; i++) {
    const bool odd_key = is_odd_row<E>(k, key + i, d);
    for (index_t j = 0; j < count; j++)
      if (odd_key || odd_query[j]) s[i * lanes + j] = dot_rows<E>(k, key + i, q, query + j, d);
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

// Words of two keys at `at`, cut.
template <int P>
FA_INLINE void store_cut_words(char* at, index_t piece, Vec<float> low, Vec<float> high) {
  FA_UNROLL
  for (int n = 0; n < P; n++) {
    store(reinterpret_cast<float*>(at + n * piece), pair_words(low, high));
    low -= upper(low);
    high -= upper(high);
  }
}

// P = exp2(S - max) of a block, two keys of 16 queries at a time, done while the unit for tiles
// multiplies something else: step() after step() until none is left. P is cut into words, or stays
// where S was.
template <int P> struct Exponentials {
  float *s, *max, *sum;  // (keys, lanes), (lanes), (lanes)
  Operand words;
  index_t lanes, column;
  index_t credit, share;  // a step is due when the credit reaches 256
  index_t left;           // steps
  bool in_place;
  Ahead* ahead;

  FA_INLINE_MEMBER void operator()() {
    for (credit += share; credit >= 256; credit -= 256)
      if (left > 0) step();
  }
  __attribute__((noinline)) void step() {
    using T = float;
    const index_t width = lanes, at_column = column;
    T *at = s + at_column, *total = sum + at_column;
    char* word = words.data + 4 * at_column;
    const Vec<T> top = load(max + at_column);
    const bool row_done = at_column + W<T> == width;
    left--;
    // Not with `left` in one vector: its load would wait for two stores.
    column = row_done ? 0 : at_column + W<T>;
    asm volatile("" ::: "memory");
    if (row_done) {
      s += 2 * width;
      words.data += words.row;
    }
    const Vec<T> a = exp2<T>(load(at) - top), b = exp2<T>(load(at + width) - top);
    store(total, (load(total) + a) + b);
    if (in_place) {
      store(at, a);
      store(at + width, b);
    } else {
      store_cut_words<P>(word, words.piece, a, b);
    }
    if (row_done && ahead->burst) {
      fetch_ahead(*ahead);
      fetch_ahead(*ahead);
    }
  }
  FA_INLINE_MEMBER void finish() {
    while (left > 0) step();
  }
};
template <int P>
FA_NOINLINE void to_words(index_t n, index_t lanes, const float* p, const Operand& words) {
  for (index_t i = 0; i < n; i += 2)
    for (index_t j = 0; j < lanes; j += W<float>)
      store_cut_words<P>(words.data + i / 2 * words.row + 4 * j, words.piece,
                         load(p + i * lanes + j), load(p + (i + 1) * lanes + j));
}
// What was cut into words, put together again.
FA_INLINE float word_element(const Operand& words, int pieces, index_t key, index_t column) {
  float sum = 0;
  for (int n = pieces - 1; n >= 0; n--) {
    uint32_t w;
    __builtin_memcpy(&w, words.data + n * words.piece + key / 2 * words.row + 4 * column, 4);
    w = key % 2 ? w & 0xffff0000 : w << 16;
    float x;
    __builtin_memcpy(&x, &w, 4);
    sum += x;
  }
  return sum;
}

// One sub-block of queries against keys [k0, k1) of one block: what is kept from its scores to the
// product with V. Tiles of keys [low, high), numbered from the beginning of the block.
struct Scored {
  Queries<float>* x;
  index_t block, k0, k1, low, high;
  index_t cut[4];  // ranges: ragged, seen by every query, ragged
  Dense<float> dense[3];
  float *s, *tile;  // (128, lanes) each
  Operand words;    // P
  alignas(64) float block_max[LANES<float>], rescale[LANES<float>], sum[LANES<float>];
};

// Rules of one range of keys: x.seen and the block's maximum.
template <int NQ>
FA_INLINE void apply_range(const Rules& rules, Scored& b, int r, index_t n, float factor) {
  float* s = b.s + (b.cut[r] - b.block) * NQ * W<float>;
  const bool bent = rules.softcap > 0, plain = !b.dense[r].data;
  const auto run = [&](auto f) __attribute__((always_inline)) {
    f(n, s, factor, float(rules.softcap) * float(LOG2E), b.dense[r], b.block_max, b.x->seen);
  };
  if (plain && !bent) run(finish_scores<false, false, NQ>);
  if (plain && bent) run(finish_scores<true, false, NQ>);
  if (!plain && !bent) run(finish_scores<false, true, NQ>);
  if (!plain && bent) run(finish_scores<true, true, NQ>);
}

// Multiplications of tiles in the two products.
template <class E> FA_INLINE index_t score_products(const ForwardHead& h, const Scored& b) {
  const index_t tiles = (b.high - b.low) / TILE * b.x->vectors;
  return tiles * (up_to(h.d, DEPTH) / DEPTH) * PRODUCTS<PIECES<E>, PIECES<E>>;
}
template <class E> FA_INLINE index_t value_products(const ForwardHead& h, const Scored& b) {
  const index_t tiles = up_to(h.dv, TILE) / TILE * b.x->vectors;
  return tiles * ((b.high - b.low) / DEPTH) * PRODUCTS<PIECES<E>, P_PIECES<E>>;
}

// 1. scores, and the rules. Meanwhile the exponentials of what came before.
template <class E>
FA_NOINLINE void score_block(const ForwardHead& h, Scored& b, const Matrix& k, const KeyBlock& keys,
                             bool use_mask, Exponentials<P_PIECES<E>>& before) {
  using T = float;
  Queries<T>& x = *b.x;
  const index_t lanes = x.vectors * W<T>, low = b.low, rows = b.high - low;
  const Operand q{reinterpret_cast<char*>(x.q), 4 * lanes, words_bytes(h.d, lanes)};
  multiply_operands<PIECES<E>, PIECES<E>>(
      rows, lanes, h.d, {keys.k.data + low * keys.k.row, keys.k.row, keys.k.piece}, q,
      b.s + low * lanes, 4 * lanes, before);
  const index_t at = b.k0 - b.block, n = b.k1 - b.k0;
  if (keys.odd_k || x.odd)
    mend_scores<E>(k, at, n, h.q, x.first, x.count, h.d, b.s + at * lanes, lanes);

  for (index_t i = 0; i < lanes; i += W<T>) store(b.block_max + i, splat(Bits<T>::lowest));
  b.cut[0] = b.k0;
  b.cut[1] = max_index(b.k0, min_index(b.k1, x.keys.all.low));
  b.cut[2] = max_index(b.cut[1], min_index(b.k1, x.keys.all.high));
  b.cut[3] = b.k1;
  const T factor = T(logit_factors<T>(h.scale, h.rules).before);
  for (int r = 0; r < 3; r++) {
    const index_t from = b.cut[r], count = b.cut[r + 1] - from;
    if (count <= 0) continue;
    b.dense[r] = dense_tile<E>(h.rules, x, use_mask, r != 1, from, from + count,
                               b.tile + (from - b.block) * lanes);
    if (x.vectors == 1) apply_range<1>(h.rules, b, r, count, factor);
    if (x.vectors == 2) apply_range<2>(h.rules, b, r, count, factor);
    if (x.vectors == 3) apply_range<3>(h.rules, b, r, count, factor);
    if (x.vectors == 4) apply_range<4>(h.rules, b, r, count, factor);
  }
  const Vec<T> minus_inf = splat(-Bits<T>::infinity);
  for (index_t i = low * lanes; i < at * lanes; i += W<T>) store(b.s + i, minus_inf);
  for (index_t i = (at + n) * lanes; i < b.high * lanes; i += W<T>) store(b.s + i, minus_inf);
}

// 2. what P = exp2(S - max) takes: the running maximum, and the factor of the sums so far.
template <class E>
FA_INLINE Exponentials<P_PIECES<E>> exponentials_of(const ForwardHead& h, Scored& b, Ahead& ahead) {
  using T = float;
  Queries<T>& x = *b.x;
  const index_t lanes = x.vectors * W<T>;
  for (index_t i = 0; i < lanes; i += W<T>) {
    const Vec<T> before = load(x.max + i), max = max_or_second<T>(load(b.block_max + i), before);
    store(x.max + i, max);
    store(b.rescale + i, exp2<T>(before - max));
    store(b.sum + i, Vec<T>{});
  }
  return {b.s + b.low * lanes,
          x.max,
          b.sum,
          b.words,
          lanes,
          0,
          0,
          0,
          (b.high - b.low) / 2 * x.vectors,
          h.rules.dropout.threshold != 0,
          &ahead};
}

// What could not be cut of V, for the queries that may see it.
template <class E>
FA_NOINLINE void mend_values(const Scored& b, const Matrix& v, index_t dv, float* sums) {
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
          sums[c * lanes + j] +=
              word_element(b.words, P_PIECES<E>, key - b.block - b.low, j) * value;
      }
    }
  }
}

// 3. O = O * rescale + P V
template <class E>
FA_NOINLINE void add_values(const ForwardHead& h, const Scored& b, const Matrix& v,
                            const KeyBlock& keys, float* sums,
                            Exponentials<P_PIECES<E>>& meanwhile) {
  using T = float;
  Queries<T>& x = *b.x;
  const index_t lanes = x.vectors * W<T>, at = b.k0 - b.block;
  if (h.rules.dropout.threshold) {
    const auto drop = [&](auto f) __attribute__((always_inline)) {
      f(h.rules.dropout, x.first, b.k0, b.k1 - b.k0, b.s + at * lanes);
    };
    if (x.vectors == 1) drop(drop_tile<E, 1>);
    if (x.vectors == 2) drop(drop_tile<E, 2>);
    if (x.vectors == 3) drop(drop_tile<E, 3>);
    if (x.vectors == 4) drop(drop_tile<E, 4>);
    to_words<P_PIECES<E>>(b.high - b.low, lanes, b.s + b.low * lanes, b.words);
  }
  for (index_t i = 0; i < lanes; i += W<T>)
    store(x.sum + i, fma<T>(load(x.sum + i), load(b.rescale + i), load(b.sum + i)));
  multiply_operands<PIECES<E>, P_PIECES<E>>(h.dv, lanes, b.high - b.low,
                                            {keys.v.data + 2 * b.low, keys.v.row, keys.v.piece},
                                            b.words, sums, 4 * lanes, meanwhile);
  if (keys.odd_v) mend_values<E>(b, v, h.dv, sums);
  for (index_t c = 0; c < h.dv; c++)
    for (index_t i = 0; i < lanes; i += W<T>) {
      T* o = x.o + c * lanes + i;
      store(o, fma<T>(load(o), load(b.rescale + i), load(sums + c * lanes + i)));
    }
}
