// The dense part of a tile: what is added to its logits, times log2(e), where that is not the same
// for all of them. ALiBi and bias; -inf where mask, segments or an interval forbid or the bias is
// -inf. A bias so low that its product would be -inf stays finite: where all of a row is that low,
// no key is masked.
//
// Backward and the few queries of decoding have keys in their lanes (dense_row), forward queries
// (dense_tile): there a bias is transposed in registers, 4 shuffles for each vector of it, and a
// mask four keys at a time, since the bytes of four keys are moved like one number.

template <class T> FA_INLINE Vec<T> add_bias(Vec<T> bias, Vec<T> x) {
  const Vec<T> sum = fma<T>(bias, splat(T(LOG2E)), x);
  return bias == splat(-Bits<T>::infinity) ? bias : max_or_second<T>(splat(Bits<T>::lowest), sum);
}
// Is none of them -inf, nor its product with log2(e)?
template <class T> FA_INLINE bool are_finite_biases(const Vec<T> (&bias)[W<T>]) {
  constexpr int chains = W<T> < 4 ? 1 : 4;
  Vec<T> least[chains] = {};
  FA_UNROLL
  for (int i = 0; i < W<T>; i++) least[i % chains] = min_or_second<T>(bias[i], least[i % chains]);
  for (int i = 1; i < chains; i++) least[0] = min_or_second<T>(least[i], least[0]);
  return !any_lane<T>(least[0] < splat(Bits<T>::lowest / 4));
}
template <class T> FA_INLINE Vec<T> alibi(Vec<T> slope, Vec<T> key, Vec<T> position) {
  const Vec<T> ahead = key - position;
  return slope * (ahead < Vec<T>{} ? -ahead : ahead);
}

// On tiles the exponentials of forward fetch a bias, one line at a time. PIPELINED: rules and
// exponentials run beside products there, if numbers are cut into several pieces.
#if defined(FUSEDATTN_AMX)
inline constexpr bool FORWARD_FETCHES_BIAS = false;
template <class E> inline constexpr bool PIPELINED = true;
template <> inline constexpr bool PIPELINED<BFloat> = false;
#else
inline constexpr bool FORWARD_FETCHES_BIAS = true;
template <class E> inline constexpr bool PIPELINED = false;
#endif
// For rules that may run beside products, whose sums keep_awake would spoil.
template <class E> FA_INLINE void keep_awake_between() {
  if constexpr (!PIPELINED<E>) keep_awake();
}
// W elements of a row of the bias, n of which exist. FETCH: also those of the keys that come next:
// rows of a matrix in DRAM are too short for the hardware to see it coming. Of the first block,
// also what lies `then` bytes further: the next sub-block's.
template <class E, bool FETCH = true, class T = Compute<E>>
FA_INLINE Vec<T> load_bias(const char* p, index_t col, bool native, index_t n, index_t then = 0) {
  if (!native || n < W<T>) return gather_as<E>(p, col, int(min_index(n, W<T>)));
  if (FETCH) prefetch_far(p + DENSE_AHEAD * col);
  if (FETCH && then) prefetch_far(p + then);
  return load_as<E>(p);
}
template <class E> FA_INLINE bool is_native_bias(const Matrix& bias) {
  return is_native<E>({bias.data, 0, bias.col}) && bias.row % index_t(sizeof(E)) == 0;
}

// Rows of queries [begin, end) for keys [k0, k0 + n), `ld` elements apart, written up to a multiple
// of W; -inf from n on. `ragged`: a query may see a part of the keys only.
template <class E, class T = Compute<E>>
FA_NOINLINE void dense_rows(const Rules& rules, bool use_mask, bool ragged, index_t begin,
                            index_t end, index_t k0, index_t n, T* rows, index_t ld) {
  const Matrix &bias = rules.bias, &mask = rules.mask;
  const bool native = is_native_bias<E>(bias), slanted = rules.alibi_slope != 0;
  const int32_t* segment = rules.segments.q_number ? rules.segments.k_number + k0 : nullptr;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity), slope = splat(T(-rules.alibi_slope * LOG2E));
  index_t low = 0, high = n;
  for (index_t q = begin; q < end; q++, rows += ld) {
    const char* b = bias.data ? bias.data + q * bias.row + k0 * bias.col : nullptr;
    const char* m = use_mask ? mask.data + q * mask.row + k0 * mask.col : nullptr;
    if (ragged) {
      const Interval keys = visible_keys(rules, q);
      low = max_index(min_index(keys.low - k0, n), 0);
      high = max_index(min_index(keys.high - k0, n), 0);
    }
    for (index_t k = 0; k < n; k += W<T>) {
      const Vec<T> key = splat(T(k)) + lane_numbers<T>();
      Vec<T> x{};
      if (slanted) x = alibi<T>(slope, key, splat(T(q + rules.q_offset - k0)));
      if (b) x = add_bias<T>(load_bias<E>(b + k * bias.col, bias.col, native, n - k), x);
      if (m) x = load_integers<T, uint8_t>(m + k * mask.col, mask.col, n - k) == 0 ? minus_inf : x;
      if (segment) {
        const char* at = reinterpret_cast<const char*>(segment + k);
        const IntVec<T> own = IntVec<T>{} + rules.segments.q_number[q];
        x = load_integers<T, int32_t>(at, sizeof(int32_t), n - k) == own ? x : minus_inf;
      }
      if (k < low || k + W<T> > high) {
        x = key >= splat(T(low)) ? x : minus_inf;
        x = key < splat(T(high)) ? x : minus_inf;
      }
      store(rows + k, x);
    }
  }
}

