// What forward and backward share in dividing work: which kernels, how many threads, which task.
//
// Decides nothing that a result depends on. Only forward.cpp and backward.cpp include this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention/call.h"
#include "isa/dispatch.h"
#include "threads/pool.h"

namespace fusedattn {

// May a factor be applied to an operand without a thought for the range of float32?
inline bool is_ordinary(double factor) {
  const double size = std::fabs(factor);
  return size == 0 || (size >= 0x1p-20 && size <= 0x1p20);
}
// Instructions for bfloat16 take subnormal numbers for 0, and pieces of small numbers are lost: not
// for a scale that is out of the ordinary, which q or k may have to be out of it too. An
// instruction set that was asked for by name is used for any d.
inline const Kernels& kernels_of(const Call& c) {
  const KernelTable& table = kernel_table();
  const Kernels* own = table.kernels[int(c.dtype)];
  if (!own || !table.base) return kernels_in(table, c.dtype);
  const bool ordinary =
      is_ordinary(c.scale) && (c.softcap == 0 || is_ordinary(c.scale / c.softcap));
  const bool worth = c.d + c.d_v >= own->least_dims || isa_is_forced();
  return ordinary && worth ? *own : kernels_in(*table.base, c.dtype);
}
inline index_t compute_size(DType dtype) {
  return dtype == DType::float64 ? 8 : 4;
}
inline bool is_narrow(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16;
}
inline index_t ceil_div(index_t a, index_t b) {
  return (a + b - 1) / b;
}

// Query-key pairs that are computed, about: a window or a causal mask leaves its part of a row.
inline double pairs(const Call& c) {
  double n = 0;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++) {
    const double keys = double(c.sk[b]), left = std::min(double(c.left), keys / 2),
                 right = std::min(double(c.right), keys / 2);
    n += double(c.sq[b]) * std::min(keys, left + right + 1);
  }
  return n * double(c.heads);
}

// A thread more for each 1.5 MFLOP: below that, waking it costs more than it brings.
inline int worthwhile_threads(int threads, double flops) {
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

// What a mask says of its blocks, found out once for all heads and samples that share them.
class MaskCovers {
 public:
  explicit MaskCovers(const Call& c) : call_(c) {
    if (!c.mask.data) return;
    for (std::size_t b = 0; b < std::size_t(c.batch); b++) {
      const bool again = b > 0 && c.mask.batch[b] == c.mask.batch[b - 1] &&
                         c.sq[b] == c.sq[b - 1] && c.sk[b] == c.sk[b - 1];
      first_.push_back(again ? first_.back() : said_.size());
      if (!again) said_.resize(said_.size() + std::size_t(heads() * head(index_t(b))));
    }
  }
  Covers at(index_t b, index_t h) {
    if (first_.empty()) return {nullptr, 0, 0};
    const std::size_t i = std::size_t(b);
    return {said_.data() + first_[i] + (heads() > 1 ? h * head(b) : 0), queries(b), call_.sk[i]};
  }
  // Bytes from one query head to the next.
  index_t step(index_t b) const { return !first_.empty() && heads() > 1 ? head(b) : 0; }

 private:
  index_t heads() const { return call_.mask.head != 0 ? call_.heads : 1; }
  index_t queries(index_t b) const { return call_.mask.row != 0 ? call_.sq[std::size_t(b)] : 1; }
  index_t head(index_t b) const {
    return ceil_div(queries(b), COVER_ROWS) * ceil_div(call_.sk[std::size_t(b)], COVER_KEYS);
  }

  const Call& call_;
  std::vector<std::size_t> first_;  // of each sample; empty: no mask
  std::vector<std::uint8_t> said_;
};

// Work that a thread claims at once: tasks next to each other are neighbours in memory. Where they
// wait for each other, only what an atomic operation is worth.
inline constexpr double CLAIM = 4e6, CLAIM_IN_TURN = 2e5;

// Runs body(task, then), tasks that are smaller than a claim put together. `then`: a task that this
// thread will come to, or -1, whose numbers it may fetch now; not the very next if that is small,
// or they would come too late.
template <class F>
bool run_tasks(index_t tasks, double flops, double claim, int threads, Loop& loop, F&& body) {
  const double each = flops / double(std::max<index_t>(tasks, 1));
  const index_t together = std::clamp<index_t>(index_t(claim / (each + 1)), 1,
                                               std::max<index_t>(1, tasks / (4 * threads)));
  return parallel_for(ceil_div(tasks, together), threads, loop, [&](index_t chunk) {
    const index_t begin = chunk * together, end = std::min(tasks, begin + together);
    for (index_t t = begin; t < end; t++) {
      const index_t later = t - begin + (together > 1 ? 2 : 1);
      const index_t then = begin + later / together * together * threads + later % together;
      body(t, then < tasks ? then : -1);
    }
  });
}

}  // namespace fusedattn
