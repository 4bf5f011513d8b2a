// Scratch that lays itself out: the code that takes its pieces measures them as well, so that a
// size and a layout cannot disagree. The work division owns the memory and hands it in.
#pragma once

#include "kernel/vector/vec.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void*, std::size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, std::size_t);
#endif

namespace fusedattn {
namespace {

class Layout {
 public:
  // Over `scratch`, aligned to a cache line; null: pieces are only measured.
  FA_INLINE_MEMBER explicit Layout(void* scratch)
      : begin_(reinterpret_cast<uintptr_t>(scratch)), at_(begin_) {}

  // A piece of n elements, aligned to a cache line, neither initialised nor, while measuring,
  // there.
  template <class T> FA_INLINE_MEMBER T* take(index_t n) {
    T* const piece = reinterpret_cast<T*>(at_);
    const uintptr_t bytes = uintptr_t(n) * sizeof(T);
    at_ += (bytes + 63) / 64 * 64;
    guard(piece, bytes);
    return piece;
  }
  // Room that nobody uses.
  FA_INLINE_MEMBER void skip(index_t bytes) { at_ += uintptr_t(bytes); }
  FA_INLINE_MEMBER size_t bytes() const { return at_ - begin_; }

 private:
  // Under AddressSanitizer what lies between two pieces must not be touched.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr uintptr_t GUARD = 64;
  FA_INLINE_MEMBER void guard(void* piece, uintptr_t bytes) {
    at_ += GUARD;
    if (!begin_) return;
    const uintptr_t end = reinterpret_cast<uintptr_t>(piece) + bytes;
    __asan_unpoison_memory_region(piece, bytes);
    __asan_poison_memory_region(reinterpret_cast<void*>(end), at_ - end);
  }
#else
  FA_INLINE_MEMBER void guard(void*, uintptr_t) {}
#endif

  uintptr_t begin_, at_;
};

}  // namespace
}  // namespace fusedattn
