// Rows of a few queries, whichever way they are multiplied: rules, softmax, results.
#pragma once

#include "kernel/attention/finish.h"
#include "kernel/rules/logits.h"
#include "kernel/vector/tanh.h"

namespace fusedattn {
namespace {

// One query and its running softmax in log2 units.
template <class T> struct Row {
  const ForwardHead* head;
  index_t query;
  Interval keys;
  T* q;                        // (d) scaled, or words
  T* o;                        // (d_v) sum of P V
  T* p;                        // (KEY_BLOCK) logits, then P (in words of two keys)
  T* dense;                    // (KEY_BLOCK) what mask and bias add
  T max, sum, total, rescale;  // total: the sum of what P is rounded to
  bool seen, has_dense;
};
// The rows of `group` heads that share keys; place(row, its number) gives each its memory and
// operands. Returns where keys lie that some row sees, and how many rows there are.
template <class T, class F>
FA_INLINE Interval begin_rows(const ForwardHead* heads, index_t group, Row<T>* rows, int& count,
                              F&& place) {
  Interval any{heads[0].sk, 0};
  count = 0;
  for (index_t g = 0; g < group; g++)
    for (index_t i = 0; i < heads[g].sq; i++, count++) {
      Row<T>& x = rows[count];
      x = {};
      x.head = heads + g;
      x.query = i;
      x.keys = visible_keys(heads[g].rules, i);
      x.max = Bits<T>::lowest;
      x.rescale = 1;
      place(x, count);
      if (x.keys.low >= x.keys.high) continue;
      any = {min_index(any.low, x.keys.low), max_index(any.high, x.keys.high)};
    }
  return any;
}

#if defined(__AVX512BF16__)
// Rounds P to words of two keys, n in all, and sums up what it is rounded to, like
// exponentials_in_pairs.
FA_NOINLINE float few_round(float* p, index_t n) {
  for (index_t i = 0; i < n; i += 2 * W<float>)
    store(p + i / 2,
          rounded(load(p + i), i + W<float> < n ? load(p + i + W<float>) : Vec<float>{}));
  Vec<float> total{};
  for (index_t w = 0; w < words<BFloat>(n); w++)
    total = multiply_add<BFloat>(splat_operand<BFloat>(p + w), ones_words(), total);
  return total[0];
}
#endif

// Softcap, masks and bias: the logits of one row and keys [k0, k0 + n), -inf up to a multiple of W.
template <class E, class T = Compute<E>>
FA_NOINLINE void few_rules(Row<T>& x, index_t k0, index_t n) {
  const Rules& rules = x.head->rules;
  const bool ragged = x.keys.low > k0 || x.keys.high < k0 + n;
  const index_t padded = round_up<T>(n);
  const T after = T(logit_factors<T>(x.head->scale, rules).after);
  for (index_t i = 0; after != 1 && i < padded; i += W<T>)
    store(x.p + i, load(x.p + i) * splat(after));
  if (rules.softcap > 0)
    for (index_t i = 0; i < padded; i += W<T>)
      store(x.p + i, Softcap<T>(rules).bent(tanh<T>(load(x.p + i))));
  x.has_dense = has_dense(rules, rules.mask.data != nullptr) || ragged;
  if (x.has_dense) {
    dense_rows<E>(rules, rules.mask.data != nullptr, ragged, x.query, x.query + 1, k0, n, x.dense,
                  0);
    const Vec<T> minus_inf = splat(-Bits<T>::infinity);
    IntVec<T> seen{};
    for (index_t i = 0; i < padded; i += W<T>) {
      const Vec<T> add = load(x.dense + i);
      seen |= (IntVec<T>)(add != minus_inf);
      store(x.p + i, add == minus_inf ? minus_inf : load(x.p + i) + add);
    }
    for (int i = 0; i < W<T>; i++) x.seen |= seen[i] != 0;
  } else {
    x.seen = true;
  }
  for (index_t i = n; i < padded; i++) x.p[i] = -Bits<T>::infinity;
}
// The largest of n logits, a multiple of W, and x.max.
template <class T> FA_INLINE T few_max(const Row<T>& x, const T* p, index_t n) {
  Vec<T> top = splat(x.max);
  for (index_t i = 0; i < n; i += W<T>) top = max_or_second<T>(load(p + i), top);
  T max = top[0];
  for (int i = 1; i < W<T>; i++) max = top[i] > max ? top[i] : max;
  return max;
}

// Rules, maximum, P = exp2(S - max), sum.
template <class E, class T = Compute<E>>
FA_NOINLINE void few_softmax(Row<T>& x, index_t k0, index_t n) {
  few_rules<E>(x, k0, n);
  const index_t padded = round_up<T>(n);
  const T max = few_max(x, x.p, padded);
  const Vec<T> rescale = exp2<T>(splat(x.max) - splat(max));
  for (index_t i = 0; i < padded; i += W<T>) store(x.p + i, exp2<T>(load(x.p + i) - splat(max)));
  T sum = 0;
  for (index_t i = 0; i < n; i++) sum += x.p[i];
  x.sum = fma<T>(splat(x.sum), rescale, splat(sum))[0];
  x.max = max;
  x.rescale = rescale[0];
  if constexpr (PAIRS<E>)
    x.total = fma<T>(splat(x.total), rescale, splat(few_round(x.p, n)))[0];
  else
    x.total = x.sum;
}

// Outputs and log-sum-exps of all rows, whose sums are `ld` elements apart. A row to a lane.
template <class E, class T = Compute<E>>
FA_NOINLINE void finish_few(const Row<T>* rows, int count, index_t ld) {
  constexpr int most = 16;
  alignas(64) T max[most] = {}, sum[most] = {}, total[most] = {}, seen[most] = {}, sink[most] = {},
                factor[most], lse[most];
  for (int r = 0; r < count; r++) {
    const Row<T>& x = rows[r];
    max[r] = x.max, sum[r] = x.sum, total[r] = x.total, seen[r] = T(x.seen);
    sink[r] = T(x.head->rules.sink * LOG2E);
  }
  for (int r = 0; r < count; r += W<T>) {
    const Finished<T> f = finished<T>(load(max + r), load(sum + r), load(total + r), load(seen + r),
                                      load(sink + r), T(rows[0].head->rules.dropout.scale));
    store(factor + r, f.factor);
    store(lse + r, f.lse);
  }
  for (int r = 0; r < count; r++) {
    const ForwardHead& h = *rows[r].head;
    store_rows<E>(rows[r].o, ld, factor[r], h.out, rows[r].query, 1, h.d_v);
    static_cast<T*>(h.lse)[rows[r].query] = lse[r];
  }
}

}  // namespace
}  // namespace fusedattn
