// Interval rules: which keys [low, high) a query sees by causal mask, window, lengths and segments.
// What a boolean mask hides is cover.h's, what is added to logits logits.h's.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

// Keys of a mask or bias that are fetched ahead: a block of forward's.
inline constexpr index_t DENSE_AHEAD = 128;

// The one place where interval rules become keys. Query i may see keys [low, high), empty if low >=
// high.
FA_INLINE Interval visible_keys(const Rules& rules, index_t i) {
  if (i >= rules.q_length) return {0, 0};
  const index_t p = i + rules.q_offset;
  Interval keys{max_index(0, p - rules.left),
                max_index(0, min_index(rules.kv_length, p + rules.right + 1))};
  if (rules.segments.keys) {
    const Interval own = rules.segments.keys[i];
    keys = {max_index(keys.low, own.low), min_index(keys.high, own.high)};
  }
  return keys;
}

// Over a range of queries: keys that some query sees lie in `any`, keys that every query sees are
// `all`.
struct Span {
  Interval any, all;
};
FA_INLINE Span visible_span(const Rules& rules, index_t begin, index_t end, index_t sk) {
  Span s{{sk, 0}, {0, sk}};
  if (begin < end && end <= rules.q_length && !rules.segments.keys) {
    // Both ends of the intervals ascend: the first and the last tell all if neither is empty.
    const Interval first = visible_keys(rules, begin), last = visible_keys(rules, end - 1);
    if (first.low < first.high && last.low < last.high)
      return {{min_index(first.low, sk), last.high}, {last.low, min_index(first.high, sk)}};
  }
  for (index_t i = begin; i < end; i++) {
    const Interval v = visible_keys(rules, i);
    if (v.low < v.high) {
      if (v.low < s.any.low) s.any.low = v.low;
      if (v.high > s.any.high) s.any.high = v.high;
    }
    if (v.low > s.all.low) s.all.low = v.low;
    if (v.high < s.all.high) s.all.high = v.high;
  }
  return s;
}

// Keys that some query of each block of QUERIES sees.
template <index_t QUERIES>
FA_ENTRY void visible_blocks(const Rules& rules, index_t sq, index_t sk, Interval* blocks) {
  for (index_t q = 0; q < sq; q += QUERIES)
    *blocks++ = visible_span(rules, q, min_index(q + QUERIES, sq), sk).any;
}

}  // namespace
}  // namespace fusedattn
