// What a boolean mask says of a block of queries and keys as a whole, so that blocks it hides are
// left out and those it shows need no look at it.
#pragma once

#include "kernel/rules/intervals.h"

namespace fusedattn {
namespace {

// What the boolean mask says of a tile as a whole.
enum class Cover { none, some, all };

typedef uint8_t Bytes __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
typedef uint8_t LooseBytes
    __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES), aligned(1), may_alias));

FA_INLINE bool any_byte(Bytes b) {
  const Wide w = (Wide)b;
  uint64_t any = 0;
  FA_UNROLL
  for (int i = 0; i < WIDE; i++) any |= w[i];
  return any != 0;
}
struct Seen {
  bool any = false, all = true;

  FA_INLINE_MEMBER void add_row(const char* p, index_t col, index_t n) {
    constexpr index_t width = FUSEDATTN_VECTOR_BYTES;
    Bytes seen{}, missing{};
    index_t k = 0;
    if (col == 1)
      for (; k + width <= n; k += width) {
        const Bytes b = *reinterpret_cast<const LooseBytes*>(p + k);
        seen |= b;
        missing |= (Bytes)(b == 0);
      }
    for (; k < n; k++) {
      any |= p[k * col] != 0;
      all &= p[k * col] != 0;
    }
    any |= any_byte(seen);
    all &= !any_byte(missing);
  }
  FA_INLINE_MEMBER bool decided() const { return any && !all; }
  FA_INLINE_MEMBER Cover cover() const {
    return decided() ? Cover::some : any ? Cover::all : Cover::none;
  }
};
FA_INLINE Cover mask_cover(const Matrix& mask, index_t q0, index_t nq, index_t k0, index_t nk) {
  if (mask.row == 0) nq = min_index(nq, 1);
  if (mask.col == 0) nk = min_index(nk, 1);
  Seen seen;
  for (index_t q = 0; q < nq && !seen.decided(); q++) {
    const char* p = mask.data + (q0 + q) * mask.row + k0 * mask.col;
    prefetch_far(p + DENSE_AHEAD * mask.col);
    prefetch_far(p + (DENSE_AHEAD + 64) * mask.col);
    seen.add_row(p, mask.col, nk);
  }
  return seen.cover();
}

// The same of queries [q0, q0 + nq), q0 a multiple of COVER_ROWS, and the keys of the block that
// `key` lies in, from what heads share.
FA_NOINLINE Cover shared_cover(const Rules& rules, index_t q0, index_t nq, index_t key) {
  const Covers& c = rules.covers;
  const index_t blocks = (c.sk + COVER_KEYS - 1) / COVER_KEYS, block = key / COVER_KEYS;
  bool any = false, all = true;
  for (index_t q = q0; q < q0 + nq; q += COVER_ROWS) {
    uint8_t& said = c.said[q / COVER_ROWS * blocks + block];
    uint8_t known = __atomic_load_n(&said, __ATOMIC_RELAXED);
    if (known == 0) {  // others may look at the same time, and find the same
      const index_t k0 = block * COVER_KEYS;
      known = uint8_t(mask_cover(rules.mask, q, min_index(COVER_ROWS, c.sq - q), k0,
                                 min_index(COVER_KEYS, c.sk - k0))) +
              1;
      __atomic_store_n(&said, known, __ATOMIC_RELAXED);
    }
    any |= Cover(known - 1) != Cover::none;
    all &= Cover(known - 1) == Cover::all;
  }
  return all ? Cover::all : any ? Cover::some : Cover::none;
}

// Of a mask that is the same for every query: leaves out keys of [k0, k1) that it hides at either
// end. Does it hide any in between?
FA_INLINE bool trim_hidden(const Matrix& mask, index_t& k0, index_t& k1) {
  const auto hides = [&](index_t key) { return mask.data[key * mask.col] == 0; };
  while (k1 > k0 && hides(k1 - 1)) k1--;
  while (k1 > k0 && hides(k0)) k0++;
  for (index_t key = k0; key < k1; key++)
    if (hides(key)) return true;
  return false;
}

}  // namespace
}  // namespace fusedattn
