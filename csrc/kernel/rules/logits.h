// What rules do to logits: the factors that bring them to log2 units, and what is added to them.
// With keys in the lanes (backward, the few queries of decoding) the part that is added is made
// here; with queries in the lanes (forward) by attention/dense_queries.h.
#pragma once

#include "kernel/rules/intervals.h"
#include "kernel/vector/exp.h"
#include "kernel/vector/move.h"

namespace fusedattn {
namespace {

// What the positions of query and key alone add: ALiBi.
FA_INLINE bool adds_by_position(const Rules& rules) {
  return rules.alibi_slope != 0;
}
// Is there something to add to the logits, or to be told pair by pair?
FA_INLINE bool has_dense(const Rules& rules, bool use_mask) {
  return use_mask || rules.bias.data || adds_by_position(rules) || rules.segments.q_number;
}
// The dense part is the same for every query (a padding mask, a bias over keys).
FA_INLINE bool dense_is_per_key(const Rules& rules, bool use_mask) {
  return (!rules.bias.data || rules.bias.row == 0) && (!use_mask || rules.mask.row == 0) &&
         !adds_by_position(rules) && !rules.segments.q_number;
}

// Logits come out in log2 units, or ready for tanh: queries are multiplied by `before` on their way
// in and the products by `after`, which is 1 unless the scale is so far from 1 that queries times
// it might leave the numbers' range although the logits do not. Then `before` is a power of two
// half way from 1 to the scale. No operand whose logit is a number is taken out of range by it, and
// neither are keys that are multiplied by it too.
struct Factors {
  double before, after;
};
FA_INLINE double half_way(double size, int64_t most) {
  uint64_t bits;
  __builtin_memcpy(&bits, &size, sizeof(bits));
  const int64_t half = (int64_t(bits >> 52) - 1023) / 2;
  bits = uint64_t(1023 + max_index(min_index(half, most), -most)) << 52;
  __builtin_memcpy(&size, &bits, sizeof(bits));
  return size;
}
template <class T> FA_INLINE Factors logit_factors(double scale, const Rules& rules) {
  const bool bent = rules.softcap > 0;
  const double whole = bent ? scale / rules.softcap : scale, unit = bent ? 1 : LOG2E,
               size = whole < 0 ? -whole : whole, usual = sizeof(T) == 4 ? 0x1p20 : 0x1p400;
  if (size == 0 || (size <= usual && size >= 1 / usual)) return {whole * unit, 1};
  const double before = half_way(size, sizeof(T) == 4 ? 62 : 510);
  return {before, whole / before * unit};
}

// softcap * tanh(x) in log2 units, for logits that were divided by the softcap, given tanh(x). By x
// its slope is 1 - tanh^2.
template <class T> struct Softcap {
  Vec<T> cap;

  FA_INLINE_MEMBER explicit Softcap(const Rules& rules) : cap(splat(T(rules.softcap) * T(LOG2E))) {}
  FA_INLINE_MEMBER Vec<T> bent(Vec<T> tanh_x) const { return cap * tanh_x; }
  FA_INLINE_MEMBER static Vec<T> slope(Vec<T> tanh_x) { return splat(T(1)) - tanh_x * tanh_x; }
};

// ---- What is added to logits, times log2(e), where that is not the same for all of them ----
//
// ALiBi and bias; -inf where mask, segments or an interval forbid or the bias is -inf. A bias so
// low that its product would be -inf stays finite: where all of a row is that low, no key is
// masked.

template <class T> FA_INLINE Vec<T> add_bias(Vec<T> bias, Vec<T> x) {
  const Vec<T> sum = fma<T>(bias, splat(T(LOG2E)), x);
  return bias == splat(-Bits<T>::infinity) ? bias : max_or_second<T>(splat(Bits<T>::lowest), sum);
}
// Is none of them -inf, nor its product with log2(e)?
template <class T> FA_INLINE bool are_finite_biases(const Vec<T> (&bias)[W<T>]) {
  constexpr int chains = W<T> < 4 ? 1 : 4;
  Vec<T> least[chains] = {};
  FA_UNROLL
  for (int i = 0; i < W<T>; i++) least[i % chains] = min_or_second<T>(bias[i], least[i % chains]);
  for (int i = 1; i < chains; i++) least[0] = min_or_second<T>(least[i], least[0]);
  return !any_lane<T>(least[0] < splat(Bits<T>::lowest / 4));
}
template <class T> struct ByPosition {
  const Vec<T> slope;

  FA_INLINE_MEMBER explicit ByPosition(const Rules& rules)
      : slope(splat(T(-rules.alibi_slope * LOG2E))) {}
  FA_INLINE_MEMBER Vec<T> at(Vec<T> key, Vec<T> position) const {
    const Vec<T> ahead = key - position;
    return slope * (ahead < Vec<T>{} ? -ahead : ahead);
  }
};
// Does it stay a number for keys that are at most so far from a query?
template <class T> FA_INLINE bool is_finite_by_position(const Rules& rules, index_t apart) {
  const double slope = rules.alibi_slope < 0 ? -rules.alibi_slope : rules.alibi_slope;
  return slope * LOG2E * double(apart) < double(-Bits<T>::lowest) / 2;
}

// W elements of a row of the bias, n of which exist. FETCH: also those of the keys that come next:
// rows of a matrix in DRAM are too short for the hardware to see it coming. Of the first block,
// also what lies `then` bytes further: the next sub-block's.
template <class E, bool FETCH = true, class T = Compute<E>>
FA_INLINE Vec<T> load_bias(const char* p, index_t col, bool native, index_t n, index_t then = 0) {
  if (!native || n < W<T>) return gather_as<E>(p, col, int(min_index(n, W<T>)));
  if (FETCH) prefetch_far(p + DENSE_AHEAD * col);
  if (FETCH && then) prefetch_far(p + then);
  return load_as<E>(p);
}
template <class E> FA_INLINE bool is_native_bias(const Matrix& bias) {
  return is_native<E>({bias.data, 0, bias.col}) && bias.row % index_t(sizeof(E)) == 0;
}

// ALiBi and bias of one query and W keys.
template <class E> struct AddedToKeys {
  using T = Compute<E>;
  const Rules& rules;
  const bool slanted, biased, native;
  const ByPosition<T> position;

  // Which of them are looked for may be known at compile time.
  FA_INLINE_MEMBER explicit AddedToKeys(const Rules& r, bool may_slant = true, bool may_bias = true)
      : rules(r),
        slanted(may_slant && adds_by_position(r)),
        biased(may_bias && r.bias.data),
        native(is_native_bias<E>(r.bias)),
        position(r) {}
  // Of query q and the keys k0 + k to k0 + k + W, n of which exist. `bias`: as it is in the array.
  template <bool FETCH>
  FA_INLINE_MEMBER Vec<T> at(index_t q, index_t k0, index_t k, index_t n, Vec<T>& bias) const {
    Vec<T> x{};
    if (slanted)
      x = position.at(splat(T(k)) + lane_numbers<T>(), splat(T(q + rules.q_offset - k0)));
    if (biased) {
      const char* p = rules.bias.data + q * rules.bias.row + (k0 + k) * rules.bias.col;
      bias = load_bias<E, FETCH>(p, rules.bias.col, native, n);
      x = add_bias<T>(bias, x);
    }
    return x;
  }
};

// All that is added to queries [begin, end) and keys [k0, k0 + n): rows `ld` elements apart,
// written up to a multiple of W; -inf from n on. `ragged`: a query may see a part of the keys only.
template <class E, class T = Compute<E>>
FA_NOINLINE void dense_rows(const Rules& rules, bool use_mask, bool ragged, index_t begin,
                            index_t end, index_t k0, index_t n, T* rows, index_t ld) {
  const Matrix& mask = rules.mask;
  const AddedToKeys<E> added(rules);
  const int32_t* segment = rules.segments.q_number ? rules.segments.k_number + k0 : nullptr;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity);
  index_t low = 0, high = n;
  for (index_t q = begin; q < end; q++, rows += ld) {
    const char* m = use_mask ? mask.data + q * mask.row + k0 * mask.col : nullptr;
    if (ragged) {
      const Interval keys = visible_keys(rules, q);
      low = max_index(min_index(keys.low - k0, n), 0);
      high = max_index(min_index(keys.high - k0, n), 0);
    }
    for (index_t k = 0; k < n; k += W<T>) {
      Vec<T> bias{}, x = added.template at<true>(q, k0, k, n - k, bias);
      if (m) x = load_integers<T, uint8_t>(m + k * mask.col, mask.col, n - k) == 0 ? minus_inf : x;
      if (segment) {
        const char* at = reinterpret_cast<const char*>(segment + k);
        const IntVec<T> own = IntVec<T>{} + rules.segments.q_number[q];
        x = load_integers<T, int32_t>(at, sizeof(int32_t), n - k) == own ? x : minus_inf;
      }
      if (k < low || k + W<T> > high) {
        const Vec<T> key = splat(T(k)) + lane_numbers<T>();
        x = key >= splat(T(low)) ? x : minus_inf;
        x = key < splat(T(high)) ? x : minus_inf;
      }
      store(rows + k, x);
    }
  }
}

}  // namespace
}  // namespace fusedattn
