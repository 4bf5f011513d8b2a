// What backward keeps for every query: two numbers that forward's results say about its softmax,
// and the sums that become dq where dq itself cannot hold them.
//
// Computes nothing about keys. Called by backward.cpp, before its tasks or inside them, and once
// more when all are done.
#pragma once

#include <memory>

#include "attention/call.h"
#include "attention/tasks.h"

namespace fusedattn {

struct Statistics {
  std::unique_ptr<char[]> data, dq_data;
  char *lse2, *delta;  // elements where lse has them: lse * log2(e), and rowsum(dout * out) - dlse
  Tensor dq;           // the call's, or with dq_data sums of its own, in the compute type

  explicit Statistics(const Call& c);  // makes room

  // For queries [begin, end) of a head: lse2 and delta; dq set to zero. dout and dq are the head's,
  // wherever the caller has them.
  void compute(const Call& c, const Kernels& kernels, index_t b, index_t h, index_t begin,
               index_t end, const Matrix& dout, const Matrix& head_dq) const;

  // dsinks of a head: -sum over queries of exp(sink - lse) * delta.
  double sink_gradient(const Call& c, index_t h) const;
};

// dq is the sum of dS K times the scale. It is applied to K, but for one out of the ordinary, which
// could take K out of range although dq is in it: of that only half goes there, in powers of two.
double key_scale(const Call& c);

// Runs body(b, h, begin, end) over ranges of queries; false if interrupted.
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

}  // namespace fusedattn
