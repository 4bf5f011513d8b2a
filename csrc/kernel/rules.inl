// Which keys a query sees: an interval [low, high) for a row, and a dense part (mask, bias) for a
// tile if need be.

// The one place where interval rules become keys. Query i may see keys [low, high), empty if low >=
// high.
FA_INLINE Interval visible_keys(const Rules& rules, index_t i) {
  if (i >= rules.q_length) return {0, 0};
  const index_t p = i + rules.q_offset;
  Interval keys{max_index(0, p - rules.left),
                max_index(0, min_index(rules.kv_length, p + rules.right + 1))};
  if (rules.segments.keys) {
    const Interval own = rules.segments.keys[i];
    keys = {max_index(keys.low, own.low), min_index(keys.high, own.high)};
  }
  return keys;
}

// Over a range of queries: keys that some query sees lie in `any`, keys that every query sees are
// `all`.
struct Span {
  Interval any, all;
};
FA_INLINE Span visible_span(const Rules& rules, index_t begin, index_t end, index_t sk) {
  Span s{{sk, 0}, {0, sk}};
  if (begin < end && end <= rules.q_length && !rules.segments.keys) {
    // Both ends of the intervals ascend: the first and the last tell all if neither is empty.
    const Interval first = visible_keys(rules, begin), last = visible_keys(rules, end - 1);
    if (first.low < first.high && last.low < last.high)
      return {{min_index(first.low, sk), last.high}, {last.low, min_index(first.high, sk)}};
  }
  for (index_t i = begin; i < end; i++) {
    const Interval v = visible_keys(rules, i);
    if (v.low < v.high) {
      if (v.low < s.any.low) s.any.low = v.low;
      if (v.high > s.any.high) s.any.high = v.high;
    }
    if (v.low > s.all.low) s.all.low = v.low;
    if (v.high < s.all.high) s.all.high = v.high;
  }
  return s;
}

inline constexpr index_t DENSE_AHEAD = 128;  // keys fetched ahead: a block of forward's

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

// Is there something to add to the logits, or to be told pair by pair?
FA_INLINE bool has_dense(const Rules& rules, bool use_mask) {
  return use_mask || rules.bias.data || rules.alibi_slope != 0 || rules.segments.q_number;
}
// The dense part is the same for every query (a padding mask, a bias over keys).
FA_INLINE bool dense_is_per_key(const Rules& rules, bool use_mask) {
  return (!rules.bias.data || rules.bias.row == 0) && (!use_mask || rules.mask.row == 0) &&
         rules.alibi_slope == 0 && !rules.segments.q_number;
}

// Logits come out in log2 units, or ready for tanh: queries are multiplied by `before` on their way
// in and the products by `after`, which is 1 unless the scale is so far from 1 that queries times
// it might leave the numbers' range although the logits do not. Then `before` is a power of two
// half way from 1 to the scale. No operand whose logit is a number is taken out of range by it, and
// neither are keys that are multiplied by it too.
struct Factors {
  double before, after;
};
FA_INLINE double half_way(double size, int64_t most) {
  uint64_t bits;
  __builtin_memcpy(&bits, &size, sizeof(bits));
  const int64_t half = (int64_t(bits >> 52) - 1023) / 2;
  bits = uint64_t(1023 + max_index(min_index(half, most), -most)) << 52;
  __builtin_memcpy(&size, &bits, sizeof(bits));
  return size;
}
template <class T> FA_INLINE Factors logit_factors(double scale, const Rules& rules) {
  const bool bent = rules.softcap > 0;
  const double whole = bent ? scale / rules.softcap : scale, unit = bent ? 1 : LOG2E,
               size = whole < 0 ? -whole : whole, usual = sizeof(T) == 4 ? 0x1p20 : 0x1p400;
  if (size == 0 || (size <= usual && size >= 1 / usual)) return {whole * unit, 1};
  const double before = half_way(size, sizeof(T) == 4 ? 62 : 510);
  return {before, whole / before * unit};
}
