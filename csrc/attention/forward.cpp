// Work division of forward: a task is a range of queries of one head, or the few queries of all the
// heads that share keys. Neither changes a single bit of the result.
#include <algorithm>
#include <vector>

#include "attention/call.h"
#include "attention/tasks.h"
#include "isa/dispatch.h"
#include "threads/pool.h"

namespace fusedattn {
namespace {

bool are_equal(const std::vector<index_t>& v) {
  return std::all_of(v.begin(), v.end(), [&](index_t x) { return x == v[0]; });
}

class Forward {
 public:
  explicit Forward(const Call& c)
      : call_(c),
        kernels_(kernels_of(c)),
        flops_(2.0 * pairs(c) * double(c.d + c.d_v)),
        threads_(worthwhile_threads(c.threads, flops_)),
        group_(c.kv_heads ? c.heads / c.kv_heads : 1),
        step_(queries_of_a_task()),
        covers_(c) {
    for (index_t b = 0; b < c.batch; b++)
      tasks_.add(is_few(b) ? c.kv_heads : c.heads * ceil_div(c.sq[std::size_t(b)], step_));
    samples_together_ = (is_shared(c.bias) || is_shared(c.mask)) && are_equal(c.sq) &&
                        are_equal(c.sk) && !is_few(0);
  }

  bool run(Loop& loop) {  // false if interrupted
    return run_tasks(tasks_.total(), flops_, CLAIM, threads_, loop,
                     [&](index_t task, index_t then) {
                       if (is_few(tasks_.sample(task)))
                         run_few(task);
                       else
                         run_many(task, then);
                     });
  }

 private:
  struct Place {
    index_t b, h, kv, begin, end;  // sample, head, key/value head, queries
  };

  // Several sub-blocks a task share the copies of K and V where these must be made; enough tasks to
  // fill the threads first.
  index_t queries_of_a_task() const {
    index_t sub_blocks = 0;
    for (std::size_t b = 0; b < std::size_t(call_.batch); b++)
      sub_blocks += call_.heads * ceil_div(call_.sq[b], kernels_.query_block);
    index_t wide = kernels_.sub_blocks;
    while (wide > 1 && threads_ > 1 && sub_blocks / wide < 8 * threads_) wide /= 2;
    return wide * kernels_.query_block;
  }

  // Where few queries share a key/value head, one task takes them all, so that keys are read once.
  // With hardly more keys than queries the tiles of many are faster.
  bool is_few(index_t b) const {
    const index_t sq = call_.sq[std::size_t(b)], sk = call_.sk[std::size_t(b)];
    return sq * group_ <= kernels_.few_queries && (sq < 4 || sk >= 2 * sq) &&
           !call_.dropout.threshold;
  }

  // Does every sample read the same numbers, and other ones for each head?
  bool is_shared(const Tensor& t) const {
    return t.data && t.head != 0 && t.row != 0 && call_.batch > 1 && are_equal(t.batch);
  }

  // Of a task of many queries. Where samples share what lies dense over a head, they come one after
  // the other: all but the first find it in the cache.
  Place place(index_t task) const {
    if (samples_together_) task = task % call_.batch * tasks_.first[1] + task / call_.batch;
    const index_t b = tasks_.sample(task), local = task - tasks_.first[std::size_t(b)];
    const index_t sq = call_.sq[std::size_t(b)], blocks = ceil_div(sq, step_), h = local / blocks;
    const index_t begin = (blocks - 1 - local % blocks) * step_;  // causal: longest first
    return {b, h, h / group_, begin, std::min(begin + step_, sq)};
  }

  ForwardHead head_at(index_t b, index_t h) {
    const Call& c = call_;
    const std::size_t i = std::size_t(b);
    Rules rules = c.rules(b, h);
    rules.covers = covers_.at(b, h);
    const index_t at = (c.lse_batch[i] + h * c.lse_head) * compute_size(c.dtype);
    return {c.q.at(b, h),
            c.k.at(b, h / group_),
            c.v.at(b, h / group_),
            c.out.at(b, h),
            c.lse + at,
            c.sq[i],
            c.sk[i],
            c.d,
            c.d_v,
            c.scale,
            rules,
            c.pages.table ? Pages{c.pages.table + b * c.page_columns, c.pages.rows, c.pages.k_page,
                                  c.pages.v_page}
                          : Pages{}};
  }

  // What to fetch while `now` is computed.
  NextQueries next_of(const Place& now, index_t then) const {
    const Call& c = call_;
    if (c.pages.table || then < 0 || is_few(tasks_.sample(then))) return {};
    const Place p = place(then);
    return {c.q.at(p.b, p.h),
            c.k.at(p.b, p.kv),
            c.v.at(p.b, p.kv),
            c.out.at(p.b, p.h),
            p.begin,
            p.end,
            p.b != now.b || p.kv != now.kv};
  }

  void run_few(index_t task) {
    const index_t b = tasks_.sample(task), kv = task - tasks_.first[std::size_t(b)];
    if (call_.sq[std::size_t(b)] == 0) return;
    ForwardHead heads[16];
    for (index_t g = 0; g < group_; g++) heads[g] = head_at(b, kv * group_ + g);
    kernels_.forward_few(heads, group_, thread_scratch(kernels_.few_scratch(heads[0])));
  }

  void run_many(index_t task, index_t then) {
    const Place at = place(task);
    const ForwardHead head = head_at(at.b, at.h);
    kernels_.forward(head, at.begin, at.end, next_of(at, then),
                     thread_scratch(kernels_.forward_scratch(head, at.end - at.begin)));
  }

  const Call& call_;
  const Kernels& kernels_;
  const double flops_;
  const int threads_;
  const index_t group_;  // query heads that share a key/value head
  const index_t step_;   // queries of a task of many
  Numbering tasks_;      // over samples
  bool samples_together_;
  MaskCovers covers_;
};

}  // namespace

bool attention_forward(const Call& call, Loop& loop) {
  return Forward(call).run(loop);
}

}  // namespace fusedattn
