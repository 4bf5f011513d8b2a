// Forward on tiles of numbers in several pieces. A unit is a sub-block of queries against a block
// of keys. While the scores of one unit and the values of the last but one are multiplied, rules
// and exponentials of the one between run beside the products, a few rows at a time: beside tiles,
// vectors' multiplications and additions run at half their rate, but there is room for all of them
// if they are spread evenly. In turn they took a quarter longer (128 keys by 32 queries at d = 64,
// float32: 43 cycles a vector of scores, not 56).
#pragma once

#include "kernel/amx/forward_values.h"

namespace fusedattn {
namespace {

// What is left to do to a unit's scores, in steps: rules and maxima of some keys; what dropout
// keeps of DRAWN keys; exponentials of a row of keys and of the row 16 further.
struct Steps : Paced {
  const ForwardHead* h;
  Scored* b;
  index_t at, rules, draws;  // the next step, and where the first two kinds end
  Kept kept;
};

// The maxima of keys [from, to) of the block, a multiple of 16, of what the products gave.
template <class E, int NQ>
FA_INLINE void join_maxima(Scored& b, index_t from, index_t to, float factor) {
  using T = float;
  constexpr int chains = 4 / NQ;
  Vec<T> max[NQ][chains];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    FA_UNROLL
    for (int c = 0; c < chains; c++) max[j][c] = load(b.block_max + j * W<T>);
  }
  const Vec<T> f = splat(factor);
  for (index_t i = from; i < to; i += chains) {
    FA_UNROLL
    for (int c = 0; c < chains; c++) {
      FA_UNROLL
      for (int j = 0; j < NQ; j++) {
        Vec<T> x = load(b.s + ((i + c) * NQ + j) * W<T>);
        if constexpr (!SCALED_QUERIES<E>) x *= f;
        max[j][c] = max_or_second<T>(x, max[j][c]);
      }
    }
  }
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    FA_UNROLL
    for (int c = 1; c < chains; c++) max[j][0] = max_or_second<T>(max[j][c], max[j][0]);
    store(b.block_max + j * W<T>, max[j][0]);
  }
}
// The same, and -inf where the mask hides a key.
template <class E, int NQ>
FA_INLINE void hide_keys(const Matrix& mask, Scored& b, index_t from, index_t to, float factor) {
  using T = float;
  const index_t key = from - b.low;
  if (key % (2 * DEPTH) == 0) read_mask(mask, b, from);
  const uint32_t* shown = b.shown[key / DEPTH % 2];
  const Vec<T> f = splat(factor);
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    Vec<T> max = load(b.block_max + j * W<T>);
    for (index_t i = 0; i < to - from; i++) {
      float* at = b.s + ((from + i) * NQ + j) * W<T>;
      Vec<T> x = load(at);
      if constexpr (!SCALED_QUERIES<E>) x *= f;
      x = show(x, shown + j * W<T>, key % DEPTH + i);
      max = max_or_second<T>(x, max);
      store(at, x);
    }
    store(b.block_max + j * W<T>, max);
  }
}

// A softcap alone, of the keys that exist.
template <class E, int NQ>
FA_INLINE void bend_keys(const Rules& rules, Scored& b, index_t from, index_t to) {
  from = max_index(from, b.k0 - b.block);
  to = min_index(to, b.k1 - b.block);
  if (from < to)
    finish_scores<E, true, false, NQ>(rules, to - from, b.s + from * NQ * W<float>,
                                      b.plan.factor.after, {}, b.block_max, b.x->seen);
}

// Exponentials of row r of the unit's rows.
template <class E, int NQ, bool DROPS>
FA_INLINE void exponentials_of_row(Scored& b, index_t r, const Kept& kept) {
  using T = float;
  constexpr index_t half = DEPTH / 2;
  const index_t i = r % half, key = b.low + r / half * DEPTH;
  const bool both = b.block + key + half < b.k1;
  const Vec<T> f = splat(b.plan.raw && !b.masked ? b.plan.factor.after : 1);
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    const T* at = b.s + ((key + i) * NQ + j) * W<T>;
    Vec<T> x = load(at), y = both ? load(at + half * NQ * W<T>) : splat(-Bits<T>::infinity),
           sum = load(b.sum + j * W<T>);
    if constexpr (!SCALED_QUERIES<E>) {
      x *= f;
      if (both) y *= f;
    }
    char* to = b.words.data + (b.low / 2 + r) * b.words.row + 4 * j * W<T>;
    cut_probabilities<E, DROPS>(x, y, load(b.max + j * W<T>), sum, kept.bits + (key + i) * NQ + j,
                                half * NQ, to, b.words.piece);
    store(b.sum + j * W<T>, sum);
    fetch_bias<E>(b, j * W<T> + i, key);
  }
}

