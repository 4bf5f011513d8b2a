// Backward: dq, dk, dv (and dbias) of one block of keys against all queries that see them,
// recomputing P from q, k and the LSE.
//
//   P  = exp2(S * log2(e) - lse2)          S as in forward, from packed K^T
//   dP = dout v^T                          from packed V^T
//   dS = P * (dP - delta)                  delta = rowsum(dout * out) - dlse
//   dv += P^T dout,  dbias += dS,  dk += scale * dS^T q,  dq += scale * dS k
//
// With dropout, kept entries of dP and of the P in dv are scaled by 1 / (1 - p), others are 0; with
// a softcap, dS is multiplied by 1 - tanh^2 once the bias has had its part.
//
// Keys lie in the lanes: K^T and V^T are packed once for the block, rows of q and dout are
// broadcast from where they are, and the three gradient products read P and dS by broadcast and
// land in natural layout. Five products of BK * BQ * d for 2 * BK * d packed elements and 4 * BK *
// BQ stored and re-read ones. Every element of a gradient is the sum of one chain a block, blocks
// of queries (dk, dv) or keys (dq) ascending: its bits depend neither on the tiles nor on the
// number of threads.
#pragma once

#include "kernel/attention/backward_steps.h"
#include "kernel/attention/operands.h"
#include "kernel/attention/turns.h"
#include "kernel/rules/cover.h"
#include "kernel/rules/dropout.h"
#include "kernel/vector/scratch.h"

