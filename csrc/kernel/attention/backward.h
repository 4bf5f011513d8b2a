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
// land in natural layout. Five products of BACK_KEYS * BACK_QUERIES * d for 2 *
// BACK_KEYS * d packed elements and 4 * BACK_KEYS * BACK_QUERIES stored and re-read ones. Every
// element of a gradient is the sum of one chain a block, blocks of queries (dk, dv) or keys (dq)
// ascending: its bits depend neither on the tiles nor on the number of threads.
#pragma once

#include "kernel/attention/backward_loop.h"
#include "kernel/attention/backward_steps.h"
#include "kernel/attention/operands.h"
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
    const Cover cover = cover_of(rules, q0, nq, b.k0, b.nk);
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

// The engine of backward_over_queries on multiply-adds, and its scratch.
template <class E> struct MultiplyAddBackward : BackwardBlock<Compute<E>> {
  using T = Compute<E>;
  using Block = BackwardBlock<T>;
  static constexpr index_t QUERIES = BACK_QUERIES;

  const BackwardHead& h;
  const bool need_ds, q_in_place, dout_in_place;
  // Of the block of queries at hand
  Strips strips{};
  Operands<T> x{};
  bool careful = false;

  FA_INLINE_MEMBER MultiplyAddBackward(const BackwardHead& head, index_t key_block, Layout& scratch)
      : h(head),
        need_ds(head.dq.data || head.dk.data || head.dbias.data),
        q_in_place(!splits(head) && is_ready<E>(head.q, head.d) &&
                   (PAIRS<E> || head.d % W<T> == 0)),
        dout_in_place(is_ready<E>(head.dout, head.d_v) && (PAIRS<E> || head.d_v % W<T> == 0)) {
    constexpr index_t pairs = BACK_QUERIES * BACK_KEYS;
    Block& b = *this;
    b.k0 = key_block * BACK_KEYS;
    b.nk = min_index(BACK_KEYS, h.sk - b.k0);
    b.nk_padded = round_up<T>(b.nk);
    b.ld = round_up<T>(h.d);
    b.ld_v = round_up<T>(h.d_v);
    const Factors factors = logit_factors<T>(h.scale, h.rules);
    b.factor = T(factors.before);
    b.q_factor = splits(h) ? b.factor : T(1);
    b.after = T(factors.after / double(b.q_factor));
    b.kt = scratch.take<T>(h.d * BACK_KEYS);
    b.vt = scratch.take<T>(h.d_v * BACK_KEYS);
    b.p = scratch.take<T>(pairs);
    b.ds = scratch.take<T>(pairs);
    b.dense = scratch.take<T>(pairs);
    b.bent = h.rules.softcap > 0 ? scratch.take<T>(pairs) : nullptr;
    b.keep = h.rules.dropout.threshold ? scratch.take<T>(pairs) : nullptr;
    b.k = scratch.take<T>(BACK_KEYS * b.ld);
    b.dk = scratch.take<T>(BACK_KEYS * b.ld);
    b.dv = scratch.take<T>(BACK_KEYS * b.ld_v);
    b.dbias = scratch.take<T>(BACK_KEYS);
    b.q_copy = scratch.take<T>(q_in_place ? 0 : BACK_QUERIES * b.ld);
    b.dout_copy = scratch.take<T>(dout_in_place ? 0 : BACK_QUERIES * b.ld_v);
    if constexpr (PAIRS<E>) {
      b.p_words = scratch.take<T>(pairs / 2);
      b.ds_words = scratch.take<T>(pairs / 2);
      b.ds_rows = scratch.take<T>(pairs / 2);
      b.k_words = scratch.take<T>(BACK_KEYS / 2 * b.ld);
      b.q_words = scratch.take<T>(BACK_QUERIES / 2 * b.ld);
      b.dout_words = scratch.take<T>(BACK_QUERIES / 2 * b.ld_v);
    }
  }
  // An extraordinary scale goes on q and k alike: neither S nor dk then holds sums too small for a
  // number.
  FA_INLINE_MEMBER static bool splits(const BackwardHead& h) {
    return !PAIRS<E> && logit_factors<T>(h.scale, h.rules).after != 1;
  }

  // The keys become operands, and nothing is summed up yet.
  FA_INLINE_MEMBER void take_keys() {
    Block& b = *this;
    if constexpr (PAIRS<E>) {
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
  }
  FA_INLINE_MEMBER bool begin(const QueryBlock& block) {
    const Block& b = *this;
    const index_t q0 = block.q0, nq = block.nq;
    if (!prepare_strips<E>(block.rules, b, q0, nq, strips)) return false;
    const Rows<T> q = query_rows<E>(block.q, q0, nq, h.d, b.q_copy, b.ld, q_in_place, b.q_factor),
                  dout =
                      query_rows<E>(block.dout, q0, nq, h.d_v, b.dout_copy, b.ld_v, dout_in_place);
    probabilities_by_rules<E>(b, block.rules, strips, q, dout, nq, words<E>(h.d), words<E>(h.d_v),
                              reinterpret_cast<const T*>(block.lse2),
                              reinterpret_cast<const T*>(block.delta), need_ds);
    // dv += P^T dout, dk += dS^T q (scaled at the end)
    const T* by_product = b.bent ? b.bent : b.ds;  // by scale * q k^T; b.ds is by the bias
    x = operands<E>(b, block.q, block.dout, q, dout, q0, nq, h, need_ds, by_product);
    careful =
        !strips.plain && !(finite_rows<E>(x.q, nq, h.d) && finite_rows<E>(x.dout, nq, h.d_v) &&
                           finite_rows<E>(x.k, b.nk, h.d));
    if (h.dv.data) add_to_keys(x.p, nq, x.dout, h.d_v, b.dv, b.ld_v);
    if (h.dk.data) add_to_keys(x.ds, nq, x.q, h.d, b.dk, b.ld);
    return true;
  }
  FA_INLINE_MEMBER void add_to_keys(const T* a, index_t nq, Rows<T> rows, index_t n, T* c,
                                    index_t c_row) {
    if (careful)
      careful_accumulate<E>(*this, a, nq, true, rows, n, c, c_row);
    else
      accumulate_keys<E>(*this, strips, a, nq, rows, n, c, c_row);
  }
  FA_INLINE_MEMBER void add_dq(const QueryBlock& block) {  // dq += dS k (k is scaled)
    T* dq = reinterpret_cast<T*>(h.dq.data + block.g * h.dq_head + block.q0 * h.dq.row);
    const index_t dq_row = h.dq.row / index_t(sizeof(T));
    if (careful)
      careful_accumulate<E>(*this, x.ds_rows, block.nq, false, x.k, h.d, dq, dq_row);
    else
      accumulate_queries<E>(*this, strips, x.ds_rows, x.k, block.nq, h.d, dq, dq_row);
  }
  FA_INLINE_MEMBER void add_dbias(const Matrix& to, index_t nq) {
    accumulate_bias<T>(*this, strips, to, nq);
  }
  FA_INLINE_MEMBER void end() {
    const Block& b = *this;
    const T dk_scale = PAIRS<E> ? T(1) : T(h.scale / double(b.q_factor));  // pairs: dS was scaled
    if (h.dk.data) store_rows<E>(b.dk, b.ld, dk_scale, h.dk, b.k0, b.nk, h.d);
    if (h.dv.data) store_rows<E>(b.dv, b.ld_v, T(h.rules.dropout.scale), h.dv, b.k0, b.nk, h.d_v);
  }
};

template <class E> FA_ENTRY size_t backward_scratch(const BackwardHead& h) {
  Layout measure(nullptr);
  MultiplyAddBackward<E>(h, 0, measure);
  return measure.bytes();
}
template <class E> FA_ENTRY void backward(const BackwardHead& h, index_t key_block, void* scratch) {
  Layout layout(scratch);
  MultiplyAddBackward<E> engine(h, key_block, layout);
  engine.take_keys();
  backward_over_queries(engine, h);
  engine.end();
}

}  // namespace
}  // namespace fusedattn
