// The steps of the backward pass over one block of queries and one of keys: P and dS, then the
// products that add them up.
#pragma once

#include "kernel/attention/backward_pairs.h"
#include "kernel/attention/pair_gradients.h"
#include "kernel/rules/logits.h"
#include "kernel/vector/tanh.h"
#include "kernel/vector/tile.h"

namespace fusedattn {
namespace {

// P and dS of one register tile, or, where rules change them, S and dP in their places.
template <class E, int NI, int NJ, bool PLAIN, class T = Compute<E>>
FA_INLINE void probability_tile(const BackwardBlock<T>& b, Rows<T> q, Rows<T> dout, index_t i0,
                                index_t key, index_t d, index_t d_v, const T* lse2, const T* delta,
                                bool need_ds) {
  T *p = b.p + i0 * BACK_KEYS + key, *ds = b.ds + i0 * BACK_KEYS + key;
  Vec<T> acc[NI][NJ] = {};
  multiply_tile<E, NI, NJ>(acc, q.data + i0 * q.ld, q.ld, 1, b.kt + key, BACK_KEYS, d);
  FA_UNROLL
  for (int i = 0; i < NI; i++) {
    const Vec<T> l = splat(lse2[i0 + i]);
    FA_UNROLL
    for (int j = 0; j < NJ; j++) {
      const Vec<T> s = PAIRS<E> ? acc[i][j] * splat(b.factor) : acc[i][j];
      store(p + i * BACK_KEYS + j * W<T>, PLAIN ? probability<T>(s, l) : s);
      acc[i][j] = Vec<T>{};
    }
  }
  if (!need_ds) return;
  multiply_tile<E, NI, NJ>(acc, dout.data + i0 * dout.ld, dout.ld, 1, b.vt + key, BACK_KEYS, d_v);
  FA_UNROLL
  for (int i = 0; i < NI; i++) {
    const Vec<T> dl = splat(delta[i0 + i]);
    FA_UNROLL
    for (int j = 0; j < NJ; j++) {
      const Vec<T> dp = acc[i][j];
      store(ds + i * BACK_KEYS + j * W<T>,
            PLAIN ? load(p + i * BACK_KEYS + j * W<T>) * (dp - dl) : dp);
    }
  }
}

// P and dS from S and dP by every rule, for queries [begin, end) of the block and keys of `keys`.
template <class T>
FA_NOINLINE void rule_probabilities(const BackwardBlock<T>& b, const Rules& rules, index_t begin,
                                    index_t end, Interval keys, const T* lse2, const T* delta,
                                    bool need_ds) {
  const Softcap<T> softcap(rules);
  const Vec<T> zero{}, kept = splat(T(rules.dropout.scale)), after = splat(b.after);
  for (index_t i = begin; i < end; i++) {
    const Vec<T> l = splat(lse2[i]), dl = splat(delta[i]);
    for (index_t at = i * BACK_KEYS + keys.low; at < i * BACK_KEYS + keys.high; at += W<T>) {
      const Vec<T> add = load(b.dense + at);
      const IntVec<T> masked = add == splat(-Bits<T>::infinity);
      Vec<T> s = load(b.p + at) * after, bent{};
      if (b.bent) {
        bent = tanh<T>(s);
        s = softcap.bent(bent);
      }
      const PairGradients<T> x = pair_gradients<T>(
          s + add, l, load(b.ds + at), dl, b.bent, bent, b.keep ? b.keep + at : nullptr, kept,
          [&](Vec<T> y) FA_LAMBDA { return masked ? zero : y; });
      store(b.p + at, x.p);
      if (!need_ds) continue;
      store(b.ds + at, x.ds);
      if (b.bent) store(b.bent + at, x.by_product);
    }
  }
}
// Lower than the other products' tiles: the exponentials want registers of their own.
template <int NJ>
inline constexpr int PROBABILITY_ROWS = tile_rows<NJ> < 16 / NJ ? tile_rows<NJ> : 16 / NJ;

template <class E, int NJ, bool PLAIN, class T = Compute<E>>
FA_NOINLINE void probability_columns(const BackwardBlock<T>& b, Rows<T> q, Rows<T> dout,
                                     index_t begin, index_t end, index_t key, index_t d,
                                     index_t d_v, const T* lse2, const T* delta, bool need_ds) {
  in_tiles<PROBABILITY_ROWS<NJ>>(end - begin, [&]<int NI>(index_t i) FA_LAMBDA {
    probability_tile<E, NI, NJ, PLAIN>(b, q, dout, begin + i, key, d, d_v, lse2, delta, need_ds);
  });
}

// P and dS for queries [begin, end) of the block and keys [keys.low, keys.high), both multiples of
// W.
template <class E, bool PLAIN, class T = Compute<E>>
FA_INLINE void recompute(const BackwardBlock<T>& b, Rows<T> q, Rows<T> dout, index_t begin,
                         index_t end, Interval keys, index_t d, index_t d_v, const T* lse2,
                         const T* delta, bool need_ds) {
  for (index_t key = keys.low; key < keys.high;) {
    const int nj = next_group((keys.high - key) / W<T>);
    with_count<MAX_NJ>(nj, [&]<int NJ>() FA_LAMBDA {
      probability_columns<E, NJ, PLAIN>(b, q, dout, begin, end, key, d, d_v, lse2, delta, need_ds);
    });
    key += nj * W<T>;
  }
}

// P and dS of a block of nq queries, wherever the strips look, by every rule.
template <class E, class T = Compute<E>>
FA_INLINE void probabilities_by_rules(const BackwardBlock<T>& b, const Rules& rules,
                                      const Strips& strips, Rows<T> q, Rows<T> dout, index_t nq,
                                      index_t d, index_t d_v, const T* lse2, const T* delta,
                                      bool need_ds) {
  const Interval all{0, b.nk_padded};
  if (strips.plain) return recompute<E, true>(b, q, dout, 0, nq, all, d, d_v, lse2, delta, need_ds);
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
  if (strips.whole) recompute<E, false>(b, q, dout, 0, nq, all, d, d_v, lse2, delta, need_ds);
  for (int s = 0; s < strips.count; s++)
    rule_probabilities<T>(b, rules, s * STRIP, min_index(s * STRIP + STRIP, nq), strips.keys[s],
                          lse2, delta, need_ds);
}

// c (keys x n) += a^T rows if by_key, else c (queries x n) += a rows, leaving out the (query, key)
// pairs that are masked: for blocks in which something that is not finite lies where it must not
// reach. The same sums in the same order as accumulate.
template <class E, class T = Compute<E>>
FA_NOINLINE void careful_accumulate(const BackwardBlock<T>& b, const T* a, index_t nq, bool by_key,
                                    Rows<T> rows, index_t n, T* c, index_t c_row) {
  if constexpr (PAIRS<E>) return careful_accumulate_words(b, a, nq, by_key, rows, n, c, c_row);
  const index_t outer = by_key ? b.nk : nq, inner = by_key ? nq : b.nk;
  for (index_t i = 0; i < outer; i++)
    for (index_t x = 0; x < n; x += W<T>) {
      const int width = int(min_index(W<T>, n - x));
      Vec<T> acc{};
      for (index_t p = 0; p < inner; p++) {
        const index_t at = by_key ? p * BACK_KEYS + i : i * BACK_KEYS + p;
        if (b.dense[at] == -Bits<T>::infinity) continue;
        acc = fma<T>(splat(a[at]), load_n(rows.data + p * rows.ld + x, width), acc);
      }
      T* to = c + i * c_row + x;
      store_n(to, load_n(to, width) + acc, width);
    }
}

// c (keys x n) += a^T rows, where a (queries x keys) is P or dS. Pairs: words of two queries.
template <class E, class T = Compute<E>>
FA_INLINE void accumulate_keys(const BackwardBlock<T>& b, const Strips& strips, const T* a,
                               index_t nq, Rows<T> rows, index_t n, T* c, index_t c_row) {
  constexpr index_t each = PAIRS<E> ? 2 : 1;
  if (strips.whole)
    return accumulate<E, true>(b.nk, n, words<E>(nq), a, BACK_KEYS, rows.data, rows.ld, c, c_row);
  for (index_t key = 0; key < b.nk;
       key += STRIP) {  // the strips that look at these keys, from the first to the last
    const index_t end = min_index(key + STRIP, b.nk);
    int first = strips.count, last = -1;
    for (int s = 0; s < strips.count; s++)
      if (strips.keys[s].low < end && strips.keys[s].high > key)
        first = s < first ? s : first, last = s;
    if (last < first) continue;
    const index_t q = first * STRIP, q_end = min_index((last + 1) * STRIP, nq);
    accumulate<E, true>(end - key, n, words<E>(q_end - q), a + q / each * BACK_KEYS + key,
                        BACK_KEYS, rows.data + q / each * rows.ld, rows.ld, c + key * c_row, c_row);
  }
}

// c (queries x n) += dS K. Pairs: words of two keys.
template <class E, class T = Compute<E>>
FA_INLINE void accumulate_queries(const BackwardBlock<T>& b, const Strips& strips, const T* ds,
                                  Rows<T> k, index_t nq, index_t n, T* c, index_t c_row) {
  constexpr index_t each = PAIRS<E> ? 2 : 1, row = BACK_KEYS / each;
  if (strips.whole)
    return accumulate<E, false>(nq, n, words<E>(b.nk), ds, row, k.data, k.ld, c, c_row);
  for (int s = 0; s < strips.count; s++) {
    const Interval keys{strips.keys[s].low, min_index(strips.keys[s].high, b.nk)};
    if (keys.low >= keys.high) continue;
    const index_t q = s * STRIP;
    accumulate<E, false>(min_index(STRIP, nq - q), n, words<E>(keys.high - keys.low),
                         ds + q * row + keys.low / each, row, k.data + keys.low / each * k.ld, k.ld,
                         c + q * c_row, c_row);
  }
}

// dbias += dS over a tile, at `to`.
template <class T>
FA_NOINLINE void accumulate_bias(const BackwardBlock<T>& b, const Strips& strips, const Matrix& to,
                                 index_t nq) {
  for (index_t q = 0; q < nq; q++)
    for (index_t k = 0; k < b.nk; k++) {
      if (!strips.plain && b.dense[q * BACK_KEYS + k] == -Bits<T>::infinity) continue;
      *reinterpret_cast<T*>(to.data + q * to.row + k * to.col) += b.ds[q * BACK_KEYS + k];
    }
}

}  // namespace
}  // namespace fusedattn
