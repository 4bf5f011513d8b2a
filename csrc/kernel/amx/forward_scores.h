// The first half of a unit of forward on tiles: the products K Q^T, and what rules do to them.
// forward_values.h is the second half; forward_pipeline.h and forward_whole.h call both.
#pragma once

#include "kernel/amx/cut.h"
#include "kernel/amx/pace.h"
#include "kernel/attention/dense_scores.h"
#include "kernel/rules/dropout.h"
#include "kernel/vector/tanh.h"

namespace fusedattn {
namespace {

// What tiles want of the steps of rules (see ByMultiplyAdds): the exponentials fetch a bias, a line
// at a time, and the unit stays awake, but for rules that run beside products, whose sums that
// would spoil.
template <class E> struct OnTiles {
  static constexpr bool fetches_bias = false;
  FA_INLINE_MEMBER static void once_a_while() {
    if constexpr (!PIPELINED<E>) keep_awake();
  }
};

// Queries of forward on tiles. uncut: something in q could not be cut; risen: the maximum rose in
// the last block; single: all keys are in one block, o is not used; finished: outputs are written.
struct TiledQueries : Queries<float> {
  bool uncut, risen, single, finished;
};

// A block of keys, cut, and whether something in it could not be.
struct KeyBlock {
  Operand k, v;  // rows (keys x d), rows (d_v x keys)
  bool uncut_k, uncut_v;
};

template <class E> FA_NOINLINE bool has_uncut(const Matrix& m, index_t r, index_t cols) {
  bool uncut = false;
  for (index_t c = 0; c < cols; c++) uncut |= cannot_be_cut(number_at<E>(m, r, c));
  return uncut;
}
template <class E>
FA_NOINLINE float dot_rows(const Matrix& a, index_t i, const Matrix& b, index_t j, index_t d) {
  float sum = 0;
  for (index_t c = 0; c < d; c++) sum += number_at<E>(a, i, c) * number_at<E>(b, j, c);
  return sum;
}

// Vectors of queries in a sub-block: pipelined, as many as leave P in the L1 cache.
template <class E> inline constexpr int WIDEST = PIPELINED<E> ? 2 : MAX_NJ;

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
FA_NOINLINE void score_uncut(const Matrix& k, index_t key, index_t n, const Matrix& q,
                             index_t query, index_t count, index_t d, float factor, float* s,
                             index_t lanes) {
  bool uncut_query[LANES<float>];
  for (index_t j = 0; j < count; j++) uncut_query[j] = has_uncut<E>(q, query + j, d);
  for (index_t i = 0; i < n; i++) {
    const bool uncut_key = has_uncut<E>(k, key + i, d);
    for (index_t j = 0; j < count; j++)
      if (uncut_key || uncut_query[j])
        s[i * lanes + j] = dot_rows<E>(k, key + i, q, query + j, d) * factor;
  }
}

// S = factor * S in log2 units (of SCALED_QUERIES it is), softcap, the dense part; the maximum over
// keys joins max_io.
template <class E, bool BENT, bool DENSE, int NQ>
FA_NOINLINE void finish_scores(const Rules& rules, index_t n, float* s, float factor,
                               const Dense<float>& dense, float* max_io, float* seen) {
  using T = float;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity), f = splat(factor);
  const Softcap<T> softcap(rules);
  Vec<T> max[NQ], any[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) max[j] = load(max_io + j * W<T>), any[j] = load(seen + j * W<T>);
  for (index_t i = 0; i < n; i++) {
    T* const at = s + i * NQ * W<T>;
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      Vec<T> x = load(at + j * W<T>);
      if constexpr (!SCALED_QUERIES<E>) x *= f;
      if constexpr (BENT) x = softcap.bent(tanh<T>(x));
      if constexpr (DENSE) {
        const Vec<T> add = dense_at(dense, i, j);
        x = add == minus_inf ? minus_inf : x + add;
        any[j] = add == minus_inf ? any[j] : splat(T(1));
      }
      max[j] = max_or_second<T>(x, max[j]);
      store(at + j * W<T>, x);
    }
  }
  OnTiles<E>::once_a_while();
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    store(max_io + j * W<T>, max[j]);
    store(seen + j * W<T>, DENSE ? any[j] : splat(T(1)));
  }
}

