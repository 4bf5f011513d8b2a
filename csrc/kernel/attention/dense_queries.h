// The dense part of the logits for queries in the lanes: a bias is transposed in registers, a mask
// in words of as many keys as a number has bytes. It says once more, for queries in the lanes, what
// dense_rows (rules/logits.h) says for keys in the lanes; ALiBi and bias themselves are there.
// Called by forward_block.h, dense_scores.h and amx/forward_scores.h.
#pragma once

#include "kernel/attention/queries.h"
#include "kernel/rules/logits.h"

namespace fusedattn {
namespace {

// What a driver of forward wants of the steps that make and add the dense part. That of AMX tiles
// hands in another one.
struct ByMultiplyAdds {
  static constexpr bool fetches_bias = true;      // rows of a bias are fetched ahead here
  FA_INLINE_MEMBER static void once_a_while() {}  // called between long computations
};

// The dense part of a range of keys: dense[key][query], or one value a key (step 0).
template <class T> struct Dense {
  const T* data;  // null: none
  index_t key_step, vector_step;
};
template <class T> FA_INLINE Vec<T> dense_at(const Dense<T>& d, index_t key, int j) {
  const T* p = d.data + key * d.key_step;
  return d.vector_step ? load(p + j * d.vector_step) : splat(*p);
}

// The queries in W lanes from r on; the last one again where there are no more.
template <class T>
FA_INLINE void dense_queries(const Queries<T>& x, index_t r, index_t (&query)[W<T>]) {
  for (int i = 0; i < W<T>; i++) query[i] = x.first + min_index(r + i, x.count - 1);
}
// Their intervals of keys, counted from k0.
template <class T>
FA_NOINLINE void dense_intervals(const Rules& rules, const index_t (&query)[W<T>], index_t k0,
                                 index_t n, Vec<T>& low, Vec<T>& high) {
  alignas(64) T begin[W<T>], end[W<T>];
  for (int i = 0; i < W<T>; i++) {
    const Interval keys = visible_keys(rules, query[i]);
    begin[i] = T(max_index(min_index(keys.low - k0, n), 0));
    end[i] = T(max_index(min_index(keys.high - k0, n), 0));
  }
  low = load(begin), high = load(end);
}

// words[i]: bytes sizeof(T) * i to sizeof(T) * (i + 1) of each query's mask, from `key` on; 0 from
// `end` on.
template <class T>
FA_INLINE void transpose_mask(const Matrix& mask, const index_t (&query)[W<T>], index_t key,
                              index_t end, Vec<T> (&words)[W<T>]) {
  for (int i = 0; i < W<T>; i++) {
    const char* p = mask.data + query[i] * mask.row + key * mask.col;
    if (mask.col == 1 && key + FUSEDATTN_VECTOR_BYTES <= end) {
      prefetch_near(p + FUSEDATTN_VECTOR_BYTES);
      __builtin_memcpy(&words[i], p, FUSEDATTN_VECTOR_BYTES);  // at any alignment
    } else {
      alignas(64) char bytes[FUSEDATTN_VECTOR_BYTES] = {};
      for (index_t k = 0; k < min_index(end - key, FUSEDATTN_VECTOR_BYTES); k++)
        bytes[k] = p[k * mask.col];
      words[i] = load(reinterpret_cast<const T*>(bytes));
    }
  }
  transpose_registers<T>(words);
}

// Does what is added by position stay a number as far as these queries and keys lie apart?
template <class T>
FA_INLINE bool is_finite_apart(const Rules& rules, const Queries<T>& x, index_t k0, index_t k1) {
  const index_t position = x.first + rules.q_offset;
  return is_finite_by_position<T>(rules, max_index(position + x.count - k0, k1 - position));
}

// Calls use(r, c, t, finite) with the dense part t of keys k0 + c to k0 + c + W and queries r to
// r + W, for all keys [k0, k1) and queries of x; -inf beyond k1. `ragged`: a query may see a part
// of the keys. `finite`: nothing in t is -inf.
// BIAS_ALONE: the bias is native, n a multiple of W, and nothing else is asked for: what is known
// when this is compiled is not looked at for every vector.
template <class E, class Driver, bool BIAS_ALONE = false, class F, class T = Compute<E>>
FA_INLINE void for_dense(const Rules& rules, const Queries<T>& x, bool use_mask, bool ragged,
                         index_t k0, index_t k1, F&& use) {
  using Int = typename Bits<T>::type;
  constexpr index_t at_once = FUSEDATTN_VECTOR_BYTES, size = sizeof(T);  // keys of a mask
  const index_t n = k1 - k0, lanes = x.vectors * W<T>;
  const Matrix& bias = rules.bias;
  const int32_t* segments = BIAS_ALONE ? nullptr : rules.segments.q_number;
  if constexpr (BIAS_ALONE) ragged = use_mask = false;
  const bool biased = BIAS_ALONE || bias.data, native = BIAS_ALONE || is_native_bias<E>(bias),
             slanted = !BIAS_ALONE && adds_by_position(rules),
             all_seen = !ragged && !use_mask && !segments,
             tame = !slanted || is_finite_apart(rules, x, k0, k1);
  const index_t then = k0 < KEY_BLOCK ? lanes * bias.row : 0;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity);
  const ByPosition<T> by_position(rules);
  for (index_t r = 0; r < lanes; r += W<T>) {
    index_t query[W<T>];
    dense_queries<T>(x, r, query);
    const Vec<T> own = min_or_second<T>(splat(T(r)) + lane_numbers<T>(), splat(T(x.count - 1))),
                 position = own + splat(T(x.first + rules.q_offset - k0));
    Vec<T> low{}, high = splat(T(n));
    if (ragged) dense_intervals<T>(rules, query, k0, n, low, high);
    IntVec<T> segment{};
    for (int i = 0; i < W<T> && segments; i++) segment[i] = segments[query[i]];
    const char* row[W<T>];  // of the bias
    for (int i = 0; i < W<T>; i++) row[i] = bias.data + query[i] * bias.row + k0 * bias.col;
    Driver::once_a_while();
    Vec<T> words[W<T>];
    for (index_t c = 0; c < n; c += W<T>) {
      const Vec<T> first = splat(T(c));
      Vec<T> t[W<T>];
      bool finite = tame;  // neither a bias nor its product
      if (biased) {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++) {
          const index_t left = BIAS_ALONE ? W<T> : n - c;
          t[i] = load_bias<E, Driver::fetches_bias>(row[i], bias.col, native, left, then);
          row[i] += W<T> * bias.col;
        }
        finite &= are_finite_biases<T>(t);
        transpose_registers<T>(t);
      }
      if (slanted) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          const Vec<T> y = by_position.at(first + splat(T(j)), position);
          t[j] = biased ? add_bias<T>(t[j], y) : y;
        }
      } else if (biased && finite) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) t[j] *= splat(T(LOG2E));
      } else if (biased) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) t[j] = add_bias<T>(t[j], Vec<T>{});
      } else {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) t[j] = Vec<T>{};
      }
      if (use_mask) {
        if (c % at_once == 0) transpose_mask<T>(rules.mask, query, k0 + c, k1, words);
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          const index_t at = c % at_once + j;
          const IntVec<T> byte = (IntVec<T>)words[at / size] & (Int(0xff) << (8 * (at % size)));
          t[j] = byte == 0 ? minus_inf : t[j];
        }
      }
      if (segments)
        for (int j = 0; j < min_index(n - c, W<T>); j++)
          t[j] = segment == rules.segments.k_number[k0 + c + j] ? t[j] : minus_inf;
      if (ragged || (!BIAS_ALONE && c + W<T> > n)) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          const Vec<T> key = first + splat(T(j));
          t[j] = key >= low ? t[j] : minus_inf;
          t[j] = key < high ? t[j] : minus_inf;
        }
      }
      use(r, c, t, finite && all_seen && (BIAS_ALONE || c + W<T> <= n));
    }
  }
}

// tile[key - k0][query] for keys [k0, k1) and the queries of x.
template <class E, class Driver = ByMultiplyAdds, class T = Compute<E>>
FA_NOINLINE Dense<T> dense_tile(const Rules& rules, const Queries<T>& x, bool use_mask, bool ragged,
                                index_t k0, index_t k1, T* tile) {
  const index_t n = k1 - k0, lanes = x.vectors * W<T>;
  if (!has_dense(rules, use_mask) && !ragged) return {nullptr, 0, 0};
  if (!ragged && dense_is_per_key(rules, use_mask)) {
    dense_rows<E>(rules, use_mask, false, x.first, x.first + 1, k0, n, tile, 0);
    return {tile, 1, 0};
  }
  for_dense<E, Driver>(rules, x, use_mask, ragged, k0, k1,
                       [&](index_t r, index_t c, const Vec<T>(&t)[W<T>], bool) FA_LAMBDA {
                         FA_UNROLL
                         for (int j = 0; j < W<T>; j++)
                           if (c + j < n) store(tile + (c + j) * lanes + r, t[j]);
                       });
  return {tile, lanes, W<T>};
}

}  // namespace
}  // namespace fusedattn
