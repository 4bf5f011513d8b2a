// Which keys a query sees: an interval [low, high) for a row, and a dense part (mask, bias) for a
// tile if need be.

struct Interval {
  index_t low, high;
};

// The one place where interval rules become keys. Query i may see keys [low, high), empty if low >=
// high.
FA_INLINE Interval visible_keys(const Rules& rules, index_t i) {
  if (i >= rules.q_length) return {0, 0};
  const index_t p = i + rules.q_offset;
  return {max_index(0, p - rules.left),
          max_index(0, min_index(rules.kv_length, p + rules.right + 1))};
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

// What the boolean mask says of a tile as a whole.
enum class Cover { none, some, all };

FA_NOINLINE Cover mask_cover(const Matrix& mask, index_t q0, index_t nq, index_t k0, index_t nk) {
  bool any = false, all = true;
  if (mask.row == 0) nq = min_index(nq, 1);
  if (mask.col == 0) nk = min_index(nk, 1);
  for (index_t q = 0; q < nq; q++) {
    const char* p = mask.data + (q0 + q) * mask.row + k0 * mask.col;
    unsigned char seen = 0, missing = 0;
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

// row[k] = bias * log2(e), or -inf where the mask forbids or the bias is -inf, for one query and
// keys [k0, k0 + n).
template <class E, class T = Compute<E>>
FA_NOINLINE void dense_row(const Rules& rules, bool use_mask, index_t q, index_t k0, index_t n,
                           T* row) {
  if (rules.bias.data) {
    const char* p = rules.bias.data + q * rules.bias.row + k0 * rules.bias.col;
    const bool native = is_native<E>({rules.bias.data, 0, rules.bias.col}) &&
                        rules.bias.row % index_t(sizeof(E)) == 0;
    index_t k = 0;
    if (native)
      for (; k + W<T> <= n; k += W<T>)
        store(row + k, load_as<E>(p + k * rules.bias.col) * splat(T(LOG2E)));
    for (; k < n; k += W<T>) {
      const int left = int(min_index(W<T>, n - k));
      store_n(row + k, gather_as<E>(p + k * rules.bias.col, rules.bias.col, left) * splat(T(LOG2E)),
              left);
    }
  } else {
    for (index_t k = 0; k < n; k++) row[k] = T(0);
  }
  if (use_mask) {
    const char* p = rules.mask.data + q * rules.mask.row + k0 * rules.mask.col;
    if (rules.mask.col == 1)
      for (index_t k = 0; k < n; k++) row[k] = p[k] ? row[k] : -Bits<T>::infinity;
    else
      for (index_t k = 0; k < n; k++) row[k] = p[k * rules.mask.col] ? row[k] : -Bits<T>::infinity;
  }
}

// The dense part is the same for every query (a padding mask, a bias over keys).
FA_INLINE bool dense_is_per_key(const Rules& rules, bool use_mask) {
  return (!rules.bias.data || rules.bias.row == 0) && (!use_mask || rules.mask.row == 0);
}
