// Work division of backward: a task is a block of keys of one key/value head, or a whole key/value
// head where heads are plenty. Neither changes a single bit of the result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "division.h"

namespace fusedattn {
namespace {

// dq is the sum of dS K times the scale. It is applied to K, but for one out of the ordinary, which
// could take K out of range although dq is in it: of that only half goes there, in powers of two.
double key_scale(const Call& c) {
  if (is_ordinary(c.scale)) return c.scale;
  const int most = c.dtype == DType::float64 ? 510 : 62;
  return std::ldexp(1.0, std::clamp(std::ilogb(c.scale) / 2, -most, most));
}
bool has_duplicates(std::vector<index_t> v) {
  std::sort(v.begin(), v.end());
  return std::adjacent_find(v.begin(), v.end()) != v.end();
}

// What backward keeps for every query: delta, lse2 and, for 16-bit types or where a part of the
// scale is still to come, the sums that become dq.
struct Statistics {
  std::unique_ptr<char[]> data, dq_data;
  char *lse2, *delta;
  Tensor dq;
};

// Runs body(b, h, begin, end) over ranges of queries.
template <class F> bool over_queries(const Call& c, int threads, Loop& loop, F&& body) {
  constexpr index_t rows = 256;
  Numbering numbering;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++)
    numbering.add(c.heads * ceil_div(c.sq[b], rows));
  const double flops = 4.0 * double(numbering.total() * rows) * double(c.d_v + c.d);
  return run_tasks(numbering.total(), flops, threads, loop, [&](index_t task) {
    const index_t b = numbering.sample(task), local = task - numbering.first[std::size_t(b)];
    const index_t sq = c.sq[std::size_t(b)], blocks = ceil_div(sq, rows),
                  begin = local % blocks * rows;
    body(b, local / blocks, begin, std::min(begin + rows, sq));
  });
}

// 1. of backward: the statistics, dq set to zero.
bool compute_statistics(const Call& c, const Kernels& kernels, Loop& loop, int threads,
                        Statistics& s) {
  const index_t size = compute_size(c.dtype);
  index_t elements = 0;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++)
    elements = std::max(elements, c.lse_batch[b] + (c.heads - 1) * c.lse_head + c.sq[b]);
  s.data = std::make_unique_for_overwrite<char[]>(std::size_t(2 * elements * size));
  s.lse2 = s.data.get();
  s.delta = s.data.get() + elements * size;
  s.dq = c.dq;
  if (c.dq.data && (is_narrow(c.dtype) || !is_ordinary(c.scale))) {
    s.dq_data = std::make_unique_for_overwrite<char[]>(std::size_t(elements * c.d * size));
    s.dq = {s.dq_data.get(), {}, c.lse_head * c.d * size, c.d * size, size};
    for (const index_t o : c.lse_batch) s.dq.batch.push_back(o * c.d * size);
  }
  return over_queries(c, threads, loop, [&](index_t b, index_t h, index_t begin, index_t end) {
    const index_t at = (c.lse_batch[std::size_t(b)] + h * c.lse_head) * size;
    const Matrix dlse = c.dlse.at(b, h);
    kernels.delta({c.out.at(b, h), c.dout.at(b, h), c.lse + at, dlse.data, dlse.row, s.lse2 + at,
                   s.delta + at, c.d_v},
                  begin, end);
    const Matrix dq = s.dq.at(b, h);
    if (dq.data)
      for (index_t q = begin; q < end; q++)
        std::memset(dq.data + q * dq.row, 0, std::size_t(c.d * size));
  });
}

// dsinks = -sum over queries of exp(sink - lse) * delta: the sink's probability times its share of
// the softmax's gradient; samples and queries in order.
template <class T> double sink_gradient(const Call& c, const Statistics& s, index_t h) {
  double sum = 0;
  for (index_t b = 0; b < c.batch; b++) {
    const index_t at = c.lse_batch[std::size_t(b)] + h * c.lse_head;
    const T *lse = reinterpret_cast<const T*>(c.lse) + at,
            *delta = reinterpret_cast<const T*>(s.delta) + at;
    for (index_t q = 0; q < c.sq[std::size_t(b)]; q++)
      if (!(std::isinf(lse[q]) && lse[q] < 0))  // a query that sees no key sees no sink
        sum -= std::exp(c.sinks[std::size_t(h)] - double(lse[q])) * double(delta[q]);
  }
  return sum;
}

}  // namespace