namespace fusedattn {
namespace {

// Which keys each strip computes, and the dense tile (0 or bias where allowed, -inf elsewhere) if
// some entry is not plain. False if no query of the block sees any key of it.
template <class E, class T = Compute<E>>
FA_NOINLINE bool prepare_strips(const Rules& rules, const BackwardBlock<T>& b, index_t q0,
                                index_t nq, Strips& strips) {
  const Span span = visible_span(rules, q0, q0 + nq, b.k0 + b.nk);
  if (span.any.low >= b.k0 + b.nk || span.any.high <= b.k0) return false;
  bool use_mask = rules.mask.data != nullptr;
  if (use_mask) {
    const Cover cover = mask_cover(rules.mask, q0, nq, b.k0, b.nk);
    if (cover == Cover::none) return false;
    use_mask = cover == Cover::some;
  }
  const bool dense = has_dense(rules, use_mask);
  strips.whole = span.all.low <= b.k0 && span.all.high >= b.k0 + b.nk;
  strips.plain = strips.whole && !dense && !b.bent && !b.keep && b.after == T(1);
  strips.count = int((nq + STRIP - 1) / STRIP);
  if (strips.plain) return true;
  for (int s = 0; s < strips.count; s++) {
    const index_t begin = q0 + s * STRIP, end = min_index(begin + STRIP, q0 + nq);
    const Interval any = visible_span(rules, begin, end, b.k0 + b.nk).any;
    index_t low = max_index(any.low, b.k0) - b.k0, high = min_index(any.high, b.k0 + b.nk) - b.k0;
    if (low >= high) low = high = 0;
    strips.keys[s] = {low / W<T> * W<T>, round_up<T>(high)};
    dense_rows<E>(rules, use_mask, !strips.whole, begin, end, b.k0, b.nk,
                  b.dense + s * STRIP * BACK_KEYS, BACK_KEYS);
    for (index_t q = begin; q < end && b.keep; q += 4)
      keep_rows<T>(rules.dropout, q, b.k0, BACK_KEYS, b.keep + (q - q0) * BACK_KEYS, BACK_KEYS);
  }
  return true;
}

// What the gradient products read: numbers, or words made for them.
template <class T> struct Operands {
  const T *p, *ds, *ds_rows;
  Rows<T> q, dout, k;
};
template <class E, class T = Compute<E>>
FA_INLINE Operands<T> operands(const BackwardBlock<T>& b, const Matrix& qm, const Matrix& dm,
                               Rows<T> q, Rows<T> dout, index_t q0, index_t nq,
                               const BackwardHead& h, bool need_ds, const T* ds) {
  if constexpr (PAIRS<E>) {
    interleave_rows(qm, q0, nq, h.d, b.q_words, b.ld);
    interleave_rows(dm, q0, nq, h.d_v, b.dout_words, b.ld_v);
    round_block(b, ds, nq, need_ds, T(h.scale));
    return {b.p_words,        b.ds_words, b.ds_rows, {b.q_words, b.ld}, {b.dout_words, b.ld_v},
            {b.k_words, b.ld}};
  } else {
    return {b.p, ds, ds, q, dout, {b.k, b.ld}};
  }
}
template <class E, class T = Compute<E>>
FA_INLINE Rows<T> query_rows(const Matrix& m, index_t r0, index_t rows, index_t cols, T* scratch,
                             index_t ld, bool in_place, T factor = 1) {
  if constexpr (PAIRS<E>) return key_rows<E>(m, r0, rows, cols, scratch, in_place);
  if (in_place) return rows_at<E>(m, r0, rows, cols, scratch, ld, true);
  copy_rows<E>(m, r0, rows, cols, factor, scratch, ld);
  return {scratch, ld};
}
template <class E, class T = Compute<E>>
FA_INLINE bool finite_rows(Rows<T> m, index_t rows, index_t cols) {
  if constexpr (PAIRS<E>)
    return all_finite_words(m, words<E>(rows), cols);
  else
    return all_finite<T>(m, rows, cols);
}

// One block of queries [q0, q0 + nq) of query head g.
template <class E, class T = Compute<E>>
FA_NOINLINE void backward_tile(const BackwardHead& h, const BackwardBlock<T>& b, index_t g,
                               index_t q0, index_t nq, bool q_in_place, bool dout_in_place) {
  const Turn dq_turn = turn_at(h.dq_turns, g, q0 / BACK_QUERIES),
             bias_turn = turn_at(h.bias_turns, g, q0 / BACK_QUERIES);
  const bool bias_per_key = h.dbias.row == 0;
  Rules rules = h.rules;
  if (rules.mask.data) rules.mask.data += g * h.mask_head;
  if (rules.bias.data) rules.bias.data += g * h.bias_head;
  if (h.alibi_slopes) rules.alibi_slope = h.alibi_slopes[g];
  rules.dropout.head += uint32_t(g);
  Strips strips;
  const Interval seen = h.visible[q0 / BACK_QUERIES];
  const bool visible =
      seen.low < b.k0 + b.nk && seen.high > b.k0 && prepare_strips<E>(rules, b, q0, nq, strips);
  if (visible) {
    // 1. rows of q and dout
    Matrix qm = h.q, dm = h.dout;
    qm.data += g * h.q_head;
    dm.data += g * h.dout_head;
    const Rows<T> q = query_rows<E>(qm, q0, nq, h.d, b.q_copy, b.ld, q_in_place, b.q_factor);
    const Rows<T> dout = query_rows<E>(dm, q0, nq, h.d_v, b.dout_copy, b.ld_v, dout_in_place);
    const T* lse2 = static_cast<const T*>(h.lse2) + g * h.stat_head + q0;
    const T* delta = static_cast<const T*>(h.delta) + g * h.stat_head + q0;
    const bool need_ds = h.dq.data || h.dk.data || h.dbias.data;
    const index_t d = words<E>(h.d), d_v = words<E>(h.d_v);

    // 2. P and dS
    if (strips.plain) {
      recompute<E, true>(b, q, dout, 0, nq, {0, b.nk_padded}, d, d_v, lse2, delta, need_ds);
    } else {
      for (int s = 0; s < strips.count; s++) {
        const index_t begin = s * STRIP, end = min_index(begin + STRIP, nq);
        const Interval keys = strips.keys[s];
        for (index_t i = begin; i < end; i++)
          for (index_t k = 0; k < b.nk_padded; k += W<T>)
            if (k < keys.low || k >= keys.high) {
              store(b.p + i * BACK_KEYS + k, Vec<T>{});
              store(b.ds + i * BACK_KEYS + k, Vec<T>{});
              if (b.bent) store(b.bent + i * BACK_KEYS + k, Vec<T>{});
            }
        if (!strips.whole)
          recompute<E, false>(b, q, dout, begin, end, keys, d, d_v, lse2, delta, need_ds);
      }
      if (strips.whole)
        recompute<E, false>(b, q, dout, 0, nq, {0, b.nk_padded}, d, d_v, lse2, delta, need_ds);
      for (int s = 0; s < strips.count; s++)
        rule_probabilities<T>(b, rules, s * STRIP, min_index(s * STRIP + STRIP, nq), strips.keys[s],
                              lse2, delta, need_ds);
    }
    const T* ds = b.bent ? b.bent : b.ds;  // by scale * q k^T; b.ds is by the bias

    // 3. dv += P^T dout, dk += dS^T q (scaled at the end)
    const Operands<T> x = operands<E>(b, qm, dm, q, dout, q0, nq, h, need_ds, ds);
    const bool careful =
        !strips.plain && !(finite_rows<E>(x.q, nq, h.d) && finite_rows<E>(x.dout, nq, h.d_v) &&
                           finite_rows<E>(x.k, b.nk, h.d));
    if (h.dv.data) {
      if (careful)
        careful_accumulate<E>(b, x.p, nq, true, x.dout, h.d_v, b.dv, b.ld_v);
      else
        accumulate_keys<E>(b, strips, x.p, nq, x.dout, h.d_v, b.dv, b.ld_v);
    }
    if (h.dk.data) {
      if (careful)
        careful_accumulate<E>(b, x.ds, nq, true, x.q, h.d, b.dk, b.ld);
      else
        accumulate_keys<E>(b, strips, x.ds, nq, x.q, h.d, b.dk, b.ld);
    }

    // 4. dq += dS k (k is scaled), dbias += dS
    wait(h, dq_turn);
    if (h.dq.data) {
      T* dq = reinterpret_cast<T*>(h.dq.data + g * h.dq_head + q0 * h.dq.row);
      const index_t dq_row = h.dq.row / index_t(sizeof(T));
      if (careful)
        careful_accumulate<E>(b, x.ds_rows, nq, false, x.k, h.d, dq, dq_row);
      else
        accumulate_queries<E>(b, strips, x.ds_rows, x.k, nq, h.d, dq, dq_row);
    }
    if (h.dbias.data && bias_per_key) {
      accumulate_bias<T>(b, strips, {reinterpret_cast<char*>(b.dbias), 0, index_t(sizeof(T))}, nq);
    } else if (h.dbias.data) {
      wait(h, bias_turn);
      accumulate_bias<T>(b, strips,
                         {h.dbias.data + g * h.dbias_head + q0 * h.dbias.row + b.k0 * h.dbias.col,
                          h.dbias.row, h.dbias.col},
                         nq);
    }
  }
  pass_on(h, dq_turn);
  if (!bias_per_key) pass_on(h, bias_turn);
}

// A bias broadcast over queries gathers its gradient in scratch first, one sum a key; it joins
// dbias after the last query.
template <class T>
FA_NOINLINE void finish_bias(const BackwardHead& h, const BackwardBlock<T>& b, index_t g) {
  const Turn turn = turn_at(h.bias_turns, g, 0);
  wait(h, turn);
  for (index_t k = 0; k < b.nk; k++)
    *reinterpret_cast<T*>(h.dbias.data + g * h.dbias_head + (b.k0 + k) * h.dbias.col) += b.dbias[k];
  pass_on(h, turn);
  __builtin_memset(b.dbias, 0, BACK_KEYS * sizeof(T));
}

template <class E> FA_ENTRY size_t backward_scratch(const BackwardHead& h) {
  using T = Compute<E>;
  const index_t ld = round_up<T>(h.d), ld_v = round_up<T>(h.d_v);
  const index_t elements = BACK_KEYS * (h.d + h.d_v) + 2 * BACK_KEYS * ld + BACK_KEYS * ld_v +
                           BACK_QUERIES * (ld + ld_v) + 5 * BACK_QUERIES * BACK_KEYS + BACK_KEYS;
  const index_t in_words =
      PAIRS<E> ? BACK_KEYS / 2 * ld + BACK_QUERIES / 2 * (3 * BACK_KEYS + ld + ld_v) : 0;
  return size_t(elements + in_words) * sizeof(T) + 24 * 64;
}

template <class E> FA_ENTRY void backward(const BackwardHead& h, index_t key_block, void* scratch) {
  using T = Compute<E>;
  char* free = static_cast<char*>(scratch);
  BackwardBlock<T> b;
  b.k0 = key_block * BACK_KEYS;
  b.nk = min_index(BACK_KEYS, h.sk - b.k0);
  b.nk_padded = round_up<T>(b.nk);
  b.ld = round_up<T>(h.d);
  b.ld_v = round_up<T>(h.d_v);
  b.kt = carve<T>(free, h.d * BACK_KEYS);
  b.vt = carve<T>(free, h.d_v * BACK_KEYS);
  b.p = carve<T>(free, BACK_QUERIES * BACK_KEYS);
  b.ds = carve<T>(free, BACK_QUERIES * BACK_KEYS);
  b.dense = carve<T>(free, BACK_QUERIES * BACK_KEYS);
  b.bent = h.rules.softcap > 0 ? carve<T>(free, BACK_QUERIES * BACK_KEYS) : nullptr;
  b.keep = h.rules.dropout.threshold ? carve<T>(free, BACK_QUERIES * BACK_KEYS) : nullptr;
  b.k = carve<T>(free, BACK_KEYS * b.ld);
  b.dk = carve<T>(free, BACK_KEYS * b.ld);
  b.dv = carve<T>(free, BACK_KEYS * b.ld_v);
  b.dbias = carve<T>(free, BACK_KEYS);
  const Factors factors = logit_factors<T>(h.scale, h.rules);
  b.factor = T(factors.before);
  // An extraordinary scale goes on q and k alike: neither S nor dk then holds sums too small for a
  // number.
  const bool split = !PAIRS<E> && factors.after != 1;
  b.q_factor = split ? b.factor : T(1);
  b.after = T(factors.after / double(b.q_factor));
  const bool q_in_place = !split && is_ready<E>(h.q, h.d) && (PAIRS<E> || h.d % W<T> == 0);
  const bool dout_in_place = is_ready<E>(h.dout, h.d_v) && (PAIRS<E> || h.d_v % W<T> == 0);
  b.q_copy = carve<T>(free, q_in_place ? 0 : BACK_QUERIES * b.ld);
  b.dout_copy = carve<T>(free, dout_in_place ? 0 : BACK_QUERIES * b.ld_v);

  if constexpr (PAIRS<E>) {
    b.p_words = carve<T>(free, BACK_QUERIES / 2 * BACK_KEYS);
    b.ds_words = carve<T>(free, BACK_QUERIES / 2 * BACK_KEYS);
    b.ds_rows = carve<T>(free, BACK_QUERIES * BACK_KEYS / 2);
    b.k_words = carve<T>(free, BACK_KEYS / 2 * b.ld);
    b.q_words = carve<T>(free, BACK_QUERIES / 2 * b.ld);
    b.dout_words = carve<T>(free, BACK_QUERIES / 2 * b.ld_v);
    pack_words(h.k, b.k0, b.nk, h.d, b.kt, BACK_KEYS);
    pack_words(h.v, b.k0, b.nk, h.d_v, b.vt, BACK_KEYS);
    interleave_rows(h.k, b.k0, b.nk, h.d, b.k_words, b.ld);
  } else {
    pack_transposed<E>(h.k, b.k0, b.nk, h.d, b.factor, b.kt, BACK_KEYS);
    pack_transposed<E>(h.v, b.k0, b.nk, h.d_v, T(1), b.vt, BACK_KEYS);
    copy_rows<E>(h.k, b.k0, b.nk, h.d, T(h.k_scale), b.k, b.ld);
  }
  __builtin_memset(b.dk, 0, size_t(BACK_KEYS * b.ld) * sizeof(T));
  __builtin_memset(b.dv, 0, size_t(BACK_KEYS * b.ld_v) * sizeof(T));
  __builtin_memset(b.dbias, 0, BACK_KEYS * sizeof(T));

  for (index_t g = 0; g < h.group; g++) {
    for (index_t q0 = 0; q0 < h.sq; q0 += BACK_QUERIES)
      backward_tile<E>(h, b, g, q0, min_index(BACK_QUERIES, h.sq - q0), q_in_place, dout_in_place);
    if (h.dbias.data && h.dbias.row == 0) finish_bias<T>(h, b, g);
  }

  const T dk_scale = PAIRS<E> ? T(1) : T(h.scale / double(b.q_factor));  // pairs: dS was scaled
  if (h.dk.data) store_rows<E>(b.dk, b.ld, dk_scale, h.dk, b.k0, b.nk, h.d);
  if (h.dv.data) store_rows<E>(b.dv, b.ld_v, T(h.rules.dropout.scale), h.dv, b.k0, b.nk, h.d_v);
}

}  // namespace
}  // namespace fusedattn
