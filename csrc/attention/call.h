// One call of attention on whole tensors: what the bindings hand over, and what runs it.
//
// A Call is taken at its word: shapes fit, lengths are in range and memory is there, since the
// bindings have checked every argument by name; nothing here knows of Python. Called with the GIL
// released; the memory that a Call points to belongs to the caller.
#pragma once

#include <limits>
#include <vector>

#include "attention/segments.h"
#include "kernel/task.h"
#include "threads/pool.h"

namespace fusedattn {

// A tensor seen as (batch, head, row, column); strides in bytes. data null: not given.
struct Tensor {
  char* data = nullptr;
  std::vector<index_t> batch;  // offset in bytes of each sample
  index_t head = 0, row = 0, col = 0;

  Matrix at(index_t b, index_t h) const {
    if (!data) return {nullptr, 0, 0};
    return {data + batch[std::size_t(b)] + h * head, row, col};
  }
};

// One call, forward or backward. Sample b has sq[b] queries and sk[b] keys.
struct Call {
  DType dtype = DType::float32;
  index_t batch = 0, heads = 0, kv_heads = 0, d = 0, d_v = 0;
  std::vector<index_t> sq, sk;
  Tensor q, k, v, out;
  char* lse = nullptr;  // element (b, h, i) at lse_batch[b] + h * lse_head + i, in elements
  std::vector<index_t> lse_batch;
  index_t lse_head = 0;
  Pages pages{nullptr, 0, 0, 0};  // forward; table (batch, columns) if k and v are pages
  index_t page_columns = 0;
  int threads = 1;

  // The rules; those that differ from sample to sample have an entry for each.
  std::vector<index_t> q_offset, q_length, kv_length;
  Tensor mask, bias;
  double scale = 1.0, softcap = 0.0;
  index_t left = UNBOUNDED, right = UNBOUNDED;  // the window; causal: right = 0
  std::vector<SegmentTable> segments;           // one a sample, or none
  std::vector<double> alibi_slopes;             // (batch, heads), or none
  std::vector<double> sinks;                    // (heads), or none
  Dropout dropout{0, 0, 0, 0, 1.0};

  // Backward. Gradients without data are not needed; dbias is in the compute type and zeroed.
  Tensor dout, dq, dk, dv, dbias;
  Tensor dlse;                 // (sq) of each head, `row` apart, compute type; or none
  std::vector<double> dsinks;  // (heads) if needed

  // The rules of one head.
  Rules rules(index_t b, index_t h) const {
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
};

// Both return false if interrupted. Throw std::bad_alloc.
bool attention_forward(const Call& call, Loop& loop);
bool attention_backward(Call& call, Loop& loop);

}  // namespace fusedattn
