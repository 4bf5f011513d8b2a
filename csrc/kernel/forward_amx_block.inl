// The other steps of the forward pass on tiles over one block of keys: maxima, exponentials,
// values.

// Pieces of P: enough for what is summed up in float32 and rounded to E.
template <class E> inline constexpr int P_PIECES = PIECES<E> == 3 ? 3 : 2;

// What P = exp2(S - max) of a query is relative to: a logit that is less than the largest so far by
// no more than SLACK, so that a block's maximum need not be known before its exponentials. It stays
// what it was until a block exceeds it by more, then it is that block's maximum. The first one is
// the maximum of the first 32 keys of which the query sees one, if that will do for the block.
inline constexpr float SLACK = 8;
template <class V> FA_INLINE V next_max(V before, V block) {
  return block > before + SLACK ? block : before;
}

// Bits of 32 keys by `lanes` queries: 1 where dropout keeps P. Key by key, a number for 16 queries.
struct Kept {
  __mmask16 bits[DEPTH * LANES<float> / W<float>];
};
FA_NOINLINE void draw_kept(const Dropout& drop, index_t first, index_t lanes, index_t key,
                           Kept& kept) {
  const __m512i threshold = _mm512_set1_epi32(int(drop.threshold));
  for_words(drop, first, lanes, key, DEPTH,
            [&](index_t k, index_t lane, Random words) __attribute__((always_inline)) {
              if (k % 8 == 0 && lane == 0) keep_awake();
              kept.bits[(k * lanes + lane) / W<float>] =
                  _mm512_cmpge_epu32_mask((__m512i)words, threshold);
            });
}

// What a mask says of 64 keys from `key` of the block on: b.shown, and x.seen.
FA_NOINLINE void read_mask(const Matrix& mask, Scored& b, index_t key) {
  const index_t lanes = b.x->vectors * W<float>, first = b.block + key;
  const uint64_t inside = ~uint64_t(0) << max_index(b.k0 - first, 0);  // from k0 on
  for (index_t i = 0; i < lanes; i++) {
    const char* p = mask.data + (b.x->first + min_index(i, b.x->count - 1)) * mask.row;
    uint64_t bits = 0;
    if (mask.col == 1 && first + 64 <= b.k1) {
      const __m512i bytes = _mm512_loadu_si512(p + first);
      bits = _mm512_test_epi8_mask(bytes, bytes);
    } else {
      for (index_t k = 0; k < min_index(64, b.k1 - first); k++)
        bits |= uint64_t(p[(first + k) * mask.col] != 0) << k;
    }
    bits &= inside;
    b.shown[0][i] = uint32_t(bits), b.shown[1][i] = uint32_t(bits >> DEPTH);
    if (bits) b.x->seen[i] = 1;
  }
}

// 1, 2, 4, ...: broadcast from memory, which costs nothing.
struct BitTable {
  uint32_t bit[DEPTH];
};
inline constexpr BitTable BITS = [] {
  BitTable t{};
  for (int i = 0; i < int(DEPTH); i++) t.bit[i] = 1u << i;
  return t;
}();
// S of key i of 32, -inf where it is not shown.
FA_INLINE Vec<float> show(Vec<float> s, const uint32_t* shown, index_t i) {
  const __m512i bit = _mm512_set1_epi32(int(BITS.bit[i]));
  const __mmask16 lanes = _mm512_test_epi32_mask(_mm512_loadu_si512(shown), bit);
  return (Vec<float>)_mm512_mask_mov_ps((__m512)splat(-Bits<float>::infinity), lanes, (__m512)s);
}

