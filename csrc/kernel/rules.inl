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

FA_NOINLINE Cover mask_cover(const Matrix& mask, index_t q0, index_t nq, index_t k0, index_t nk) {
  bool any = false, all = true;
  if (mask.row == 0) nq = min_index(nq, 1);
  if (mask.col == 0) nk = min_index(nk, 1);
  for (index_t q = 0; q < nq; q++) {
    const char* p = mask.data + (q0 + q) * mask.row + k0 * mask.col;
    unsigned char seen = 0, missing = 0;
    prefetch_far(p + DENSE_AHEAD * mask.col);
    prefetch_far(p + (DENSE_AHEAD + 64) * mask.col);
    if (mask.col == 1)
      for (index_t k = 0; k < nk; k++)
        seen |= (unsigned char)p[k], missing |= (unsigned char)(p[k] == 0);
    else
      for (index_t k = 0; k < nk; k++)
        seen |= (unsigned char)p[k * mask.col], missing |= (unsigned char)(p[k * mask.col] == 0);
    any |= seen != 0;
    all &= missing == 0;
    if (any && !all) return Cover::some;
  }
  return any ? Cover::all : Cover::none;
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

// Queries are multiplied by this on their way in: logits come out in log2 units, or ready for tanh.
FA_INLINE double logit_scale(double scale, const Rules& rules) {
  return rules.softcap > 0 ? scale / rules.softcap : scale * LOG2E;
}

template <class T> FA_INLINE Vec<T> add_bias(Vec<T> bias, Vec<T> x) {
  const Vec<T> sum = fma<T>(bias, splat(T(LOG2E)), x);
  return bias == splat(-Bits<T>::infinity) ? bias : max_or_second<T>(splat(Bits<T>::lowest), sum);
}

// row[k] = what is added to the logits of one query and keys [k0, k0 + n), times log2(e): ALiBi and
// bias; -inf where mask or segments forbid or the bias is -inf. A bias so low that its product
// would be -inf stays finite: where all of a row is that low, no key is masked. Writes up to a
// multiple of W. Fetches the bias of the keys that come next: rows of a matrix in DRAM are too
// short for the hardware to see it coming.
template <class E, class T = Compute<E>>
FA_NOINLINE void dense_row(const Rules& rules, bool use_mask, index_t q, index_t k0, index_t n,
                           T* row) {
  const Matrix& bias = rules.bias;
  const bool native =
      bias.data && is_native<E>({bias.data, 0, bias.col}) && bias.row % index_t(sizeof(E)) == 0;
  const char* b = bias.data ? bias.data + q * bias.row + k0 * bias.col : nullptr;
  // Distances are small integers, exact; counted from a fixed key, so that the bits do not depend
  // on k0.
  const index_t from = k0 / 64 * 64;
  const Vec<T> zero{}, position = splat(T(q + rules.q_offset - from)),
                       slope = splat(T(-rules.alibi_slope * LOG2E));
  Vec<T> key = splat(T(k0 - from)) + lane_numbers<T>();
  for (index_t k = 0; k < n; k += W<T>) {
    Vec<T> x{};
    if (rules.alibi_slope != 0) {
      const Vec<T> ahead = key - position;
      x = slope * (ahead < zero ? -ahead : ahead);
      key += splat(T(W<T>));
    }
    if (native && k + W<T> <= n) {
      prefetch_far(b + (k + DENSE_AHEAD) * bias.col);
      x = add_bias<T>(load_as<E>(b + k * bias.col), x);
    } else if (b) {
      x = add_bias<T>(gather_as<E>(b + k * bias.col, bias.col, int(min_index(W<T>, n - k))), x);
    }
    store(row + k, x);
  }
  if (use_mask) {
    const char* p = rules.mask.data + q * rules.mask.row + k0 * rules.mask.col;
    if (rules.mask.col == 1)
      for (index_t k = 0; k < n; k++) row[k] = p[k] ? row[k] : -Bits<T>::infinity;
    else
      for (index_t k = 0; k < n; k++) row[k] = p[k * rules.mask.col] ? row[k] : -Bits<T>::infinity;
  }
  if (rules.segments.q_number) {
    const int32_t own = rules.segments.q_number[q], *p = rules.segments.k_number + k0;
    for (index_t k = 0; k < n; k++) row[k] = p[k] == own ? row[k] : -Bits<T>::infinity;
  }
}
