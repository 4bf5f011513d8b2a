// Plain structs that travel from the work division (attention/) to the kernels (kernel/).
// No member functions that could be inlined for one instruction set and linked for another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedattn {

using index_t = std::int64_t;

inline constexpr index_t UNBOUNDED = index_t(1) << 61;  // a window's side without an end

// float16 and bfloat16 are computed in float32.
enum class DType { float32, float64, float16, bfloat16 };

// Rows and columns of one head: element (r, c) lies at data + r * row + c * col (strides in bytes).
struct Matrix {
  char* data;
  index_t row, col;
};

struct Interval {
  index_t low, high;
};

// Documents packed in one row: a query sees the keys of its own segment. keys[i] is the interval
// from the first to the last key of query i's segment. Where segments lie scattered, numbers tell
// which keys of the interval belong to it; where none does, they are null.
struct Segments {
  const Interval* keys;                     // (sq); null: no such rule
  const std::int32_t *q_number, *k_number;  // (sq), (sk)
};

// Dropout of probabilities: entry (i, j) is kept where half j % 2 of word j % 8 / 2 of Philox
// (kernel/rules/dropout.h) for the counter (j / 8, i, head, batch) is at least the upper half of
// `threshold`. 0: no dropout.
struct Dropout {
  std::uint32_t threshold, head, batch;
  std::uint64_t seed;
  double scale;  // of what is kept, 1 / (1 - p)
};

// What a mask says of each COVER_ROWS queries and COVER_KEYS keys, for all heads and samples that
// share it: whoever looks first writes down what is there, a Cover (kernel/rules/cover.h).
inline constexpr index_t COVER_ROWS = 16, COVER_KEYS = 64;
struct Covers {
  std::uint8_t* said;     // row after row of blocks, 0 at first; null: nothing is written down
  index_t queries, keys;  // of the mask; one query if it is the same for all
};

// Which keys a query may see, and what becomes of its logits and probabilities. Interval rules
// first; a dense part if need be.
struct Rules {
  index_t q_offset;     // position of query 0 among the keys
  index_t left, right;  // a query at position p sees keys p - left to p + right; causal: right = 0
  index_t q_length;     // queries at and beyond it are padding and see nothing
  index_t kv_length;    // keys at and beyond it are padding; at most sk
  Segments segments;
  Matrix mask;     // (sq, sk) of bytes, 0 = masked; data null if there is none
  Covers covers;   // of the mask
  Matrix bias;     // (sq, sk) of the element type, natural-log units; data null if there is none
  double softcap;  // logits become softcap * tanh(logits / softcap); 0: they do not
  double alibi_slope;  // logits fall by it with each position between query and key
  double sink;         // a logit that joins the sum only; -inf: none
  Dropout dropout;
};

// Keys and values in pages, as a cache keeps them: key j is row j % rows of page table[j / rows],
// and page p lies p * k_page (v_page) bytes from the start of k (of v).
struct Pages {
  const index_t* table;  // null: rows follow one another
  index_t rows, k_page, v_page;
};

// One query head against its key/value head.
struct ForwardHead {
  Matrix q, k, v;  // (sq, d), (sk, d), (sk, d_v)
  Matrix out;      // (sq, d_v)
  void* lse;       // (sq), natural log, compute type
  index_t sq, sk, d, d_v;
  double scale;
  Rules rules;
  Pages pages;
};

// Queries [begin, end) of the head that the same thread is likely to compute next; begin == end:
// nothing to fetch ahead.
struct NextQueries {
  Matrix q, k, v, out;
  index_t begin, end;
  bool new_keys;  // k and v are not those of the current head
};

// What several tasks add to is added in a fixed order, whoever computes it: before adding to query
// block i of query head g, a task waits until turns[g * head + i] equals its ordinal; then it sets
// it one higher. Samples of fewer query blocks take no turns at the others: `left_out` of the
// earlier ordinals, by query block (null: none). turns null: nobody else adds.
struct Turns {
  int* turns;
  index_t
      head;  // 0 if all query heads wait for the same turns; their ordinals then count up with g
  int ordinal;
  const int* left_out;
};

// Keys [begin, end) that the same thread is likely to take next, with the queries of the first head
// that reads them; data null: nothing to fetch ahead. out: if the head is another one.
struct NextKeys {
  Matrix k, v, q, dout, out, dq, mask, bias;
  index_t begin, end, sq;
};

// One key/value head with the `group` query heads that share it.
struct BackwardHead {
  Matrix k, v, dk, dv;  // dk.data, dv.data null: not needed
  Matrix q, dout;       // of the first query head
  Matrix dq, dbias;     // likewise, in the compute type; data null: not needed
  index_t q_head, dout_head, dq_head, dbias_head, mask_head, covers_head,
      bias_head;             // bytes from one query head to the next
  const void *lse2, *delta;  // (group, sq): lse * log2(e), and rowsum(dout * out)
  index_t stat_head;         // elements from one query head to the next in lse2 and delta
  index_t group, sq, sk, d, d_v;
  double scale;
  double k_scale;              // of k on its way into dq; the rest joins at the end
  Rules rules;                 // of the first query head
  const double* alibi_slopes;  // (group); null: none
  const Interval* visible;     // keys that a block of queries sees, one interval a block
  Turns dq_turns,
      bias_turns;  // bias: one turn for all query blocks if the bias is broadcast over queries
  void (*wait_for_turn)(int* turn, int ordinal, const void* call);
  const void* call;
  NextKeys next;
};

// rowsum(dout * out) - dlse and the scaled LSE of one query head.
struct DeltaHead {
  Matrix out, dout;  // (sq, d_v)
  const void* lse;   // (sq)
  const char* dlse;  // (sq), dlse_step bytes apart, compute type; null: 0
  index_t dlse_step;
  void *lse2, *delta;  // (sq)
  index_t d_v;
};

// The functions of one element type.
struct Kernels {
  index_t query_block;   // forward: queries in the widest sub-block
  index_t sub_blocks;    // forward: of these in a task at most
  index_t few_queries;   // forward_few: queries of a group at most
  index_t least_dims;    // d + d_v below which those of `base` are faster
  index_t back_queries;  // backward: queries in a block, the unit of `turns`
  index_t back_keys;     // backward: keys in a block, the unit of its tasks
  std::size_t (*forward_scratch)(const ForwardHead&, index_t queries);
  void (*forward)(const ForwardHead&, index_t q_begin, index_t q_end, const NextQueries&,
                  void* scratch);
  std::size_t (*few_scratch)(const ForwardHead&);
  void (*forward_few)(const ForwardHead* heads, index_t group, void* scratch);
  void (*delta)(const DeltaHead&, index_t q_begin, index_t q_end);
  void (*visible_blocks)(const Rules&, index_t sq, index_t sk, Interval* blocks);
  std::size_t (*backward_scratch)(const BackwardHead&);
  void (*backward)(const BackwardHead&, index_t key_block, void* scratch);
  void (*round)(const void* sums, double factor, const Matrix& dst, index_t begin, index_t end,
                index_t cols);
  double (*multiply_adds)(
      index_t rounds);  // runs independent multiply-adds, returns how many flops that was
};

struct LayerKernels;  // layer_task.h

// What one instruction set offers.
struct KernelTable {
  const char* name;
  const KernelTable* base;    // has the kernels that are null here; null if none is
  const Kernels* kernels[4];  // by DType
  double (*read)(const char* data,
                 std::size_t bytes);  // plain streaming read, for the bandwidth limit
  const LayerKernels* layers[2];      // float32, float64
};

}  // namespace fusedattn
