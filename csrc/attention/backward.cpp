// Work division of backward: a task is a block of keys of one key/value head, or a whole key/value
// head where heads are plenty. Neither changes a single bit of the result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention/call.h"
#include "attention/tasks.h"
#include "isa/dispatch.h"
#include "threads/pool.h"

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
  return run_tasks(numbering.total(), flops, CLAIM, threads, loop, [&](index_t task, index_t) {
    const index_t b = numbering.sample(task), local = task - numbering.first[std::size_t(b)];
    const index_t sq = c.sq[std::size_t(b)], blocks = ceil_div(sq, rows),
                  begin = local % blocks * rows;
    body(b, local / blocks, begin, std::min(begin + rows, sq));
  });
}

// Makes room for the statistics.
Statistics statistics_of(const Call& c) {
  const index_t size = compute_size(c.dtype);
  index_t elements = 0;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++)
    elements = std::max(elements, c.lse_batch[b] + (c.heads - 1) * c.lse_head + c.sq[b]);
  Statistics s;
  s.data = std::make_unique_for_overwrite<char[]>(std::size_t(2 * elements * size));
  s.lse2 = s.data.get();
  s.delta = s.data.get() + elements * size;
  s.dq = c.dq;
  if (c.dq.data && (is_narrow(c.dtype) || !is_ordinary(c.scale))) {
    s.dq_data = std::make_unique_for_overwrite<char[]>(std::size_t(elements * c.d * size));
    s.dq = {s.dq_data.get(), {}, c.lse_head * c.d * size, c.d * size, size};
    for (const index_t o : c.lse_batch) s.dq.batch.push_back(o * c.d * size);
  }
  return s;
}

// 1. of backward, for queries [begin, end) of a head: the statistics, dq set to zero.
void compute_statistics(const Call& c, const Kernels& kernels, const Statistics& s, index_t b,
                        index_t h, index_t begin, index_t end, const Matrix& dout,
                        const Matrix& dq) {
  const index_t size = compute_size(c.dtype),
                at = (c.lse_batch[std::size_t(b)] + h * c.lse_head) * size;
  const Matrix dlse = c.dlse.at(b, h);
  kernels.delta(
      {c.out.at(b, h), dout, c.lse + at, dlse.data, dlse.row, s.lse2 + at, s.delta + at, c.d_v},
      begin, end);
  if (dq.data)
    for (index_t q = begin; q < end; q++)
      std::memset(dq.data + q * dq.row, 0, std::size_t(c.d * size));
}

// Rows a multiple of 4096 bytes apart share a few sets of the caches and drive each other out.
// Where a task reads a head's queries several times, once for each block of keys, it copies them
// first, and adds up dq beside them.
struct Packed {
  index_t size, q_bytes, dout_bytes, dq_bytes;  // of an element; of a head
  bool used;

