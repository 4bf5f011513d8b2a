// Work division. A forward task is a range of queries of one head; a backward task is a block of
// keys of one key/value head, or a whole key/value head where heads are plenty. Neither changes a
// single bit of the result.
#include "attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <unordered_map>

#include "dispatch.h"

namespace fusedattn {
namespace {

const Kernels& kernels_in(const KernelTable& table, DType dtype) {
  const Kernels* own = table.kernels[int(dtype)];
  return own ? *own : *table.base->kernels[int(dtype)];
}
// May a factor be applied to an operand without a thought for the range of float32?
bool is_ordinary(double factor) {
  const double size = std::fabs(factor);
  return size == 0 || (size >= 0x1p-20 && size <= 0x1p20);
}
// Instructions for bfloat16 take subnormal numbers for 0, and pieces of small numbers are lost: not
// for a scale that is out of the ordinary, which q or k may have to be out of it too. An
// instruction set that was asked for by name is used for any d.
const Kernels& kernels_of(const Call& c) {
  const KernelTable& table = kernel_table();
  const Kernels* own = table.kernels[int(c.dtype)];
  if (!own || !table.base) return kernels_in(table, c.dtype);
  const bool ordinary =
      is_ordinary(c.scale) && (c.softcap == 0 || is_ordinary(c.scale / c.softcap));
  const bool worth = c.d + c.d_v >= own->least_dims || isa_is_forced();
  return ordinary && worth ? *own : kernels_in(*table.base, c.dtype);
}
// dq is the sum of dS K times the scale. It is applied to K, but for one out of the ordinary, which
// could take K out of range although dq is in it: of that only half goes there, in powers of two.
double key_scale(const Call& c) {
  if (is_ordinary(c.scale)) return c.scale;
  const int most = c.dtype == DType::float64 ? 510 : 62;
  return std::ldexp(1.0, std::clamp(std::ilogb(c.scale) / 2, -most, most));
}
index_t compute_size(DType dtype) {
  return dtype == DType::float64 ? 8 : 4;
}
bool is_narrow(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16;
}
index_t ceil_div(index_t a, index_t b) {
  return (a + b - 1) / b;
}

// Query-key pairs that are computed, about: a window or a causal mask leaves its part of a row.
double pairs(const Call& c) {
  double n = 0;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++) {
    const double keys = double(c.sk[b]), left = std::min(double(c.left), keys / 2),
                 right = std::min(double(c.right), keys / 2);
    n += double(c.sq[b]) * std::min(keys, left + right + 1);
  }
  return n * double(c.heads);
}

// A thread more for each 1.5 MFLOP: below that, waking it costs more than it brings.
int worthwhile_threads(int threads, double flops) {
  return int(std::clamp(flops / 1.5e6, 1.0, double(threads)));
}

// Tasks numbered over samples of different sizes: sample b owns [first[b], first[b + 1]).
struct Numbering {
  std::vector<index_t> first{0};

