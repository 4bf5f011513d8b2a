// Dividing up the scratch that the work division hands to a kernel.
#pragma once

#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

// Cuts a piece of scratch off the front; pieces are aligned to a cache line.
template <class T> FA_INLINE T* carve(char*& scratch, index_t elements) {
  T* p = reinterpret_cast<T*>(scratch);
  scratch += (elements * index_t(sizeof(T)) + 63) / 64 * 64;
  return p;
}

}  // namespace
}  // namespace fusedattn
