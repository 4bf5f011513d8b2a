// What a boolean mask says of a block of queries and keys as a whole, so that blocks it hides are
// left out and those it shows need no look at it.
#pragma once

#include "kernel/rules/intervals.h"

namespace fusedattn {
namespace {

// Of the pairs of a block: are they hidden, or shown? Not looked at yet: unknown.
enum class Cover : std::uint8_t { unknown, none, some, all };

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
// What was seen so far of a block.
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
// Finds out what the mask says of one row of covers, for COVERS_AT_ONCE blocks of keys from
// `column` on: a row of the mask may be pages from the next. Others may look at the same time, and
// find the same.
inline constexpr int COVERS_AT_ONCE = 16;
FA_NOINLINE void look_at_mask(const Matrix& mask, const Covers& covers, index_t columns,
                              index_t row, index_t column) {
  const int count = int(min_index(COVERS_AT_ONCE, columns - column));
  const index_t first = row * COVER_ROWS, last = min_index(first + COVER_ROWS, covers.queries);
  Seen seen[COVERS_AT_ONCE];
  bool open = true;
  for (index_t q = first; q < last && open; q++) {
    const char* p = mask.data + q * mask.row;
    open = false;
    for (int i = 0; i < count; i++) {
      const index_t from = (column + i) * COVER_KEYS,
                    to = min_index(from + COVER_KEYS, covers.keys);
      if (mask.col == 1) prefetch_far(p + 2 * mask.row + from);
      if (!seen[i].decided())
        seen[i].add_row(p + from * mask.col, mask.col, mask.col ? to - from : 1);
      open |= !seen[i].decided();
    }
  }
  std::uint8_t* said = covers.said + row * columns + column;
  for (int i = 0; i < count; i++)
    __atomic_store_n(said + i, std::uint8_t(seen[i].cover()), __ATOMIC_RELAXED);
}

// What the mask says of queries [q0, q0 + nq) and keys [k0, k0 + nk), or of a few more.
FA_NOINLINE Cover cover_of(const Rules& rules, index_t q0, index_t nq, index_t k0, index_t nk) {
  const Covers& covers = rules.covers;
  if (!rules.mask.data) return Cover::all;
  if (!covers.said) return Cover::some;
  const index_t columns = (covers.keys + COVER_KEYS - 1) / COVER_KEYS;
  const bool same = rules.mask.row == 0;  // for every query
  const index_t first = same ? 0 : q0 / COVER_ROWS, last = same ? 0 : (q0 + nq - 1) / COVER_ROWS;
  bool any = false, all = true;
  for (index_t row = first; row <= last; row++)
    for (index_t column = k0 / COVER_KEYS; column <= (k0 + nk - 1) / COVER_KEYS; column++) {
      const std::uint8_t* said = covers.said + row * columns + column;
      if (Cover(__atomic_load_n(said, __ATOMIC_RELAXED)) == Cover::unknown)
        look_at_mask(rules.mask, covers, columns, row, column);
      const Cover own = Cover(__atomic_load_n(said, __ATOMIC_RELAXED));
      any |= own != Cover::none;
      all &= own == Cover::all;
      if (any && !all) return Cover::some;
    }
  return all ? Cover::all : Cover::none;
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
