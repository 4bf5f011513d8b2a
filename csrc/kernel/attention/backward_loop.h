// Backward's way through the queries that see a block of keys, whichever way they are multiplied:
// backward.h and amx/backward.h hand in an engine. The rules of each query head, and whose turn it
// is to add to what is shared, are settled here.
#pragma once

#include "kernel/attention/turns.h"
#include "kernel/rules/intervals.h"

namespace fusedattn {
namespace {

// Block of queries [q0, q0 + nq) of query head g.
struct QueryBlock {
  index_t g, q0, nq;
  Rules rules;               // of the head
  Matrix q, dout;            // likewise
  const char *lse2, *delta;  // from q0 on, in the compute type
};

FA_INLINE Rules rules_of_head(const BackwardHead& h, index_t g) {
  Rules rules = h.rules;
  if (rules.mask.data) rules.mask.data += g * h.mask_head;
  if (rules.covers.said) rules.covers.said += g * h.covers_head;
  if (rules.bias.data) rules.bias.data += g * h.bias_head;
  if (h.alibi_slopes) rules.alibi_slope = h.alibi_slopes[g];
  rules.dropout.head += uint32_t(g);
  return rules;
}

// A bias broadcast over queries gathers its gradient in scratch first, one sum a key; it joins
// dbias after the last query.
template <class T>
FA_NOINLINE void finish_bias(const BackwardHead& h, index_t g, index_t k0, index_t nk, T* sums) {
  const Turn turn = turn_at(h.bias_turns, g, 0);
  wait(h, turn);
  for (index_t k = 0; k < nk; k++)
    *reinterpret_cast<T*>(h.dbias.data + g * h.dbias_head + (k0 + k) * h.dbias.col) += sums[k];
  pass_on(h, turn);
  __builtin_memset(sums, 0, size_t(nk) * sizeof(T));
}

// An engine has
//   QUERIES           of a block at most, the unit of turns
//   T, k0, nk         the compute type; the block of keys
//   dbias             (nk) zeros: what a bias that is the same for all queries gathers
//   begin(block)      P and dS of a block of queries, and what they give to dk and dv; false if no
//                     pair of it is allowed
//   add_dq(block)     what they give to dq
//   add_dbias(to, nq) what they give to dbias, at `to`
template <class Engine>
FA_INLINE void backward_over_queries(Engine& engine, const BackwardHead& h) {
  using T = typename Engine::T;
  constexpr index_t size = sizeof(T), most = Engine::QUERIES;
  const index_t k_end = engine.k0 + engine.nk;
  const bool bias_per_key = h.dbias.row == 0;
  for (index_t g = 0; g < h.group; g++) {
    QueryBlock x{g, 0, 0, rules_of_head(h, g), h.q, h.dout, nullptr, nullptr};
    x.q.data += g * h.q_head;
    x.dout.data += g * h.dout_head;
    for (x.q0 = 0; x.q0 < h.sq; x.q0 += most) {
      const index_t number = x.q0 / most, at = (g * h.stat_head + x.q0) * size;
      const Turn dq_turn = turn_at(h.dq_turns, g, number),
                 bias_turn = turn_at(h.bias_turns, g, number);
      const Interval seen = h.visible[number];
      x.nq = min_index(most, h.sq - x.q0);
      x.lse2 = static_cast<const char*>(h.lse2) + at;
      x.delta = static_cast<const char*>(h.delta) + at;
      if (seen.low < k_end && seen.high > engine.k0 && engine.begin(x)) {
        wait(h, dq_turn);
        if (h.dq.data) engine.add_dq(x);
        if (h.dbias.data && bias_per_key) {
          engine.add_dbias({reinterpret_cast<char*>(engine.dbias), 0, size}, x.nq);
        } else if (h.dbias.data) {
          wait(h, bias_turn);
          engine.add_dbias(
              {h.dbias.data + g * h.dbias_head + x.q0 * h.dbias.row + engine.k0 * h.dbias.col,
               h.dbias.row, h.dbias.col},
              x.nq);
        }
      }
      pass_on(h, dq_turn);
      if (!bias_per_key) pass_on(h, bias_turn);
    }
    if (h.dbias.data && bias_per_key) finish_bias<T>(h, g, engine.k0, engine.nk, engine.dbias);
  }
}

}  // namespace
}  // namespace fusedattn