template <class E, int NQ> FA_NOINLINE void run_step(Paced& steps) {
  Steps& t = static_cast<Steps&>(steps);
  Scored& b = *t.b;
  const Rules& rules = t.h->rules;
  const index_t at = t.at++;
  step_taken(t);
  if (at < t.rules) {
    const index_t from = b.low + at * b.plan.chunk, to = min_index(from + b.plan.chunk, b.high);
    if (b.plan.bent)
      bend_keys<E, NQ>(rules, b, from, to);
    else if (!b.plan.raw)
      rule_scores<E>(*t.h, b, from, to, b.s + from * NQ * W<float>);
    else if (b.masked)
      hide_keys<E, NQ>(rules.mask, b, from, to, b.plan.factor.after);
    else
      join_maxima<E, NQ>(b, from, to, b.plan.factor.after);
    if (at + 1 == t.rules)
      for (index_t i = 0; i < NQ * W<float>; i += W<float>)
        store(b.max + i, max_or_second<float>(load(b.block_max + i), load(b.max + i)));
  } else if (at < t.draws) {
    draw_kept(rules.dropout, b.x->first, NQ * W<float>, b.block, b.low + (at - t.rules) * DRAWN,
              t.kept);
  } else if (rules.dropout.threshold) {
    exponentials_of_row<E, NQ, true>(b, at - t.draws, t.kept);
  } else {
    exponentials_of_row<E, NQ, false>(b, at - t.draws, t.kept);
  }
}

// Units on their way: `scored` awaits its exponentials, `cut` its values. null: none.
struct Pipeline {
  const ForwardHead& h;
  Fetcher fetcher;
  Scored *scored, *cut;
};

template <class E> FA_INLINE void begin_steps(const Pipeline& p, index_t products, Steps& t) {
  t.h = &p.h, t.b = p.scored;
  t.at = t.rules = t.draws = t.left = 0;
  if (t.b) {
    begin_block(*t.b, t.b->x->vectors * W<float>);
    const index_t keys = t.b->high - t.b->low;
    t.rules = (keys + t.b->plan.chunk - 1) / t.b->plan.chunk;
    t.draws = t.rules + (p.h.rules.dropout.threshold ? keys / DRAWN : 0);
    t.left = t.draws + keys / 2;
    t.run = t.b->x->vectors == 1 ? run_step<E, 1> : run_step<E, 2>;
  }
  start_steps(t, products);
}
// Of tiles, over d numbers.
FA_INLINE index_t products_of(const Scored* b, index_t d, index_t each) {
  return b ? (b->high - b->low) / TILE * b->x->vectors * up_to(d, DEPTH) / DEPTH * each : 0;
}

// Takes in a unit, or none.
template <class E> FA_NOINLINE void advance(Pipeline& p, Scored* unit) {
  const index_t products = products_of(unit, p.h.d, piece_order<PIECES<E>, PIECES<E>>().n) +
                           products_of(p.cut, p.h.d_v, piece_order<PIECES<E>, P_PIECES<E>>().n);
  Steps steps;
  begin_steps<E>(p, products, steps);
  const FetchAndStep beside{p.fetcher, steps};
  if (unit)
    multiply_scores<E>(p.h, *unit, unit->low, unit->high,
                       unit->s + unit->low * unit->x->vectors * W<float>, beside);
  if (p.cut) add_values<E>(p.h, *p.cut, beside);
  finish_steps(steps, true);
  if (p.scored) end_probabilities(*p.scored);
  p.cut = p.scored;
  p.scored = unit;
}
// Until no unit needs these keys any more; null: until none is left.
template <class E> FA_INLINE void finish_units(Pipeline& p, const KeyBlock* keys) {
  const auto waits = [&](const Scored* b) { return b && (!keys || b->keys == keys); };
  while (waits(p.scored) || waits(p.cut)) advance<E>(p, nullptr);
}

}  // namespace
}  // namespace fusedattn
