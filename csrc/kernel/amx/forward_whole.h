// Forward on tiles of numbers in one piece: a block's scores, rules and exponentials 32 or 64 keys
// at a time, while they are in the L1 cache, and then its values. Running the one beside the
// other's products gains nothing: there are too few.
#pragma once

#include "kernel/amx/forward_values.h"

namespace fusedattn {
namespace {

// What P = exp2(S - max) of a query is relative to: a logit that is less than the largest so far by
// no more than SLACK, so that a block's maximum need not be known before its exponentials. It stays
// what it was until a block exceeds it by more, then it is that block's maximum. The first one is
// the maximum of the first 32 keys of which the query sees one, if that will do for the block.
inline constexpr float SLACK = 8;
template <class V> FA_INLINE V next_max(V before, V block) {
  return block > before + SLACK ? block : before;
}

// P of 32 keys, of which the last 16 are left out if they do not exist. RAW: S is what the product
// gave; its factor is to be applied, and its maximum joins block_max. MASKED: only of what is
// shown.
template <class E, bool RAW, bool DROPS, bool MASKED>
FA_NOINLINE void strip_exponentials(Scored& b, index_t key, const float* s, float factor,
                                    const Kept& kept, const uint32_t* shown) {
  using T = float;
  constexpr int half = int(DEPTH / 2);
  const index_t lanes = b.x->vectors * W<T>, apart = half * b.x->vectors;
  const Vec<T> f = splat(factor);
  const auto queries = [&]<bool BOTH>(index_t j) FA_LAMBDA {  // W queries from lane j on
    const Vec<T> top = load(b.max + j);
    Vec<T> sum = load(b.sum + j), max = load(b.block_max + j);
    const T* at = s + j;
    char* to = b.words.data + key / 2 * b.words.row + 4 * j;
    for (int i = 0; i < half; i++, at += lanes, to += b.words.row) {
      Vec<T> x = load(at), y = BOTH ? load(at + half * lanes) : splat(-Bits<T>::infinity);
      if constexpr (RAW && !SCALED_QUERIES<E>) {
        x *= f;
        if constexpr (BOTH) y *= f;
      }
      if constexpr (MASKED) {
        x = show(x, shown + j, i);
        if constexpr (BOTH) y = show(y, shown + j, i + half);
      }
      if constexpr (RAW) {
        max = max_or_second<T>(x, max);
        if constexpr (BOTH) max = max_or_second<T>(y, max);
      }
      cut_probabilities<E, DROPS>(x, y, top, sum, kept.bits + ((key + i) * lanes + j) / W<T>, apart,
                                  to, b.words.piece);
      fetch_bias<E>(b, j + i, key);
    }
    store(b.sum + j, sum);
    if constexpr (RAW) store(b.block_max + j, max);
    if (j == 0 && (DROPS || MASKED || (!RAW && b.has_dense))) keep_awake();
  };
  const bool both = b.block + key + half < b.k1;
  for (index_t j = 0; j < lanes; j += W<T>)
    both ? queries.template operator()<true>(j) : queries.template operator()<false>(j);
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
// P of 32 keys, what a mask shows of them or null; dropout.
template <class E>
FA_INLINE void strip_probabilities(const ForwardHead& h, Scored& b, bool raw, index_t key,
                                   const float* s, const uint32_t* shown) {
  const float factor = raw ? b.plan.factor.after : 1;
  Kept kept;
  const auto run = [&](auto f) FA_LAMBDA { f(b, key, s, factor, kept, shown); };
  if (h.rules.dropout.threshold) {
    for (index_t i = 0; i < DEPTH; i += DRAWN) {
      draw_kept(h.rules.dropout, b.x->first, b.x->vectors * W<float>, b.block, key + i, kept);
      keep_awake();
    }
    if (shown) return run(strip_exponentials<E, true, true, true>);
    return raw ? run(strip_exponentials<E, true, true, false>)
               : run(strip_exponentials<E, false, true, false>);
  }
  if (shown) return run(strip_exponentials<E, true, false, true>);
  raw ? run(strip_exponentials<E, true, false, false>)
      : run(strip_exponentials<E, false, false, false>);
}

// P of a block, and the maximum and the factors that go with it. First from the maximum of the
// blocks before, strip by strip, while scores are in the L1 cache; if a logit exceeds that by too
// much, again from the block's. Where that happened in the last block, only maxima are computed at
// first.
template <class E>
FA_NOINLINE void block_probabilities(const ForwardHead& h, Scored& b, Fetcher& fetcher) {
  using T = float;
  TiledQueries& x = *b.x;
  const index_t lanes = x.vectors * W<T>;
  begin_block(b, lanes);
  const bool later = x.risen,  // exponentials of the whole block
      raw = b.plan.raw && !later;
  const float factor = raw ? b.plan.factor.after : 1;
  const auto score = [&](index_t key, bool rules, float* s) {
    const index_t end = min_index(key + b.plan.chunk, b.high);
    multiply_scores<E>(h, b, key, end, s, Fetch{fetcher});
    if (rules) rule_scores<E>(h, b, key, end, s);
  };
  for (index_t key = b.low; key < b.high; key += b.plan.chunk) {
    float* s = b.s + (later ? key * lanes : 0);
    score(key, !raw, s);
    if (raw && b.masked) read_mask(h.rules.mask, b, key);
    for (index_t i = 0; i < min_index(b.plan.chunk, b.high - key); i += DEPTH) {
      const uint32_t* shown = raw && b.masked ? b.shown[i / DEPTH] : nullptr;
      first_max(b, s + i * lanes, factor, shown);
      if (!later) strip_probabilities<E>(h, b, raw, key + i, s + i * lanes, shown);
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
    for (index_t key = b.low; key < b.high; key += b.plan.chunk)
      score(key, true, b.s + key * lanes);
  }
  for (index_t key = b.low; (x.risen || later) && key < b.high; key += DEPTH)
    strip_probabilities<E>(h, b, false, key, b.s + key * lanes, nullptr);
  IntVec<T> moved{};
  for (index_t i = 0; i < lanes; i += W<T>) moved |= load(x.max + i) != load(b.max + i);
  end_probabilities(b);
  if (any_lane<float>(moved))
    for (index_t c = 0; c < h.d_v; c++)
      for (index_t i = 0; i < lanes; i += W<T>) {
        T* o = x.o + c * lanes + i;
        store(o, load(o) * load(b.rescale + i));
      }
}

}  // namespace
}  // namespace fusedattn