// The dense part of a range of keys: dense[key][query], or one value a key (step 0).
template <class T> struct Dense {
  const T* data;  // null: none
  index_t key_step, vector_step;
};
template <class T> FA_INLINE Vec<T> dense_at(const Dense<T>& d, index_t key, int j) {
  const T* p = d.data + key * d.key_step;
  return d.vector_step ? load(p + j * d.vector_step) : splat(*p);
}

// What the mask says of one block of keys. It is read row by row for several blocks at once: rows
// may be pages apart.
template <class T> FA_NOINLINE void read_covers(const Matrix& mask, Queries<T>& x, index_t block) {
  const index_t queries = mask.row == 0 ? 1 : x.count;
  Seen seen[COVERS];
  bool open = true;
  for (index_t q = 0; q < queries && open; q++) {
    const char* row = mask.data + (x.first + q) * mask.row;
    for (index_t k = block; mask.col == 1 && k < block + COVERS * KEY_BLOCK; k += 64)
      prefetch_far(row + 2 * mask.row + k);
    open = false;
    for (int i = 0; i < COVERS; i++) {
      const index_t from = max_index(block + i * KEY_BLOCK, x.keys.any.low),
                    to = min_index(block + (i + 1) * KEY_BLOCK, x.keys.any.high);
      if (from >= to || seen[i].decided()) continue;
      seen[i].add_row(row + from * mask.col, mask.col, mask.col == 0 ? 1 : to - from);
      open |= !seen[i].decided();
    }
  }
  for (int i = 0; i < COVERS; i++) x.cover[i] = seen[i].cover();
  x.covered = block;
  x.uncovered = block + COVERS * KEY_BLOCK;
}
template <class T> FA_INLINE Cover cover_of(const Rules& rules, Queries<T>& x, index_t block) {
  static_assert(KEY_BLOCK == COVER_KEYS);
  if (!rules.mask.data) return Cover::all;
  if (rules.covers.said && x.first % COVER_ROWS == 0)
    return shared_cover(rules, x.first, x.count, block);
  if (block >= x.uncovered) read_covers<T>(rules.mask, x, block);
  return x.cover[(block - x.covered) / KEY_BLOCK];
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

// The queries in W lanes from r on; the last one again where there are no more.
template <class T>
FA_INLINE void dense_queries(const Queries<T>& x, index_t r, index_t (&query)[W<T>]) {
  for (int i = 0; i < W<T>; i++) query[i] = x.first + min_index(r + i, x.count - 1);
}
// Their intervals of keys, counted from k0.
template <class T>
FA_NOINLINE void dense_intervals(const Rules& rules, const index_t (&query)[W<T>], index_t k0,
                                 index_t n, Vec<T>& low, Vec<T>& high) {
  alignas(64) T begin[W<T>], end[W<T>];
  for (int i = 0; i < W<T>; i++) {
    const Interval keys = visible_keys(rules, query[i]);
    begin[i] = T(max_index(min_index(keys.low - k0, n), 0));
    end[i] = T(max_index(min_index(keys.high - k0, n), 0));
  }
  low = load(begin), high = load(end);
}

// words[i]: bytes sizeof(T) * i to sizeof(T) * (i + 1) of each query's mask, from `key` on; 0 from
// `end` on.
template <class T>
FA_INLINE void transpose_mask(const Matrix& mask, const index_t (&query)[W<T>], index_t key,
                              index_t end, Vec<T> (&words)[W<T>]) {
  for (int i = 0; i < W<T>; i++) {
    const char* p = mask.data + query[i] * mask.row + key * mask.col;
    if (mask.col == 1 && key + FUSEDATTN_VECTOR_BYTES <= end) {
      prefetch_near(p + FUSEDATTN_VECTOR_BYTES);
      words[i] = load(reinterpret_cast<const T*>(p));
    } else {
      alignas(64) char bytes[FUSEDATTN_VECTOR_BYTES] = {};
      for (index_t k = 0; k < min_index(end - key, FUSEDATTN_VECTOR_BYTES); k++)
        bytes[k] = p[k * mask.col];
      words[i] = load(reinterpret_cast<const T*>(bytes));
    }
  }
  transpose_registers<T>(words);
}

// Does ALiBi stay a number as far as these queries and keys lie apart?
template <class T>
FA_INLINE bool is_finite_alibi(const Rules& rules, const Queries<T>& x, index_t k0, index_t k1) {
  const index_t position = x.first + rules.q_offset;
  const double apart = double(max_index(position + x.count - k0, k1 - position)),
               slope = rules.alibi_slope < 0 ? -rules.alibi_slope : rules.alibi_slope;
  return slope * LOG2E * apart < double(-Bits<T>::lowest) / 2;
}

// Calls use(r, c, t, finite) with the dense part t of keys k0 + c to k0 + c + W and queries r to
// r + W, for all keys [k0, k1) and queries of x; -inf beyond k1. `ragged`: a query may see a part
// of the keys. `finite`: nothing in t is -inf.
template <class E, class F, class T = Compute<E>>
FA_INLINE void for_dense(const Rules& rules, const Queries<T>& x, bool use_mask, bool ragged,
                         index_t k0, index_t k1, F&& use) {
  using Int = typename Bits<T>::type;
  constexpr index_t at_once = FUSEDATTN_VECTOR_BYTES, size = sizeof(T);  // keys of a mask
  const index_t n = k1 - k0, lanes = x.vectors * W<T>;
  const Matrix& bias = rules.bias;
  const bool native = is_native_bias<E>(bias), slanted = rules.alibi_slope != 0,
             all_seen = !ragged && !use_mask && !rules.segments.q_number,
             tame = !slanted || is_finite_alibi(rules, x, k0, k1);
  const index_t then = k0 < KEY_BLOCK ? lanes * bias.row : 0;
  const Vec<T> minus_inf = splat(-Bits<T>::infinity), slope = splat(T(-rules.alibi_slope * LOG2E));
  for (index_t r = 0; r < lanes; r += W<T>) {
    index_t query[W<T>];
    dense_queries<T>(x, r, query);
    const Vec<T> own = min_or_second<T>(splat(T(r)) + lane_numbers<T>(), splat(T(x.count - 1))),
                 position = own + splat(T(x.first + rules.q_offset - k0));
    Vec<T> low{}, high = splat(T(n));
    if (ragged) dense_intervals<T>(rules, query, k0, n, low, high);
    IntVec<T> segment{};
    for (int i = 0; i < W<T> && rules.segments.q_number; i++)
      segment[i] = rules.segments.q_number[query[i]];
    keep_awake_between<E>();
    Vec<T> words[W<T>];
    for (index_t c = 0; c < n; c += W<T>) {
      const Vec<T> first = splat(T(c));
      Vec<T> t[W<T>];
      bool finite = tame;  // neither a bias nor its product
      if (bias.data) {
        FA_UNROLL
        for (int i = 0; i < W<T>; i++)
          t[i] = load_bias<E, FORWARD_FETCHES_BIAS>(
              bias.data + query[i] * bias.row + (k0 + c) * bias.col, bias.col, native, n - c, then);
        finite &= are_finite_biases<T>(t);
        transpose_registers<T>(t);
      }
      if (slanted) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          const Vec<T> y = alibi<T>(slope, first + splat(T(j)), position);
          t[j] = bias.data ? add_bias<T>(t[j], y) : y;
        }
      } else if (bias.data && finite) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) t[j] *= splat(T(LOG2E));
      } else if (bias.data) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) t[j] = add_bias<T>(t[j], Vec<T>{});
      } else {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) t[j] = Vec<T>{};
      }
      if (use_mask) {
        if (c % at_once == 0) transpose_mask<T>(rules.mask, query, k0 + c, k1, words);
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          const index_t at = c % at_once + j;
          const IntVec<T> byte = (IntVec<T>)words[at / size] & (Int(0xff) << (8 * (at % size)));
          t[j] = byte == 0 ? minus_inf : t[j];
        }
      }
      if (rules.segments.q_number)
        for (int j = 0; j < min_index(n - c, W<T>); j++)
          t[j] = segment == rules.segments.k_number[k0 + c + j] ? t[j] : minus_inf;
      if (ragged || c + W<T> > n) {
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          const Vec<T> key = first + splat(T(j));
          t[j] = key >= low ? t[j] : minus_inf;
          t[j] = key < high ? t[j] : minus_inf;
        }
      }
      use(r, c, t, finite && all_seen && c + W<T> <= n);
    }
  }
}

// tile[key - k0][query] for keys [k0, k1) and the queries of x.
template <class E, class T = Compute<E>>
FA_NOINLINE Dense<T> dense_tile(const Rules& rules, const Queries<T>& x, bool use_mask, bool ragged,
                                index_t k0, index_t k1, T* tile) {
  const index_t n = k1 - k0, lanes = x.vectors * W<T>;
  if (!has_dense(rules, use_mask) && !ragged) return {nullptr, 0, 0};
  if (!ragged && dense_is_per_key(rules, use_mask)) {
    dense_rows<E>(rules, use_mask, false, x.first, x.first + 1, k0, n, tile, 0);
    return {tile, 1, 0};
  }
  for_dense<E>(rules, x, use_mask, ragged, k0, k1,
               [&](index_t r, index_t c, const Vec<T>(&t)[W<T>], bool) FA_TILE {
                 FA_UNROLL
                 for (int j = 0; j < W<T>; j++)
                   if (c + j < n) store(tile + (c + j) * lanes + r, t[j]);
               });
  return {tile, lanes, W<T>};
}
