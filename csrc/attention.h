// Attention on whole tensors: what the bindings hand over, and the division of the work over
// threads.
#pragma once

#include <vector>

#include "kernel/task.h"
#include "parallel.h"

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
  std::vector<index_t> sq, sk, q_offset, q_length, kv_length;
  Tensor q, k, v, out;
  Tensor mask, bias;
  Tensor dout, dq, dk, dv,
      dbias;  // backward; data null: gradient not needed; dbias in the compute type, zeroed
  char* lse = nullptr;  // element (b, h, i) at lse_batch[b] + h * lse_head + i, in elements
  std::vector<index_t> lse_batch;
  index_t lse_head = 0;
  double scale = 1.0;
  index_t left = UNBOUNDED, right = UNBOUNDED;  // the window; causal: right = 0
  int threads = 1;

  Rules rules(index_t b, index_t h) const {
    const std::size_t i = std::size_t(b);
    return {q_offset[i], left, right, q_length[i], kv_length[i], mask.at(b, h), bias.at(b, h)};
  }
};

// Both return false if interrupted. Throw std::bad_alloc.
bool attention_forward(const Call& call, Loop& loop);
bool attention_backward(const Call& call, Loop& loop);

// Limits of the machine with `threads` threads: multiply-add flops a second, bytes read a second.
double measure_peak(DType dtype, int threads);
double measure_bandwidth(int threads);

}  // namespace fusedattn
