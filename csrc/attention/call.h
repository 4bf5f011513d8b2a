// One call of attention on whole tensors: what the bindings hand over, and what runs it.
//
// A Call is taken at its word: shapes fit, lengths are in range and memory is there, since the
// bindings have checked every argument by name; nothing here knows of Python. Called with the GIL
// released; the memory that a Call points to belongs to the caller.
#pragma once

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
  std::vector<index_t> sq, sk, q_offset, q_length, kv_length;
  Tensor q, k, v, out;
  Tensor mask, bias;
  Tensor dout, dq, dk, dv,
      dbias;  // backward; data null: gradient not needed; dbias in the compute type, zeroed
  char* lse = nullptr;  // element (b, h, i) at lse_batch[b] + h * lse_head + i, in elements
  std::vector<index_t> lse_batch;
  index_t lse_head = 0;
  double scale = 1.0, softcap = 0.0;
  index_t left = UNBOUNDED, right = UNBOUNDED;  // the window; causal: right = 0
  std::vector<SegmentTable> segments;           // one a sample, or none
  std::vector<double> alibi_slopes;             // (batch, heads), or none
  std::vector<double> sinks;                    // (heads), or none
  Dropout dropout{0, 0, 0, 0, 1.0};
  Pages pages{nullptr, 0, 0, 0};  // forward; table (batch, columns) if k and v are pages
  index_t page_columns = 0;
  Tensor dlse;                 // backward; (sq) of each head, `row` apart, compute type
  std::vector<double> dsinks;  // backward; (heads) if needed
  int threads = 1;

  Rules rules(index_t b, index_t h) const;
};

// Both return false if interrupted. Throw std::bad_alloc.
bool attention_forward(const Call& call, Loop& loop);
bool attention_backward(Call& call, Loop& loop);

}  // namespace fusedattn
