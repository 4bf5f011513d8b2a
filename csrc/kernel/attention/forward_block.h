// Forward's work on one block of keys and one sub-block of queries: scores and rules, exponentials,
// values. Called by forward.h.
#pragma once

#include "kernel/attention/dense_scores.h"
#include "kernel/attention/forward_pairs.h"
#include "kernel/attention/forward_steps.h"
#include "kernel/attention/operands.h"
#include "kernel/rules/dropout.h"
#include "kernel/vector/tanh.h"

namespace fusedattn {
namespace {

// S = S * factor, where a scale is out of the ordinary; the maximum over keys joins max_io.
template <class T, int NQ> FA_NOINLINE void stretch(index_t n, T* p, T factor, T* max_io) {
  for (index_t i = 0; i < n; i++) FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    T *at = p + (i * NQ + j) * W<T>, *max = max_io + j * W<T>;
    const Vec<T> s = load(at) * splat(factor);
    store(at, s);
    store(max, max_or_second<T>(s, load(max)));
  }
}

// S = softcap * tanh(S), in log2 units; the maximum over keys joins max_io.
template <class T, int NQ> FA_NOINLINE void bend(const Rules& rules, index_t n, T* p, T* max_io) {
  const Softcap<T> softcap(rules);
  Vec<T> max[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) max[j] = load(max_io + j * W<T>);
#pragma GCC unroll 1
  for (index_t i = 0; i < n; i++) {
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      T* at = p + (i * NQ + j) * W<T>;
      const Vec<T> s = softcap.bent(tanh<T>(load(at)));
      store(at, s);
      max[j] = max_or_second<T>(s, max[j]);
    }
  }
  FA_UNROLL
  for (int j = 0; j < NQ; j++) store(max_io + j * W<T>, max[j]);
}

// The same of all rows of a block, found out once for all sub-blocks.
struct Finite {
  index_t rows;
  enum { unknown, yes, no } known = unknown;
};
template <class E, class T = Compute<E>>
FA_INLINE bool is_finite(Finite& f, Rows<T> v, index_t d_v) {
  if (f.known == Finite::unknown)
    f.known = finite_values<E>(v, 0, f.rows, d_v) ? Finite::yes : Finite::no;
  return f.known == Finite::yes;
}

// One block of keys [k0, k1) (at most KEY_BLOCK) for one sub-block of queries.
template <class E, int NQ, class T = Compute<E>>
FA_NOINLINE void forward_block(const ForwardHead& h, Queries<T>& x, Rows<T> k, Rows<T> v, bool cold,
                               index_t block, index_t k0, index_t k1, bool use_mask, T* p, T* tile,
                               Fetcher& fetcher, Finite& v_finite) {
  const index_t lanes = NQ * W<T>;
  const Factors factors = logit_factors<T>(h.scale, h.rules);
  alignas(64) T block_max[LANES<T>], ignored[LANES<T>], rescale[LANES<T>];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) store(block_max + j * W<T>, splat(Bits<T>::lowest));

  // 1. scores, in up to three ranges: ragged, seen by every query, ragged
  index_t cut[4] = {k0, max_index(k0, min_index(k1, x.keys.all.low)), 0, k1};
  cut[2] = max_index(cut[1], min_index(k1, x.keys.all.high));
  Dense<T> dense[3] = {};  // made where V asks for care, and where it is one number a key
  bool has_dense_part[3] = {}, careful = false;
  for (int r = 0; r < 3; r++) {
    const index_t a = cut[r], n = cut[r + 1] - a;
    if (n <= 0) continue;
    T *pr = p + (a - k0) * lanes, *tile_r = tile + (a - k0) * lanes;
    const bool bent = h.rules.softcap > 0, ragged = r != 1,
               plain = !ragged && !has_dense(h.rules, use_mask),
               per_key = !plain && !ragged && dense_is_per_key(h.rules, use_mask);
    const Rows<T> kr{k.data + (a - block) * k.ld, k.ld}, vr{v.data + (a - block) * v.ld, v.ld};
    const bool direct = plain && !bent && factors.after == 1;
    const auto run = cold ? scores<E, NQ, true> : scores<E, NQ, false>;
    run(n, kr, vr, x.q, words<E>(h.d), h.d_v, T(factors.before), pr, direct ? block_max : ignored);
    if (factors.after != 1)
      stretch<T, NQ>(n, pr, T(factors.after), plain && !bent ? block_max : ignored);
    if (bent) bend<T, NQ>(h.rules, n, pr, plain ? block_max : ignored);
    if (plain) {
      FA_UNROLL
      for (int j = 0; j < NQ; j++) store(x.seen + j * W<T>, splat(T(1)));
      continue;
    }
    has_dense_part[r] = true;
    if (per_key) {
      dense[r] = dense_tile<E>(h.rules, x, use_mask, ragged, a, a + n, tile_r);
      add_dense<T, NQ>(n, pr, dense[r], block_max, x.seen);
    } else {
      make_and_add_dense<E>(h.rules, x, use_mask, ragged, a, a + n, pr, block_max);
    }
    careful |= !is_finite<E>(v_finite, v, h.d_v);
  }
  for (int r = 0; careful && r < 3; r++)
    if (has_dense_part[r] && !dense[r].data)
      dense[r] = dense_tile<E>(h.rules, x, use_mask, r != 1, cut[r], cut[r + 1],
                               tile + (cut[r] - k0) * lanes);

  // 2. P = exp2(S - max), running maximum and sums
  if constexpr (PAIRS<E>)
    exponentials_in_pairs<NQ>(k1 - k0, p, block_max, x.max, x.sum, x.total, rescale, fetcher);
  else
    exponentials<T, NQ>(k1 - k0, p, block_max, x.max, x.sum, rescale, fetcher);
  if (h.rules.dropout.threshold) drop_tile<E, NQ>(h.rules.dropout, x.first, k0, k1 - k0, p);

  // 3. O = O * rescale + P V
  constexpr index_t each = PAIRS<E> ? 2 : 1;
  const Rows<T> vb{v.data + (k0 - block) / each * v.ld, v.ld};
  if (!careful) {
    values<E, NQ>(words<E>(k1 - k0), vb, p, h.d_v, x.o, rescale);
  } else if constexpr (PAIRS<E>) {
    careful_values_in_pairs<NQ>(words<E>(k1 - k0), vb, p, dense, cut, h.d_v, x.o, rescale);
  } else {
    for (int r = 0; r < 3; r++)
      if (dense[r].data)
        mark_masked<T, NQ>(cut[r + 1] - cut[r], p + (cut[r] - k0) * lanes, dense[r]);
    careful_values<T, NQ>(k1 - k0, vb, p, h.d_v, x.o, rescale);
  }
}

}  // namespace
}  // namespace fusedattn