// How scores become probabilities. chunk: keys that rules are applied to at a time. raw: nothing is
// done to the products, but a mask may hide some; bent: a softcap is the only rule.
struct Plan {
  LogitFactor factor;
  index_t chunk;
  bool raw, bent;
};

// One sub-block of queries against keys [k0, k1) of one block. Tiles of keys [low, high), numbered
// from the beginning of the block.
struct Scored {
  TiledQueries* x;
  const KeyBlock* keys;
  Matrix k, v;  // the block's rows, as they are
  index_t block, k0, k1, low, high;
  index_t cut[4];  // ranges: ragged, seen by every query, ragged
  Dense<float> dense[3];
  bool use_mask, has_dense, masked;  // masked: by a mask and nothing else
  Plan plan;
  float *s, *tile;  // (128, lanes) each
  float* sums;      // 32 x 32
  Operand words;    // P
  Matrix bias;      // of a unit that comes soon, to be fetched; or null
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
FA_INLINE void rule_range(const Rules& rules, Scored& b, int r, index_t from, index_t to,
                          bool tiled, float factor, float* s) {
  TiledQueries& x = *b.x;
  const bool bent = rules.softcap > 0, ragged = r != 1;
  const bool plain = !ragged && !has_dense(rules, b.use_mask),
             in_tile = !plain && (tiled || (!ragged && dense_is_per_key(rules, b.use_mask)));
  if (in_tile)
    b.dense[r] = dense_tile<E, OnTiles<E>>(rules, x, b.use_mask, ragged, from, to,
                                           b.tile + (from - b.block) * NQ * W<float>);
  alignas(64) float ignored[LANES<float>], unseen[LANES<float>];
  const bool later = !plain && !in_tile;  // the dense part is added then
  const auto run = [&](auto f) FA_LAMBDA {
    f(rules, to - from, s, factor, b.dense[r], later ? ignored : b.block_max,
      later ? unseen : x.seen);
  };
  if (!in_tile && !bent && !(later && factor == 1)) run(finish_scores<E, false, false, NQ>);
  if (!in_tile && bent) run(finish_scores<E, true, false, NQ>);
  if (in_tile && !bent) run(finish_scores<E, false, true, NQ>);
  if (in_tile && bent) run(finish_scores<E, true, true, NQ>);
  if (later)
    make_and_add_dense<E, OnTiles<E>>(rules, x, b.use_mask, ragged, from, to, s, b.block_max);
}

// Rules of keys [from, to) of the block; s from `from` on.
template <class E>
FA_NOINLINE void rule_scores(const ForwardHead& h, Scored& b, index_t from, index_t to, float* s) {
  TiledQueries& x = *b.x;
  const index_t lanes = x.vectors * W<float>;
  for (int r = 0; r < 3; r++) {
    const index_t low = max_index(b.cut[r], b.block + from),
                  high = min_index(b.cut[r + 1], b.block + to);
    if (low >= high) continue;
    with_count<WIDEST<E>>(x.vectors, [&]<int NQ>() FA_LAMBDA {
      rule_range<E, NQ>(h.rules, b, r, low, high, b.keys->uncut_v, b.plan.factor.after,
                        s + (low - b.block - from) * lanes);
    });
  }
}

// Products of keys [from, to) of the block; s from `from` on, -inf where there is no key. Beside
// them `work`.
template <class E, class Work>
FA_NOINLINE void multiply_scores(const ForwardHead& h, Scored& b, index_t from, index_t to,
                                 float* s, Work work) {
  const TiledQueries& x = *b.x;
  const Operand& k = b.keys->k;
  const index_t lanes = x.vectors * W<float>;
  const Operand q = as_words(reinterpret_cast<char*>(x.q), h.d, lanes);
  const index_t low = max_index(from, b.k0 - b.block), high = min_index(to, b.k1 - b.block);
  multiply_operands<PIECES<E>, PIECES<E>>(
      high - from, lanes, h.d, {k.data + from * k.row, k.row, k.piece}, q, s, 4 * lanes, work);
  if (b.keys->uncut_k || x.uncut)
    score_uncut<E>(b.k, low, high - low, h.q, x.first, x.count, h.d, b.plan.factor.in_q,
                   s + (low - from) * lanes, lanes);
  clear_scores(s, low - from, lanes);
  clear_scores(s + (high - from) * lanes, to - high, lanes);
}

}  // namespace
}  // namespace fusedattn
