#include "attention/backward_plan.h"

#include <algorithm>

#include "isa/dispatch.h"

namespace fusedattn {
namespace {

bool has_duplicates(std::vector<index_t> v) {
  std::sort(v.begin(), v.end());
  return std::adjacent_find(v.begin(), v.end()) != v.end();
}
bool is_bias_shared(const Call& c) {
  return c.dbias.data && (c.dbias.col == 0 || (c.kv_heads > 1 && c.dbias.head == 0) ||
                          has_duplicates(c.dbias.batch));
}

}  // namespace

BackwardPlan::BackwardPlan(const Call& c)
    : call(c),
      kernels(kernels_of(c)),
      flops(2.0 * pairs(c) * double(3 * c.d + 2 * c.d_v)),
      threads(worthwhile_threads(c.threads, flops)),
      group(c.kv_heads ? c.heads / c.kv_heads : 1),
      shared_bias(is_bias_shared(c)) {
  const index_t heads = c.batch * c.kv_heads;
  by_head = !shared_bias &&
            (threads == 1 || heads >= 8 * threads || (heads >= threads && heads % threads == 0));
  divide();
  if (!by_head && threads > 1) take_turns();
}

void BackwardPlan::divide() {
  const Call& c = call;
  for (index_t b = 0; b < c.batch; b++) {
    tasks.add(c.kv_heads * (by_head ? 1 : key_blocks(b)));
    blocks.add(c.heads * query_blocks(b));
  }
  visible.resize(std::size_t(blocks.total()));
  for (index_t b = 0; b < c.batch && c.heads > 0; b++)
    kernels.visible_blocks(c.rules(b, 0), c.sq[std::size_t(b)], c.sk[std::size_t(b)],
                           visible.data() + blocks.first[std::size_t(b)]);
}

// Key blocks of a head add to its dq; other heads and samples to a broadcast dbias. A bias that is
// not broadcast over queries has turns by block of queries, and samples of fewer blocks leave some
// out.
void BackwardPlan::take_turns() {
  dq_turns_ = std::make_unique<int[]>(std::size_t(blocks.total()));
  if (!shared_bias) return;
  index_t most = 0;
  for (index_t b = 0; b < call.batch; b++) most = std::max(most, query_blocks(b));
  bias_turns_ = std::make_unique<int[]>(std::size_t(most + 1));
  if (call.dbias.row == 0) return;
  left_out_.resize(visible.size());
  std::vector<int> so_far(std::size_t(most), 0);
  for (std::size_t b = 0; b < std::size_t(call.batch) && call.heads > 0; b++) {
    const index_t own = query_blocks(index_t(b));
    std::copy_n(so_far.begin(), own, left_out_.begin() + blocks.first[b]);
    for (std::size_t i = std::size_t(own); i < so_far.size(); i++)
      so_far[i] += int((tasks.first[b + 1] - tasks.first[b]) * group);
  }
}

BackwardPlan::Place BackwardPlan::place(index_t task) const {
  const index_t b = tasks.sample(task), local = task - tasks.first[std::size_t(b)];
  const index_t each = by_head ? 1 : key_blocks(b), kv = local / each;
  return {b, kv, kv * group, local % each};
}

index_t BackwardPlan::query_blocks(index_t b) const {
  return ceil_div(call.sq[std::size_t(b)], kernels.back_queries);
}

index_t BackwardPlan::key_blocks(index_t b) const {
  return ceil_div(call.sk[std::size_t(b)], kernels.back_keys);
}

const Interval* BackwardPlan::visible_at(index_t b) const {
  return visible.data() + blocks.first[std::size_t(b)];
}

Turns BackwardPlan::turns_of_dq(const Place& at) const {
  if (!dq_turns_) return {};
  const index_t each = query_blocks(at.b);
  return {dq_turns_.get() + blocks.first[std::size_t(at.b)] + at.h * each, each, int(at.block),
          nullptr};
}

Turns BackwardPlan::turns_of_bias(index_t task, const Place& at) const {
  if (!bias_turns_) return {};
  return {bias_turns_.get(), 0, int(task * group),
          left_out_.empty() ? nullptr : left_out_.data() + blocks.first[std::size_t(at.b)]};
}

}  // namespace fusedattn
