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
}  // namespace

bool attention_forward(const Call& c, Loop& loop) {
  const Kernels& kernels = kernels_of(c);
  const double flops = 2.0 * pairs(c) * double(c.d + c.d_v);
  const int threads = worthwhile_threads(c.threads, flops);

  // Several sub-blocks a task share the copies of K and V where these must be made; enough tasks to
  // fill the threads first.
  index_t sub_blocks = 0;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++)
    sub_blocks += c.heads * ceil_div(c.sq[b], kernels.query_block);
  index_t wide = kernels.sub_blocks;
  while (wide > 1 && threads > 1 && sub_blocks / wide < 8 * threads) wide /= 2;
  const index_t step = wide * kernels.query_block;

  // Where few queries share a key/value head, one task takes them all, so that keys are read once.
  // With hardly more keys than queries the tiles of many are faster.
  const index_t group = c.kv_heads ? c.heads / c.kv_heads : 1;
  const auto is_few = [&](index_t b) {
    const index_t sq = c.sq[std::size_t(b)], sk = c.sk[std::size_t(b)];
    return sq * group <= kernels.few_queries && (sq < 4 || sk >= 2 * sq) && !c.dropout.threshold;
  };
  Numbering numbering;
  for (index_t b = 0; b < c.batch; b++)
    numbering.add(is_few(b) ? c.kv_heads : c.heads * ceil_div(c.sq[std::size_t(b)], step));
  MaskCovers covers(c);
  const auto head_at = [&](index_t b, index_t h) -> ForwardHead {
    const std::size_t i = std::size_t(b);
    Rules rules = c.rules(b, h);
    rules.covers = covers.at(b, h);
    const index_t at = (c.lse_batch[i] + h * c.lse_head) * compute_size(c.dtype);
    return {c.q.at(b, h),
            c.k.at(b, h / group),
            c.v.at(b, h / group),
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
  };
  struct Place {
    index_t b, h, g, begin, end;
  };
  // Where samples share what lies dense over a head, they come one after the other: all but the
  // first find it in the cache.
  const auto is_shared = [&](const Tensor& t) {
    return t.data && t.head != 0 && t.row != 0 && c.batch > 1 && are_equal(t.batch);
  };
  const bool samples_together =
      (is_shared(c.bias) || is_shared(c.mask)) && are_equal(c.sq) && are_equal(c.sk) && !is_few(0);
  const auto place = [&](index_t task) -> Place {
    if (samples_together) task = task % c.batch * numbering.first[1] + task / c.batch;
    const index_t b = numbering.sample(task), local = task - numbering.first[std::size_t(b)];
    const index_t sq = c.sq[std::size_t(b)], blocks = ceil_div(sq, step), h = local / blocks;
    const index_t begin = (blocks - 1 - local % blocks) * step;  // causal: longest first
    return {b, h, h / group, begin, std::min(begin + step, sq)};
  };
  return run_tasks(numbering.total(), flops, CLAIM, threads, loop, [&](index_t task, index_t then) {
    if (const index_t sample = numbering.sample(task); is_few(sample)) {
      const index_t first = (task - numbering.first[std::size_t(sample)]) * group;
      if (c.sq[std::size_t(sample)] == 0) return;
      ForwardHead heads[16];
      for (index_t g = 0; g < group; g++) heads[g] = head_at(sample, first + g);
      kernels.forward_few(heads, group, thread_scratch(kernels.few_scratch(heads[0])));
      return;
    }
    const auto [b, h, g, begin, end] = place(task);
    const ForwardHead head = head_at(b, h);
    NextQueries next{};
    if (!c.pages.table && then >= 0 && !is_few(numbering.sample(then))) {
      const Place p = place(then);
      next = {c.q.at(p.b, p.h),    c.k.at(p.b, p.g), c.v.at(p.b, p.g),
              c.out.at(p.b, p.h),  p.begin,          p.end,
              p.b != b || p.g != g};
    }
    kernels.forward(head, begin, end, next,
                    thread_scratch(kernels.forward_scratch(head, end - begin)));
  });
}

}  // namespace fusedattn
