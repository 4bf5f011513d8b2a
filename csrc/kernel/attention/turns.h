// Taking turns where several tasks add to the same gradient: in a fixed order, whoever computes.
// Waits and passes on; whose turn it is, the work division decides (attention/backward_plan.h).
// Called by backward_loop.h.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

struct Turn {
  int* turn;  // null: nobody else adds
  int ordinal;
};
FA_INLINE Turn turn_at(const Turns& t, index_t g, index_t query_block) {
  if (!t.turns) return {nullptr, 0};
  const int ordinal = t.ordinal + (t.head == 0 ? int(g) : 0);
  return {t.turns + g * t.head + query_block,
          t.left_out ? ordinal - t.left_out[query_block] : ordinal};
}
FA_INLINE void wait(const BackwardHead& h, Turn t) {
  if (t.turn) h.wait_for_turn(t.turn, t.ordinal, h.call);
}
FA_INLINE void pass_on(const BackwardHead& h, Turn t) {
  wait(h, t);  // returns at once where it was waited for already
  if (t.turn) __atomic_store_n(t.turn, t.ordinal + 1, __ATOMIC_RELEASE);
}

}  // namespace
}  // namespace fusedattn
