// Forward's way through queries and blocks of keys, whichever way these are multiplied: forward.h
// and amx/forward.h hand in an engine.
#pragma once

#include "kernel/attention/queries.h"
#include "kernel/rules/cover.h"

namespace fusedattn {
namespace {

// An engine has
//   widest                     vectors of queries in a sub-block at most
//   trims                      may keys that a mask hides from everybody be left out at the ends of
//                              a block?
//   subs                       room for the sub-blocks, of a type derived from Queries
//   begin(x)                   the queries of sub-block x are known: their operands and sums
//   plan(count, any)           so many sub-blocks, which see keys of `any`
//   take_keys(block, rows)     the next block of keys
//   attend(i, block, k0, k1, use_mask)   sub-block i against keys [k0, k1) of it
//   end(count)                 the results
template <class Engine>
FA_INLINE void forward_in_blocks(Engine& engine, const ForwardHead& h, index_t q_begin,
                                 index_t q_end) {
  int count = 0;
  Interval any{h.sk, 0};
  for (index_t q = q_begin; q < q_end; count++) {
    auto& x = engine.subs[count];
    x.first = q;
    choose_width(x, h, q_end, Engine::widest);
    engine.begin(x);
    any = {min_index(any.low, x.keys.any.low), max_index(any.high, x.keys.any.high)};
    q += x.count;
  }
  engine.plan(count, any);
  // Blocks start at multiples of KEY_BLOCK whatever the interval, so that a row's bits do not
  // depend on its neighbours.
  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t end = min_index(block + KEY_BLOCK, any.high);
    engine.take_keys(block, end - block);
    for (int i = 0; i < count; i++) {
      const auto& x = engine.subs[i];
      index_t k0 = max_index(block, x.keys.any.low), k1 = min_index(end, x.keys.any.high);
      if (k0 >= k1) continue;
      const Cover cover = cover_of(h.rules, x.first, x.count, k0, k1 - k0);
      if (cover == Cover::none) continue;
      bool use_mask = cover == Cover::some;
      if (Engine::trims && use_mask && h.rules.mask.row == 0)
        use_mask = trim_hidden(h.rules.mask, k0, k1);
      if (k0 < k1) engine.attend(i, block, k0, k1, use_mask);
    }
  }
  engine.end(count);
}

}  // namespace
}  // namespace fusedattn