  index_t bytes() const { return used ? q_bytes + dout_bytes + dq_bytes : 0; }
};
bool is_crowded(const Tensor& t, index_t size) {
  return t.col == size && t.row != 0 && t.row % 4096 == 0;
}
Packed packed_head(const Call& c, index_t sq) {
  const index_t size = is_narrow(c.dtype) ? 2 : compute_size(c.dtype);
  const bool used = !is_narrow(c.dtype) && is_crowded(c.q, size) && is_crowded(c.dout, size);
  return {size, sq * c.d * size, sq * c.d_v * size, c.dq.data ? sq * c.d * size : 0, used};
}
Matrix copy_rows(const Matrix& m, index_t rows, index_t bytes, index_t size, char* to) {
  for (index_t r = 0; r < rows; r++) {
    for (index_t ahead = 0; ahead < bytes && r + 8 < rows; ahead += 64)
      __builtin_prefetch(m.data + (r + 8) * m.row + ahead);
    std::memcpy(to + r * bytes, m.data + r * m.row, std::size_t(bytes));
  }
  return {to, bytes, size};
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

  const Statistics statistics = statistics_of(c);

  // Who else adds to the same elements? Key blocks of a head to its dq; other heads and samples to
  // a broadcast dbias.
  const bool shared_bias =
      c.dbias.data &&
      (c.dbias.col == 0 || (c.kv_heads > 1 && c.dbias.head == 0) || has_duplicates(c.dbias.batch));
  const bool by_head = !shared_bias && (threads == 1 || heads >= 8 * threads ||
                                        (heads >= threads && heads % threads == 0));

  // A task with a head of its own makes its statistics itself: dout and dq are in the caches then.
  const auto statistics_at = [&](index_t b, index_t h, index_t begin, index_t end) {
    compute_statistics(c, kernels, statistics, b, h, begin, end, c.dout.at(b, h),
                       statistics.dq.at(b, h));
  };
  if (!by_head && !over_queries(c, threads, loop, statistics_at)) return false;

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

  const auto keys_at = [&](index_t b, index_t kv, index_t block, bool new_head) -> NextKeys {
    const index_t begin = block * kernels.back_keys, sk = c.sk[std::size_t(b)], h = kv * group;
    return {c.k.at(b, kv),
            c.v.at(b, kv),
            c.q.at(b, h),
            c.dout.at(b, h),
            new_head ? c.out.at(b, h) : Matrix{},
            new_head ? statistics.dq.at(b, h) : Matrix{},
            c.mask.at(b, h),
            c.bias.at(b, h),
            begin,
            std::min(begin + kernels.back_keys, sk),
            c.sq[std::size_t(b)]};
  };
  const auto keys_of = [&](index_t task) -> NextKeys {
    if (task < 0) return {};
    const index_t b = tasks.sample(task), local = task - tasks.first[std::size_t(b)];
    if (by_head) return keys_at(b, local, 0, true);
    return keys_at(b, local / key_blocks(b), local % key_blocks(b), false);
  };
  MaskCovers covers(c);
  const auto run = [&](index_t task, index_t then) {
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
    head.covers_head = covers.step(b);
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
    head.rules.covers = covers.at(b, h);
    if (!c.alibi_slopes.empty()) head.alibi_slopes = &c.alibi_slopes[std::size_t(b * c.heads + h)];
    head.visible = visible.data() + turns.first[std::size_t(b)];
    head.wait_for_turn = wait_for_turn;
    head.call = &loop;
    Packed packed = packed_head(c, head.sq);
    packed.used &= by_head && blocks > 1 && !statistics.dq_data;
    const index_t needed = index_t(kernels.backward_scratch(head) + 63) / 64 * 64;
    char* scratch =
        static_cast<char*>(thread_scratch(std::size_t(needed + group * packed.bytes() + 3 * 64)));
    head.next = keys_of(then);
    if (by_head) {
      const NextKeys after = head.next;
      char *q = scratch + needed, *dout = q + group * packed.q_bytes,
           *dq = dout + group * packed.dout_bytes;
      for (index_t g = 0; g < group; g++) {
        if (!packed.used) {
          statistics_at(b, h + g, 0, head.sq);
          continue;
        }
        const index_t size = packed.size, row = c.d * size;
        copy_rows(c.q.at(b, h + g), head.sq, row, size, q + g * packed.q_bytes);
        const Matrix own = copy_rows(c.dout.at(b, h + g), head.sq, c.d_v * size, size,
                                     dout + g * packed.dout_bytes);
        compute_statistics(c, kernels, statistics, b, h + g, 0, head.sq, own,
                           {c.dq.data ? dq + g * packed.dq_bytes : nullptr, row, size});
      }
      if (packed.used) {
        const index_t size = packed.size;
        head.q = {q, c.d * size, size};
        head.dout = {dout, c.d_v * size, size};
        head.dq = {c.dq.data ? dq : nullptr, c.d * size, size};
        head.q_head = packed.q_bytes;
        head.dout_head = packed.dout_bytes;
        head.dq_head = packed.dq_bytes;
      }
      for (index_t block = 0; block < blocks && !is_cancelled(loop); block++) {
        head.next = block + 1 < blocks ? keys_at(b, kv, block + 1, false) : after;
        if (block + 1 < blocks) head.next.q = head.q, head.next.dout = head.dout;
        kernels.backward(head, block, scratch);
      }
      for (index_t g = 0; g < group && packed.used && c.dq.data; g++)
        kernels.round(dq + g * packed.dq_bytes, 1, c.dq.at(b, h + g), 0, head.sq, c.d);
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
  };
  const double claim = by_head ? CLAIM : CLAIM_IN_TURN;
  if (!run_tasks(tasks.total(), flops, claim, threads, loop, run)) return false;
  for (std::size_t h = 0; h < c.dsinks.size(); h++)
    c.dsinks[h] = c.dtype == DType::float64 ? sink_gradient<double>(c, statistics, index_t(h))
                                            : sink_gradient<float>(c, statistics, index_t(h));
  if (!statistics.dq_data) return true;
  const double rest = c.scale == 0 ? 1 : c.scale / key_scale(c);
  return over_queries(c, threads, loop, [&](index_t b, index_t h, index_t begin, index_t end) {
    kernels.round(statistics.dq.at(b, h).data, rest, c.dq.at(b, h), begin, end, c.d);
  });
}

}  // namespace fusedattn
