// What the backward pass on tiles does with one cell: P and dS from S and dP by every rule, and
// their cutting into operands.
#pragma once

#include "kernel/amx/backward_allowed.h"
#include "kernel/amx/cut.h"
#include "kernel/attention/pair_gradients.h"
#include "kernel/rules/dropout.h"
#include "kernel/rules/logits.h"
#include "kernel/vector/tanh.h"

namespace fusedattn {
namespace {

// lse2 or delta of a query. A NaN that the caller made may have bits that rounding carries over
// into a number.
FA_INLINE Vec<float> statistic(float x) {
  return splat(x == x ? x : __builtin_nanf(""));
}

// What has to be done for a cell: no pair is forbidden, no rule changes a logit; no rule does; a
// softcap, or a bias or ALiBi, is the only one; any of them, dropout, or there is an uncut number.
enum class Kind { all, some, bent, added, ruled };
FA_INLINE Kind kind_of(const Rules& rules) {
  const bool bent = rules.softcap > 0, added = rules.bias.data || adds_by_position(rules);
  if (rules.dropout.threshold || (bent && added)) return Kind::ruled;
  return bent ? Kind::bent : added ? Kind::added : Kind::some;
}

// What the rules need to know.
template <class E> struct CellRules {
  AddedToKeys<E> added;
  Softcap<float> softcap;
  bool bends, drops;
  Vec<float> factor, kept;
};
template <class E, Kind KIND>
FA_INLINE CellRules<E> cell_rules(const TiledBackwardBlock& b, const Rules& rules) {
  constexpr bool any = KIND == Kind::ruled, added = any || KIND == Kind::added;
  return {AddedToKeys<E>(rules, added, added),
          Softcap<float>(rules),
          KIND == Kind::bent || (any && rules.softcap > 0),
          any && rules.dropout.threshold,
          splat(b.factor),
          splat(float(rules.dropout.scale))};
}
FA_INLINE Vec<float> only(uint32_t pairs, Vec<float> x) {
  return (Vec<float>)_mm512_maskz_mov_ps(__mmask16(pairs), (__m512)x);
}

// Of query q and the keys from k on, n of which exist, and S as the product gave it. `bent`: tanh
// of the logit, with a softcap. keep: dropout's 0 or 1.
template <class E, Kind KIND>
FA_INLINE PairGradients<float> cell_gradients(const CellRules<E>& x, Vec<float> s, Vec<float> bent,
                                              Vec<float> dp, Vec<float> l, Vec<float> dl,
                                              uint32_t pairs, index_t q, index_t k, index_t n,
                                              const float* keep) {
  using T = float;
  s = x.bends ? x.softcap.bent(bent) : s * x.factor;
  if (x.added.slanted || x.added.biased) {
    Vec<T> bias{};
    s += x.added.template at<false>(q, k, 0, n, bias);
    if (x.added.biased)
      pairs &= _mm512_cmp_ps_mask((__m512)bias, (__m512)splat(-Bits<T>::infinity), _CMP_NEQ_UQ);
  }
  return pair_gradients<T>(s, l, dp, dl, x.bends, bent, x.drops ? keep : nullptr, x.kept,
                           [&](Vec<T> y)
                               FA_LAMBDA { return KIND == Kind::all ? y : only(pairs, y); });
}

// What becomes of a cell, in steps: four queries' dropout; P and dS of two queries as operands.
struct CellSteps : Paced {
  const TiledBackwardBlock* b;
  const Rules* rules;
  int r, c;
  Kind kind;
  bool uncut;         // P and dS are wanted in s and bent as well
  index_t at, draws;  // the next step, and where those of dropout end
  float *s, *dp;
  Operand p, ds;
};

// Of queries i and i + 16 of the cell.
template <class E, Kind KIND, bool NEED_DS>
FA_INLINE void cut_pairs(const CellSteps& t, const CellRules<E>& x, index_t i) {
  using T = float;
  constexpr int P = COMPUTED<E>;
  const TiledBackwardBlock& b = *t.b;
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
      PairGradients<T> g{};
      if (KIND == Kind::all || own)
        g = cell_gradients<E, KIND>(x, load(t.s + at), bent[2 * h + y],
                                    NEED_DS ? load(t.dp + at) : Vec<T>{}, l, dl, own, b.q0 + q,
                                    b.k0 + key, b.nk - key, b.keep + at);
      if (KIND == Kind::ruled && t.uncut) store(t.s + at, g.p), store(b.bent + at, g.by_product);
      p[h][y] = cut_computed<P>(g.p);
      if (NEED_DS) ds[h][y] = cut_computed<P>(g.by_product);
      if (NEED_DS && b.ds_all) store(b.ds_all + q * TILED_BACK_KEYS + key, g.ds);
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
  const TiledBackwardBlock& b = *t.b;
  const index_t at = t.at++;
  if (at < t.draws) {
    const index_t q = t.r * CELL + 4 * at;
    if (q < b.nq)
      keep_rows<float>(t.rules->dropout, b.q0 + q, b.k0 + t.c * CELL, CELL, b.keep + 4 * at * CELL,
                       CELL);
    return;
  }
  const CellRules<E> x = cell_rules<E, KIND>(b, *t.rules);
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
FA_NOINLINE void clear_cell(const TiledBackwardBlock& b, int r, int c) {
  for (index_t i = 0; i < CELL; i++)
    __builtin_memset(b.ds_all + (r * CELL + i) * TILED_BACK_KEYS + c * CELL, 0,
                     CELL * sizeof(float));
}

}  // namespace
}  // namespace fusedattn
