// Calls of attention, forward and backward, that the tests and the hashes of bits are made of.
#pragma once

#include <vector>

#include "numbers.h"

namespace fusedattn::test {

// One call: sizes, and which rules it has. What a rule is made of (slopes, sinks, segments) follows
// from the sizes.
struct AttentionCase {
  const char* name;
  index_t batch = 1, heads = 2, kv_heads = 2, sq = 40, sk = 150, d = 16, d_v = 16;
  index_t offset = 0, left = UNBOUNDED, right = UNBOUNDED;  // causal: right = 0
  index_t q_padding = 0, padding = 0;                       // queries and keys at the end
  enum { one, in_runs, scattered } segments = one;
  bool mask = false;                         // one (sq, sk) for all samples and heads
  enum { none, full, per_key } bias = none;  // (heads, sq, sk), or (sk); for all samples
  double softcap = 0, dropout = 0;
  bool alibi = false, sinks = false, dlse = false;
  index_t page_rows = 0;  // of the pages that forward reads keys and values from; 0: none
  double scale = 0;       // 0: 1 / sqrt(d)
  double q_factor = 1;    // queries are so much larger than normal
  bool fits_float16 = true;
  bool bshd = false;  // (batch, rows, heads, columns) in memory

  double logit_scale() const { return scale != 0 ? scale : 1 / std::sqrt(double(d)); }
  index_t heads_for_each() const { return heads / kv_heads; }
  // Where row r of head h of sample b begins in an array of these heads, rows, columns.
  std::size_t at(index_t b, index_t h, index_t r, index_t all, index_t rows, index_t cols) const {
    return std::size_t((bshd ? (b * rows + r) * all + h : (b * all + h) * rows + r) * cols);
  }
  // Half j % 2 of word j % 8 / 2 of a counter is compared with its upper half.
  std::uint32_t dropout_threshold() const { return std::uint32_t(dropout * 0x1p16) << 16; }
  double dropout_scale() const { return 1 / (1 - dropout_threshold() * 0x1p-32); }
  static constexpr std::uint64_t dropout_seed = 0x123456789abcdef0;
};

struct AttentionInputs {
  Numbers q, k, v, dout, bias, dlse;
  Numbers slopes, sinks;   // (batch, heads), (heads)
  std::vector<char> mask;  // (sq, sk)
  std::vector<index_t> q_segments, k_segments;
};

const std::vector<AttentionCase>& attention_cases();  // every rule, and how rules meet
std::vector<AttentionCase> attention_sizes();         // edges of blocks and tiles

AttentionInputs draw(const AttentionCase& c, std::uint64_t seed);
// The nearest ones that T holds.
template <class T> AttentionInputs held(AttentionInputs in) {
  for (Numbers* x : {&in.q, &in.k, &in.v, &in.dout, &in.bias}) *x = widened(narrowed<T>(*x));
  return in;
}

// out, lse, dq, dk, dv and, where there are any, dbias and dsinks: by the kernels of the
// instruction set in use, and by plain loops in double precision.
template <class T> Results computed(const AttentionCase& c, const AttentionInputs& in, int threads);
Results expected(const AttentionCase& c, const AttentionInputs& in);

}  // namespace fusedattn::test
