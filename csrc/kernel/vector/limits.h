// What the machine can do at most, measured with the same instructions as the kernels use.
// No kernel uses it: attention/limits.cpp calls it through the table.
#pragma once

#include "kernel/vector/pairs.h"

namespace fusedattn {
namespace {

// Twelve independent chains of multiply-adds: more than latency times throughput anywhere.
template <class E> FA_ENTRY double multiply_adds(index_t rounds) {
  using T = Compute<E>;
  Vec<T> acc[12];
  FA_UNROLL
  for (int i = 0; i < 12; i++) acc[i] = splat(T(i));
  Vec<T> x = splat(T(0.999)), y = splat(T(0.001));
  for (index_t r = 0; r < rounds; r++) {
    keep_in_register(x);
    keep_in_register(y);
    FA_UNROLL
    for (int i = 0; i < 12; i++) {
      acc[i] = PAIRS<E> ? multiply_add<E>(x, y, acc[i]) : fma<T>(acc[i], x, y);
      keep_in_register(acc[i]);
    }
  }
  T sum = 0;
  FA_UNROLL
  for (int i = 0; i < 12; i++) sum += sum_lanes<T>(acc[i]);
  volatile T sink = sum;
  (void)sink;
  return double(rounds) * 12 * W<T> * (PAIRS<E> ? 4 : 2);
}

// Reads every cache line once with vector loads.
FA_ENTRY double read_stream(const char* data, size_t bytes) {
  const float* p = reinterpret_cast<const float*>(data);
  const index_t n = index_t(bytes / sizeof(float));
  Vec<float> sum[8] = {};
  for (index_t i = 0; i + 8 * W<float> <= n; i += 8 * W<float>) {
    FA_UNROLL
    for (int j = 0; j < 8; j++) sum[j] += load(p + i + j * W<float>);
  }
  float total = 0;
  FA_UNROLL
  for (int j = 0; j < 8; j++) total += sum_lanes<float>(sum[j]);
  return double(total);
}

}  // namespace
}  // namespace fusedattn
