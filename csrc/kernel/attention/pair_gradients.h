// What backward makes of a pair of query and key, whatever multiplied: its probability and the
// gradient of its logit, by every rule. Keys lie in the lanes.
//
//   P = exp2(S - lse2),   dS = P (dP - delta),   by the product dS times the slope of the softcap
#pragma once

#include "kernel/rules/logits.h"

namespace fusedattn {
namespace {

// P = exp2(s - lse2). It is at most 1; huge logits have rounding errors that would say otherwise.
template <class T> FA_INLINE Vec<T> probability(Vec<T> s, Vec<T> lse2) {
  return exp2<T>(min_or_second<T>(Vec<T>{}, s - lse2));
}

// p: as dropout leaves it, not yet scaled. ds: by the logit, bias and all; by_product: by what the
// softcap was applied to.
template <class T> struct PairGradients {
  Vec<T> p, ds, by_product;
};
// Of the final logits s. bent: tanh, if there is a softcap; keep: dropout's 0 or 1, if there is
// any, and `kept` its scale. allowed(x): x where a pair is allowed, else 0.
template <class T, class Allowed>
FA_INLINE PairGradients<T> pair_gradients(Vec<T> s, Vec<T> lse2, Vec<T> dp, Vec<T> delta,
                                          bool bends, Vec<T> bent, const T* keep, Vec<T> kept,
                                          Allowed&& allowed) {
  PairGradients<T> x;
  x.p = allowed(probability<T>(s, lse2));
  if (keep) dp *= load(keep) * kept;
  x.ds = allowed(x.p * (dp - delta));
  x.by_product = bends ? allowed(x.ds * Softcap<T>::slope(bent)) : x.ds;
  if (keep) x.p *= load(keep);
  return x;
}

}  // namespace
}  // namespace fusedattn