bool attention_backward(Call& c, Loop& loop) {
  const Kernels& kernels = kernels_of(c);
  const double flops = 2.0 * pairs(c) * double(3 * c.d + 2 * c.d_v);
  const int threads = worthwhile_threads(c.threads, flops);
  const index_t group = c.kv_heads ? c.heads / c.kv_heads : 1, heads = c.batch * c.kv_heads;

  Statistics statistics;
  if (!compute_statistics(c, kernels, loop, threads, statistics)) return false;
  for (std::size_t h = 0; h < c.dsinks.size(); h++)
    c.dsinks[h] = c.dtype == DType::float64 ? sink_gradient<double>(c, statistics, index_t(h))
                                            : sink_gradient<float>(c, statistics, index_t(h));

  // Who else adds to the same elements? Key blocks of a head to its dq; other heads and samples to
  // a broadcast dbias.
  const bool shared_bias =
      c.dbias.data &&
      (c.dbias.col == 0 || (c.kv_heads > 1 && c.dbias.head == 0) || has_duplicates(c.dbias.batch));
  const bool by_head = !shared_bias && (threads == 1 || heads >= 8 * threads ||
                                        (heads >= threads && heads % threads == 0));

  const auto query_blocks = [&](index_t b) {
    return ceil_div(c.sq[std::size_t(b)], kernels.back_queries);
  };
  const auto key_blocks = [&](index_t b) {
    return ceil_div(c.sk[std::size_t(b)], kernels.back_keys);
  };
  Numbering tasks, turns;  // turns: one for each query block of each query head
  index_t most = 0;
  for (index_t b = 0; b < c.batch; b++) {
    tasks.add(c.kv_heads * (by_head ? 1 : key_blocks(b)));
    turns.add(c.heads * query_blocks(b));
    most = std::max(most, query_blocks(b));
  }
  std::vector<Interval> visible(std::size_t(turns.total()));  // by block of queries, head 0 first
  for (index_t b = 0; b < c.batch && c.heads > 0; b++)
    kernels.visible_blocks(c.rules(b, 0), c.sq[std::size_t(b)], c.sk[std::size_t(b)],
                           visible.data() + turns.first[std::size_t(b)]);
  std::unique_ptr<int[]> dq_turns, bias_turns;
  if (!by_head && threads > 1) {
    dq_turns = std::make_unique<int[]>(std::size_t(turns.total()));
    if (shared_bias) bias_turns = std::make_unique<int[]>(std::size_t(most + 1));
  }
  std::vector<int> left_out;  // like `visible`; see Turns
  if (bias_turns && c.dbias.row != 0) {
    left_out.resize(visible.size());
    std::vector<int> so_far(std::size_t(most), 0);
    for (std::size_t b = 0; b < std::size_t(c.batch) && c.heads > 0; b++) {
      const index_t own = query_blocks(index_t(b));
      std::copy_n(so_far.begin(), own, left_out.begin() + turns.first[b]);
      for (std::size_t i = std::size_t(own); i < so_far.size(); i++)
        so_far[i] += int((tasks.first[b + 1] - tasks.first[b]) * group);
    }
  }

  const bool done = run_tasks(tasks.total(), flops, threads, loop, [&](index_t task) {
    const index_t b = tasks.sample(task), local = task - tasks.first[std::size_t(b)],
                  blocks = key_blocks(b);
    const index_t kv = by_head ? local : local / blocks, h = kv * group;
    const index_t at = (c.lse_batch[std::size_t(b)] + h * c.lse_head) * compute_size(c.dtype);
    BackwardHead head{};
    head.k = c.k.at(b, kv);
    head.v = c.v.at(b, kv);
    head.dk = c.dk.at(b, kv);
    head.dv = c.dv.at(b, kv);
    head.q = c.q.at(b, h);
    head.dout = c.dout.at(b, h);
    head.dq = statistics.dq.at(b, h);
    head.dbias = c.dbias.at(b, h);
    head.q_head = c.q.head;
    head.dout_head = c.dout.head;
    head.dq_head = statistics.dq.head;
    head.dbias_head = c.dbias.head;
    head.mask_head = c.mask.head;
    head.bias_head = c.bias.head;
    head.lse2 = statistics.lse2 + at;
    head.delta = statistics.delta + at;
    head.stat_head = c.lse_head;
    head.group = group;
    head.sq = c.sq[std::size_t(b)];
    head.sk = c.sk[std::size_t(b)];
    head.d = c.d;
    head.d_v = c.d_v;
    head.scale = c.scale;
    head.k_scale = key_scale(c);
    head.rules = c.rules(b, h);
    if (!c.alibi_slopes.empty()) head.alibi_slopes = &c.alibi_slopes[std::size_t(b * c.heads + h)];
    head.visible = visible.data() + turns.first[std::size_t(b)];
    head.wait_for_turn = wait_for_turn;
    head.call = &loop;
    void* scratch = thread_scratch(kernels.backward_scratch(head));
    if (by_head) {
      for (index_t block = 0; block < blocks && !is_cancelled(loop); block++)
        kernels.backward(head, block, scratch);
      return;
    }
    const index_t block = local % blocks;
    if (dq_turns)
      head.dq_turns = {dq_turns.get() + turns.first[std::size_t(b)] + h * query_blocks(b),
                       query_blocks(b), int(block), nullptr};
    if (bias_turns)
      head.bias_turns = {
          bias_turns.get(), 0, int(task * group),
          left_out.empty() ? nullptr : left_out.data() + turns.first[std::size_t(b)]};
    kernels.backward(head, block, scratch);
  });
  if (!done || !statistics.dq_data) return done;
  const double rest = c.scale == 0 ? 1 : c.scale / key_scale(c);
  return over_queries(c, threads, loop, [&](index_t b, index_t h, index_t begin, index_t end) {
    kernels.round(statistics.dq.at(b, h).data, rest, c.dq.at(b, h), begin, end, c.d);
  });
}

}  // namespace fusedattn
