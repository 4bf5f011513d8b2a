// What the dense part does to scores: made in registers and added there, or added from a tile that
// was made before.
#pragma once

#include "kernel/attention/dense_queries.h"

namespace fusedattn {
namespace {

// S += dense, -inf where dense is -inf whatever S was; the maximum over keys joins max_io.
template <class T> struct Adding {
  static constexpr int chains = 2;  // that need not wait for each other
  Vec<T> max[chains], any[chains];

  FA_INLINE_MEMBER void load_from(const T* max_io, const T* seen) {
    for (int i = 0; i < chains; i++) max[i] = load(max_io), any[i] = load(seen);
  }
  // FINITE: no part of dense is -inf.
  template <bool FINITE = false> FA_INLINE_MEMBER void add(T* at, Vec<T> dense, int chain) {
    const Vec<T> minus_inf = splat(-Bits<T>::infinity);
    Vec<T> s = load(at) + dense, seen = splat(T(1));
    if constexpr (!FINITE) {
      s = dense == minus_inf ? minus_inf : s;
      seen = dense == minus_inf ? any[chain] : seen;
    }
    any[chain] = seen;
    max[chain] = max_or_second<T>(s, max[chain]);
    store(at, s);
  }
  FA_INLINE_MEMBER void store_to(T* max_io, T* seen) const {
    store(max_io, max_or_second<T>(max[1], max[0]));
    store(seen, max_or_second<T>(any[1], any[0]));
  }
};
template <class T, int NQ>
FA_NOINLINE void add_dense(index_t n, T* p, const Dense<T>& dense, T* max_io, T* seen) {
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    Adding<T> sums;
    sums.load_from(max_io + j * W<T>, seen + j * W<T>);
    index_t i = 0;
    for (; i + 2 <= n; i += 2) {
      sums.add(p + (i * NQ + j) * W<T>, dense_at(dense, i, j), 0);
      sums.add(p + ((i + 1) * NQ + j) * W<T>, dense_at(dense, i + 1, j), 1);
    }
    if (i < n) sums.add(p + (i * NQ + j) * W<T>, dense_at(dense, i, j), 0);
    sums.store_to(max_io + j * W<T>, seen + j * W<T>);
  }
}

// The same of a mask alone, for queries that may see all keys but those it hides: there is nothing
// to add, which saves a fifteenth of a plain call's time.
template <class E, class Driver, class T = Compute<E>>
FA_NOINLINE void apply_mask(const Rules& rules, const Queries<T>& x, index_t k0, index_t k1, T* p,
                            T* max_io) {
  using Int = typename Bits<T>::type;
  constexpr index_t at_once = FUSEDATTN_VECTOR_BYTES, size = sizeof(T);
  const index_t lanes = x.vectors * W<T>;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity);
  for (index_t r = 0; r < lanes; r += W<T>) {
    index_t query[W<T>];
    dense_queries<T>(x, r, query);
    Driver::once_a_while();
    Vec<T> max[2] = {load(max_io + r), load(max_io + r)};
    IntVec<T> any{};
    T* at = p + r;
    for (index_t key = k0; key < k1; key += at_once) {
      Vec<T> words[W<T>];
      transpose_mask<T>(rules.mask, query, key, k1, words);
      const index_t n = min_index(at_once, k1 - key);
      for (index_t j = 0; j < n; j += size) {
        const IntVec<T> word = (IntVec<T>)words[j / size];
        any |= word;  // bytes beyond the last key are 0
        FA_UNROLL
        for (int i = 0; i < int(size); i++) {
          if (j + i >= n) break;
          const Vec<T> s = (word & (Int(0xff) << (8 * i))) == 0 ? minus_inf : load(at);
          max[i % 2] = max_or_second<T>(s, max[i % 2]);
          store(at, s);
          at += lanes;
        }
      }
    }
    store(max_io + r, max_or_second<T>(max[1], max[0]));
    store(x.seen + r, any == 0 ? load(x.seen + r) : splat(T(1)));
  }
}

// The same of whatever there is, without a tile in between.
template <class E, class Driver, bool BIAS_ALONE, class T = Compute<E>>
FA_NOINLINE void make_and_add(const Rules& rules, const Queries<T>& x, bool use_mask, bool ragged,
                              index_t k0, index_t k1, T* p, T* max_io) {
  const index_t lanes = x.vectors * W<T>;
  for_dense<E, Driver, BIAS_ALONE>(rules, x, use_mask, ragged, k0, k1,
                                   [&](index_t r, index_t c, const Vec<T>(&t)[W<T>], bool finite)
                                       FA_LAMBDA {
                                         Adding<T> sums;
                                         sums.load_from(max_io + r, x.seen + r);
                                         T* const at = p + c * lanes + r;
                                         if (finite) {
                                           FA_UNROLL
                                           for (int j = 0; j < W<T>; j++)
                                             sums.template add<true>(at + j * lanes, t[j], j % 2);
                                         } else {
                                           FA_UNROLL
                                           for (int j = 0; j < W<T>; j++)
                                             if (c + j < k1 - k0)
                                               sums.add(at + j * lanes, t[j], j % 2);
                                         }
                                         sums.store_to(max_io + r, x.seen + r);
                                       });
}
template <class E, class Driver = ByMultiplyAdds, class T = Compute<E>>
FA_INLINE void make_and_add_dense(const Rules& rules, const Queries<T>& x, bool use_mask,
                                  bool ragged, index_t k0, index_t k1, T* p, T* max_io) {
  const bool others = ragged || adds_by_position(rules) || rules.segments.q_number;
  if (!others && !rules.bias.data) return apply_mask<E, Driver>(rules, x, k0, k1, p, max_io);
  if (!others && !use_mask && (k1 - k0) % W<T> == 0 && is_native_bias<E>(rules.bias))
    return make_and_add<E, Driver, true>(rules, x, use_mask, ragged, k0, k1, p, max_io);
  make_and_add<E, Driver, false>(rules, x, use_mask, ragged, k0, k1, p, max_io);
}
template <class T, int NQ> FA_NOINLINE void mark_masked(index_t n, T* p, const Dense<T>& dense) {
  for (index_t i = 0; i < n; i++) FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    T* at = p + (i * NQ + j) * W<T>;
    store(at, dense_at(dense, i, j) == splat(-Bits<T>::infinity) ? splat(T(-1)) : load(at));
  }
}

}  // namespace
}  // namespace fusedattn
