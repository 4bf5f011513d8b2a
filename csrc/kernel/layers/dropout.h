// Dropout of a layer's outputs. That of attention's probabilities is rules/dropout.h.
#pragma once

#include "kernel/layer_task.h"
#include "kernel/layers/columns.h"

namespace fusedattn {
namespace {

// The random word of element i is a hash of the seed and i, so that nothing need be kept: two
// rounds of multiply and xor-shift with the constants of MurmurHash3's finalizer (Appleby).
FA_INLINE uint32_t mixed(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

template <class T> FA_ENTRY void drop_rows(const DropRows& d, index_t begin, index_t end) {
  const T scale = T(d.scale);
  for (index_t r = begin; r < end; r++) {
    const T* x = row_of<const T>(d.x, r);
    const T* added = d.added.data ? row_of<const T>(d.added, r) : nullptr;
    T* y = row_of<T>(d.y, r);
    // One key for each row, from all bits of the seed and of the row's number.
    const uint64_t row = uint64_t(r);
    uint32_t key = mixed(uint32_t(d.seed) ^ uint32_t(row));
    key = mixed(key + uint32_t(d.seed >> 32)) ^ uint32_t(row >> 32);
    for (index_t c = 0; c < d.width; c++) {
      const bool kept = mixed(mixed(uint32_t(c) + 0x9e3779b9u) ^ key) < d.threshold;
      const T v = kept ? x[c] * scale : T(0);
      y[c] = added ? v + added[c] : v;
    }
  }
}

}  // namespace
}  // namespace fusedattn
