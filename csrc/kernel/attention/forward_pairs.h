// What differs in the forward pass where bfloat16 is multiplied in pairs. Q, K and V enter as they
// are and P rounded to bfloat16, so scale * log2(e) is applied to the scores, and P is normalised
// with the sum of its rounded values: out is a mean of rows of V whatever the rounding. The LSE
// keeps the sum of the unrounded ones.
//
// Cost for two keys of 64 queries: 8 exponentials, 4 roundings and permutations, 4 products with
// (1, 1) for the sums. At d = 64 this is about a tenth of the products' time.
#pragma once

#include "kernel/attention/dense_queries.h"
#include "kernel/attention/forward_steps.h"

namespace fusedattn {
namespace {

#if defined(__AVX512BF16__)

// P = exp2(S - max), words of two keys in place of S: word row i holds keys 2 i and 2 i + 1.
template <int NQ>
FA_NOINLINE void exponentials_in_pairs(index_t n, float* p, const float* block_max, float* max_io,
                                       float* sum_io, float* total_io, float* rescale,
                                       Fetcher& fetcher) {
  using T = float;
  const Vec<T> ones = ones_words();
  Vec<T> max[NQ], sum[NQ], total[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    const Vec<T> before = load(max_io + j * W<T>);
    max[j] = max_or_second<T>(load(block_max + j * W<T>), before);
    store(max_io + j * W<T>, max[j]);
    store(rescale + j * W<T>, exp2<T>(before - max[j]));
    sum[j] = total[j] = Vec<T>{};
  }
  const auto step = [&](index_t i, bool single) FA_LAMBDA {
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      const T* at = p + (i * NQ + j) * W<T>;
      const Vec<T> a = exp2<T>(load(at) - max[j]);
      const Vec<T> b = single ? Vec<T>{} : exp2<T>(load(at + NQ * W<T>) - max[j]);
      sum[j] += a;
      sum[j] += b;
      const Vec<T> both = rounded_words(a, b);
      total[j] = multiply_add<BFloat>(both, ones, total[j]);
      store(p + (i / 2 * NQ + j) * W<T>, both);
    }
  };
#pragma GCC unroll 1
  for (index_t i = 0; i + 2 <= n; i += 2) {
    fetch(fetcher, 2);
    step(i, false);
  }
  if (n % 2) step(n - 1, true);
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    const Vec<T> r = load(rescale + j * W<T>);
    store(sum_io + j * W<T>, fma<T>(load(sum_io + j * W<T>), r, sum[j]));
    store(total_io + j * W<T>, fma<T>(load(total_io + j * W<T>), r, total[j]));
  }
}

// values, leaving out masked entries: for blocks where V holds something that is not finite. Range
// r of the keys, from cut[r] on, has the dense part dense[r]; n words from cut[0].
template <int NQ>
FA_NOINLINE void careful_values_in_pairs(index_t n, Rows<float> v, const float* p,
                                         const Dense<float> (&dense)[3], const index_t (&cut)[4],
                                         index_t d_v, float* o, const float* rescale) {
  using T = float;
  alignas(64) uint32_t seen[KEY_BLOCK / 2 * LANES<T>];  // all bits of an element: not masked
  for (index_t w = 0; w < n; w++)
    for (int j = 0; j < NQ; j++) {
      Words mask{};
      for (int half = 0; half < 2; half++) {
        const index_t key = cut[0] + 2 * w + half;
        const int r = (key >= cut[1]) + (key >= cut[2]);
        if (key >= cut[3]) continue;
        Words here = ~Words{};
        if (dense[r].data)
          here = (Words)(dense_at(dense[r], key - cut[r], j) != splat(-Bits<T>::infinity));
        mask |= here & (0xffffu << (16 * half));
      }
      store(reinterpret_cast<float*>(seen) + (w * NQ + j) * W<T>, (Vec<T>)mask);
    }
  for (index_t i = 0; i < d_v; i++) FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    T* at = o + (i * NQ + j) * W<T>;
    Vec<T> acc{};
    for (index_t w = 0; w < n; w++) {
      const index_t place = (w * NQ + j) * W<T>;
      const Words value = (Words)splat_operand<BFloat>(v.data + w * v.ld + i);
      const Words mask = (Words)load(reinterpret_cast<const float*>(seen) + place);
      acc = multiply_add<BFloat>((Vec<T>)(value & mask), load(p + place), acc);
    }
    store(at, fma<T>(load(at), load(rescale + j * W<T>), acc));
  }
}

#endif

}  // namespace
}  // namespace fusedattn