  void add(index_t tasks) { first.push_back(first.back() + tasks); }
  index_t total() const { return first.back(); }
  index_t sample(index_t task) const {
    return index_t(std::upper_bound(first.begin(), first.end(), task) - first.begin()) - 1;
  }
};

// Runs body(task) with tasks too small to be worth an atomic operation put together.
template <class F> bool run_tasks(index_t tasks, double flops, int threads, Loop& loop, F&& body) {
  const double each = flops / double(std::max<index_t>(tasks, 1));
  const index_t together = std::clamp<index_t>(index_t(2e5 / (each + 1)), 1,
                                               std::max<index_t>(1, tasks / (4 * threads)));
  return parallel_for(ceil_div(tasks, together), threads, loop, [&](index_t chunk) {
    const index_t end = std::min(tasks, (chunk + 1) * together);
    for (index_t t = chunk * together; t < end; t++) body(t);
  });
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

Rules Call::rules(index_t b, index_t h) const {
  const std::size_t i = std::size_t(b), head = std::size_t(h);
  Rules r{};
  r.q_offset = q_offset[i];
  r.left = left;
  r.right = right;
  r.q_length = q_length[i];
  r.kv_length = kv_length[i];
  if (!segments.empty()) r.segments = segments[i].view();
  r.mask = mask.at(b, h);
  r.bias = bias.at(b, h);
  r.softcap = softcap;
  r.alibi_slope = alibi_slopes.empty() ? 0.0 : alibi_slopes[i * std::size_t(heads) + head];
  r.sink = sinks.empty() ? -std::numeric_limits<double>::infinity() : sinks[head];
  r.dropout = dropout;
  r.dropout.batch = std::uint32_t(b);
  r.dropout.head = std::uint32_t(h);
  return r;
}

SegmentTable::SegmentTable(const index_t* q_ids, index_t sq, const index_t* k_ids, index_t sk) {
  struct Run {
    Interval keys;
    index_t count;
    std::int32_t number;
  };
  std::unordered_map<index_t, Run> runs;
  Run* last = nullptr;
  bool scattered = false;
  for (index_t j = 0; j < sk; j++) {
    if (j == 0 || k_ids[j] != k_ids[j - 1])
      last = &runs.try_emplace(k_ids[j], Run{{j, j}, 0, std::int32_t(runs.size())}).first->second;
    last->keys.high = j + 1;
    last->count++;
  }
  for (const auto& [id, run] : runs) scattered |= run.count != run.keys.high - run.keys.low;
  keys.reserve(std::size_t(sq));
  const Run nowhere{{0, 0}, 0, -1};
  const Run* own = &nowhere;
  for (index_t i = 0; i < sq; i++) {
    if (i == 0 || q_ids[i] != q_ids[i - 1]) {
      const auto found = runs.find(q_ids[i]);
      own = found == runs.end() ? &nowhere : &found->second;
    }
    keys.push_back(own->keys);
    if (scattered) q_number.push_back(own->number);
  }
  if (scattered)
    for (index_t j = 0; j < sk; j++) k_number.push_back(runs.at(k_ids[j]).number);
}

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
  const index_t group = c.kv_heads ? c.heads / c.kv_heads : 1;
  const auto is_few = [&](index_t b) {
    return c.sq[std::size_t(b)] * group <= kernels.few_queries && !c.dropout.threshold;
  };
  Numbering numbering;
  for (index_t b = 0; b < c.batch; b++)
    numbering.add(is_few(b) ? c.kv_heads : c.heads * ceil_div(c.sq[std::size_t(b)], step));
  const auto head_at = [&](index_t b, index_t h) -> ForwardHead {
    const std::size_t i = std::size_t(b);
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
            c.rules(b, h),
            c.pages.table ? Pages{c.pages.table + b * c.page_columns, c.pages.rows, c.pages.k_page,
                                  c.pages.v_page}
                          : Pages{}};
  };
  struct Place {
    index_t b, h, g, begin, end;
  };
  const auto place = [&](index_t task) -> Place {
    const index_t b = numbering.sample(task), local = task - numbering.first[std::size_t(b)];
    const index_t sq = c.sq[std::size_t(b)], blocks = ceil_div(sq, step), h = local / blocks;
    const index_t begin = (blocks - 1 - local % blocks) * step;  // causal: longest first
    return {b, h, h / group, begin, std::min(begin + step, sq)};
  };
  return run_tasks(numbering.total(), flops, threads, loop, [&](index_t task) {
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
    if (!c.pages.table && task + threads < numbering.total() &&
        !is_few(numbering.sample(task + threads))) {
      const Place p = place(task + threads);
      next = {c.q.at(p.b, p.h),    c.k.at(p.b, p.g), c.v.at(p.b, p.g),
              c.out.at(p.b, p.h),  p.begin,          p.end,
              p.b != b || p.g != g};
    }
    kernels.forward(head, begin, end, next,
                    thread_scratch(kernels.forward_scratch(head, end - begin)));
  });
}

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

double measure_peak(DType dtype, int threads) {
  const Kernels& kernels = kernels_in(best_table(), dtype);
  double best = 0;
  for (int i = 0; i < 5; i++) {
    Loop loop{};
    std::vector<double> flops(std::size_t(threads), 0.0);
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, loop,
                 [&](index_t t) { flops[std::size_t(t)] = kernels.multiply_adds(2000000); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double sum = 0;
    for (const double f : flops) sum += f;
    best = std::max(best, sum / seconds.count());
  }
  return best;
}

double measure_bandwidth(int threads) {
  constexpr std::size_t piece = 1 << 20, pieces = 256;
  const auto data = std::make_unique<char[]>(piece * pieces);
  double best = 0;
  for (int i = 0; i < 5; i++) {
    Loop loop{};
    const auto start = std::chrono::steady_clock::now();
    parallel_for(index_t(pieces), threads, loop, [&](index_t t) {
      kernel_table().read(data.get() + std::size_t(t) * piece, piece);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(piece * pieces) / seconds.count());
  }
  return best;
}

}  // namespace fusedattn