// P = exp2(S - max) of 32 keys, of which the last 16 are left out if they do not exist, cut into
// words, and its sum. RAW: S is what the product gave; its factor is to be applied, and its maximum
// joins block_max. DROPS: with dropout. MASKED: only of what is shown.
template <class E, bool RAW, bool DROPS, bool MASKED>
FA_NOINLINE void exponentials(Scored& b, index_t key, const float* s, float factor,
                              const Kept& kept, const uint32_t* shown, const Operand& words) {
  using T = float;
  constexpr int P = P_PIECES<E>, half = int(DEPTH / 2);
  const index_t lanes = b.x->vectors * W<T>;
  const Vec<T> f = splat(factor);
  const auto queries = [&]<bool BOTH>(index_t j) FA_TILE {  // W queries from lane j on
    const Vec<T> top = load(b.max + j);
    Vec<T> sum = load(b.sum + j), max = load(b.block_max + j);
    const T* at = s + j;
    char* to = words.data + 4 * j;
    const char* bias = b.bias.data ? b.bias.data + j * b.bias.row + key * b.bias.col : nullptr;
    for (int i = 0; i < half; i++, at += lanes, to += words.row) {
      Vec<T> x = load(at), y = BOTH ? load(at + half * lanes) : Vec<T>{};
      if constexpr (RAW && !SCALED_QUERIES<E>) x *= f, y *= f;
      if constexpr (MASKED) {
        x = show(x, shown + j, i);
        if constexpr (BOTH) y = show(y, shown + j, i + half);
      }
      if constexpr (RAW) {
        max = max_or_second<T>(x, max);
        if constexpr (BOTH) max = max_or_second<T>(y, max);
      }
      x = exp2<T>(x - top);
      if constexpr (BOTH) y = exp2<T>(y - top);
      sum = (sum + x) + y;
      if constexpr (DROPS) {
        x = (Vec<T>)_mm512_maskz_mov_ps(kept.bits[(i * lanes + j) / W<T>], (__m512)x);
        y = (Vec<T>)_mm512_maskz_mov_ps(kept.bits[((i + half) * lanes + j) / W<T>], (__m512)y);
      }
      store_words<P>(to, words.piece, cut_computed<P>(x), cut_computed<P>(y));
      if (bias) {
        prefetch_far(bias);
        if (sizeof(E) == 4) prefetch_far(bias + 64);
        bias += b.bias.row;
      }
    }
    store(b.sum + j, sum);
    if constexpr (RAW) store(b.block_max + j, max);
    if (j == 0 && (DROPS || MASKED || (!RAW && b.has_dense))) keep_awake();
  };
  const bool both = b.block + key + half < b.k1;
  for (index_t j = 0; j < lanes; j += W<T>)
    both ? queries.template operator()<true>(j) : queries.template operator()<false>(j);
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

// The maxima of 32 keys, for queries that have seen none so far.
FA_NOINLINE void first_max(Scored& b, const float* s, float factor, const uint32_t* shown) {
  using T = float;
  const index_t lanes = b.x->vectors * W<T>;
  const Vec<T> lowest = splat(Bits<T>::lowest), f = splat(factor);
  for (index_t j = 0; j < lanes; j += W<T>) {
    const Vec<T> max = load(b.max + j);
    if (!any_lane<float>(max == lowest)) continue;
    Vec<T> here = lowest;
    for (index_t i = 0; i < DEPTH; i++) {
      const Vec<T> logit = load(s + i * lanes + j) * f;
      here = max_or_second<T>(shown ? show(logit, shown + j, i) : logit, here);
    }
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

// P of 32 keys, what a mask shows of them or null; dropout.
template <class E>
FA_INLINE void probabilities(const ForwardHead& h, Scored& b, bool raw, float factor, index_t key,
                             const float* s, const uint32_t* shown) {
  const Operand words{b.words.data + key / 2 * b.words.row, b.words.row, b.words.piece};
  Kept kept;
  const auto run = [&](auto f)
                       __attribute__((always_inline)) { f(b, key, s, factor, kept, shown, words); };
  if (h.rules.dropout.threshold) {
    draw_kept(h.rules.dropout, b.x->first, b.x->vectors * W<float>, b.block + key, kept);
    if (shown) return run(exponentials<E, true, true, true>);
    return raw ? run(exponentials<E, true, true, false>) : run(exponentials<E, false, true, false>);
  }
  if (shown) return run(exponentials<E, true, false, true>);
  raw ? run(exponentials<E, true, false, false>) : run(exponentials<E, false, false, false>);
}

// P of a block, and the maximum and the factors that go with it. First from the maximum of the
// blocks before, strip by strip, while scores are in the L1 cache; if a logit exceeds that by too
// much, again from the block's. Where that happened in the last block, only maxima are computed at
// first.
template <class E>
FA_NOINLINE void block_probabilities(const ForwardHead& h, Scored& b, const Matrix& k,
                                     const KeyBlock& keys, const Plan& plan) {
  using T = float;
  Queries<T>& x = *b.x;
  const index_t lanes = x.vectors * W<T>;
  begin_block(b, lanes);
  const bool later = x.risen, raw = plan.raw && !later;  // later: exponentials of the whole block
  const float factor = raw ? plan.factor.after : 1;
  for (index_t key = b.low; key < b.high; key += plan.strip) {
    T* s = b.s + (later ? key * lanes : 0);
    score_strip<E>(h, b, k, keys, plan, !raw, key, s);
    if (raw && b.masked) read_mask(h.rules.mask, b, key);
    for (index_t i = 0; i < min_index(plan.strip, b.high - key); i += DEPTH) {
      const uint32_t* shown = raw && b.masked ? b.shown[i / DEPTH] : nullptr;
      first_max(b, s + i * lanes, factor, shown);
      if (!later) probabilities<E>(h, b, raw, factor, key + i, s + i * lanes, shown);
    }
  }
  IntVec<T> grown{};
  for (index_t i = 0; i < lanes; i += W<T>) {
    const Vec<T> before = load(b.max + i), max = next_max(before, load(b.block_max + i));
    grown |= max != before;
    store(b.max + i, max);
  }
  x.risen = any_lane<float>(grown);
  if (x.risen && !later) {
    for (index_t i = 0; i < lanes; i += W<T>) store(b.sum + i, Vec<T>{});
    for (index_t key = b.low; key < b.high; key += plan.strip)
      score_strip<E>(h, b, k, keys, plan, true, key, b.s + key * lanes);
  }
  for (index_t key = b.low; (x.risen || later) && key < b.high; key += DEPTH)
    probabilities<E>(h, b, false, 1, key, b.s + key * lanes, nullptr);
  IntVec<T> moved{};
  for (index_t i = 0; i < lanes; i += W<T>) {
    const Vec<T> before = load(x.max + i), max = load(b.max + i), r = exp2<T>(before - max);
    moved |= before != max;
    store(b.rescale + i, r);
    store(x.max + i, max);
    store(x.sum + i, fma<T>(load(x.sum + i), r, load(b.sum + i)));
    if (plan.raw && !b.masked) store(x.seen + i, splat(T(1)));
  }
  // Of three pieces, what was summed up is rescaled when the block's sum joins it.
  if (P_PIECES<E> < 3 && any_lane<float>(moved))
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
FA_NOINLINE void add_values(const ForwardHead& h, Scored& b, const Matrix& v,
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
      tile_product<PIECES<E>, P, MI, NJ>(rows, words, steps, b.sums, 8 * TILE, Fetch{b.fetcher});
      for (index_t c = 0; c < MI * TILE; c++) {
        FA_UNROLL
        for (int n = 0; n < NJ; n++) {
          T* at = o + c * lanes + n * TILE;
          store(at, fma<T>(load(at), load(b.rescale + j + n * TILE),
                           load(b.sums + c * 2 * TILE + n * TILE)));
        }
      }
    } else {
      tile_product<PIECES<E>, P, MI, NJ, false, true>(rows, words, steps, o, 4 * lanes,
                                                      Fetch{b.fetcher});
    }
  });
  if (keys.odd_v) mend_values<E>(b, v, h.dv);
}
