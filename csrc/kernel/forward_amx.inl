// Forward on tiles: the same online softmax over the same blocks of keys as forward.inl, with the
// two products done by AMX from pieces of 16 bits (amx.inl). Queries lie in the lanes:
//
//   S^T [keys x queries] = rows of K, words of Q^T;   O^T [dv x queries] = rows of V^T, words of
//   P^T
//
// K and V are cut once for all queries of a task; P is cut as it is made.
//
// Cost for 16 scores (one vector) at d = 64, in cycles: the products 2 * 2 * d / 32 = 4 for each
// pair of pieces in registers, so 24 for float32 and 4 for bfloat16, and half as much again for
// loads and stores of tiles; exponential, sums and cutting 7 to 9. Cutting K and V is shared by the
// queries of a task. Exponentials between the tiles' instructions, of other keys, were tried: no
// faster with any type than one after the other with all that is touched in the L1 cache.

// Rows [r0, r0 + rows) of k or v, gathered from pages to scratch, `cols` elements each.
template <class E>
FA_NOINLINE Matrix gather_pages(const Matrix& m, const Pages& pages, index_t page, index_t r0,
                                index_t rows, index_t cols, E* dst) {
  for (index_t r = 0; r < rows; r++) {
    const index_t at = r0 + r;
    const char* p = m.data + pages.table[at / pages.rows] * page + at % pages.rows * m.row;
    copy_elements(dst + r * cols, p, m.col, cols);
  }
  return {reinterpret_cast<char*>(dst), cols * index_t(sizeof(E)), index_t(sizeof(E))};
}
// Rows of k or v from `block` on.
template <class E>
FA_INLINE Matrix block_rows(const Matrix& m, const Pages& pages, index_t page, index_t block,
                            index_t rows, index_t cols, E* gathered) {
  if (pages.table) return gather_pages<E>(m, pages, page, block, rows, cols, gathered);
  return {m.data + block * m.row, m.row, m.col};
}

// Vectors of queries in a sub-block: of three pieces, as many as leave P in the L1 cache.
template <class E> inline constexpr int WIDEST = PIECES<E> == 3 ? 2 : MAX_NJ;

template <class E> static size_t forward_scratch_amx(const ForwardHead& h, index_t queries) {
  const index_t subs = (queries + W<float> - 1) / W<float>, L = WIDEST<E> * W<float>;
  char* end = nullptr;  // what is carved, but for the queries
  words_operand(end, P_PIECES<E>, KEY_BLOCK, L);
  rows_operand(end, PIECES<E>, KEY_BLOCK, h.d);
  rows_operand(end, PIECES<E>, h.dv, KEY_BLOCK);
  const index_t q = PIECES<E> * as_words(nullptr, h.d, 2 * TILE).piece / 2;  // of 16 lanes, at most
  const index_t numbers =
      4 * (subs * W<float> * (up_to(h.dv, TILE) + 4) + 2 * KEY_BLOCK * L + 4 * TILE * TILE);
  const index_t gathered = h.pages.table ? KEY_BLOCK * (h.d + h.dv) * index_t(sizeof(E)) : 0;
  return size_t(end - static_cast<char*>(nullptr) + numbers + gathered +
                subs * (q + index_t(sizeof(Queries<float>)) + 8 * 64) + 16 * 64);
}

// Has the fetcher fetch what the next task reads first, beside the products of so many tiles of
// scores.
template <class E>
FA_INLINE void fetch_next_queries(Fetcher& f, const ForwardHead& h, const NextQueries& next,
                                  index_t tiles) {
  constexpr index_t size = sizeof(E), P = PIECES<E>;
  const index_t keys = next.new_keys ? min_index(h.sk, 4 * KEY_BLOCK) : 0;
  clear_fetcher(f);
  fetch_rows(f, next.out, next.begin, next.end, h.dv * size);
  fetch_rows(f, next.v, 0, keys, h.dv * size);
  fetch_rows(f, next.k, 0, keys, h.d * size);
  fetch_rows(f, next.q, next.begin, next.end, h.d * size);
  const index_t products = up_to(h.d, DEPTH) / DEPTH * piece_order<P, P>().n +
                           up_to(h.dv, DEPTH) / DEPTH * piece_order<P, P_PIECES<E>>().n;
  start_fetching(f, tiles * products);
}

template <class E>
static void forward_amx(const ForwardHead& h, index_t q_begin, index_t q_end,
                        const NextQueries& next, void* scratch) {
  using T = float;
  const Tiles configured;
  char* free = static_cast<char*>(scratch);
  Scored b;
  constexpr index_t widest = WIDEST<E> * W<T>;
  b.s = carve<T>(free, KEY_BLOCK * widest);
  b.tile = carve<T>(free, KEY_BLOCK * widest);
  b.sums = carve<T>(free, 4 * TILE * TILE);
  const Operand words = words_operand(free, P_PIECES<E>, KEY_BLOCK, widest);
  KeyBlock keys{rows_operand(free, PIECES<E>, KEY_BLOCK, h.d),
                rows_operand(free, PIECES<E>, h.dv, KEY_BLOCK), false, false};
  E *k_rows = carve<E>(free, h.pages.table ? KEY_BLOCK * h.d : 0),
    *v_rows = carve<E>(free, h.pages.table ? KEY_BLOCK * h.dv : 0);
  auto* subs = reinterpret_cast<Queries<T>*>(
      carve<char>(free, (q_end - q_begin + W<T> - 1) / W<T> * index_t(sizeof(Queries<T>))));

  const LogitFactor factor = logit_factor<E>(h);
  int n = 0;
  Interval any{h.sk, 0};
  index_t tiles = 0;  // of scores
  for (index_t q = q_begin; q < q_end; n++) {
    Queries<T>& x = subs[n];
    x.first = q;
    x.uncovered = 0;
    choose_width<T>(x, h, q_end, WIDEST<E>);
    const index_t lanes = x.vectors * W<T>, sums = up_to(h.dv, TILE) * lanes;
    const Operand operand = words_operand(free, PIECES<E>, h.d, lanes);
    x.q = reinterpret_cast<T*>(operand.data);
    x.odd = cut_matrix<E, true, false>(h.q, q, x.count, h.d, operand, factor.in_q);
    x.risen = h.rules.alibi_slope != 0;
    x.o = carve<T>(free, sums);
    x.max = carve<T>(free, lanes);
    x.total = x.sum = carve<T>(free, lanes);
    x.seen = carve<T>(free, lanes);
    __builtin_memset(x.o, 0, size_t(sums) * sizeof(T));
    for (index_t i = 0; i < lanes; i++) x.max[i] = Bits<T>::lowest, x.sum[i] = x.seen[i] = 0;
    tiles += x.vectors * up_to(max_index(x.keys.any.high - x.keys.any.low, 0), TILE) / TILE;
    any.low = min_index(any.low, x.keys.any.low);
    any.high = max_index(any.high, x.keys.any.high);
    q += x.count;
  }
  fetch_next_queries<E>(b.fetcher, h, next, tiles);
  const bool bent = h.rules.softcap > 0;

  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t rows = min_index(KEY_BLOCK, any.high - block);
    const Matrix k = block_rows<E>(h.k, h.pages, h.pages.k_page, block, rows, h.d, k_rows),
                 v = block_rows<E>(h.v, h.pages, h.pages.v_page, block, rows, h.dv, v_rows);
    keys.odd_k = cut_matrix<E, false, true>(k, 0, rows, h.d, keys.k);
    keys.odd_v = cut_matrix<E, true, true>(v, 0, rows, h.dv, keys.v);
    for (int i = 0; i < n; i++) {
      Queries<T>& x = subs[i];
      index_t k0 = max_index(block, x.keys.any.low), k1 = min_index(block + rows, x.keys.any.high);
      if (k0 >= k1) continue;
      const Cover cover = cover_of<T>(h.rules, x, block);
      if (cover == Cover::none) continue;
      b.use_mask = cover == Cover::some;
      if (b.use_mask && h.rules.mask.row == 0) b.use_mask = trim_hidden(h.rules.mask, k0, k1);
      if (k0 >= k1) continue;
      const bool last = i + 1 == n;
      b.bias = h.rules.bias;
      if (b.bias.data)
        b.bias.data += subs[last ? 0 : i + 1].first * b.bias.row +
                       (block + (last ? KEY_BLOCK : 0)) * b.bias.col;
      b.x = &x, b.block = block, b.k0 = k0, b.k1 = k1;
      b.low = (k0 - block) / DEPTH * DEPTH;
      b.high = up_to(k1 - block, DEPTH);
      b.words = {words.data, as_words(nullptr, KEY_BLOCK, x.vectors * W<T>).row, words.piece};
      b.cut[0] = k0;
      b.cut[1] = max_index(k0, min_index(k1, x.keys.all.low));
      b.cut[2] = max_index(b.cut[1], min_index(k1, x.keys.all.high));
      b.cut[3] = k1;
      for (Dense<T>& dense : b.dense) dense = {};
      // Masks are read 64 keys at a time; where V holds what cannot be cut, masks and biases of the
      // whole block are wanted. Keys left out are -inf, which a factor could turn into NaN.
      const bool ragged = b.cut[1] > k0 || b.cut[2] < k1;
      b.has_dense = has_dense(h.rules, b.use_mask) || ragged;
      b.masked = b.use_mask && !has_dense(h.rules, false) && !ragged && !keys.odd_v;
      const bool whole = k0 - block == b.low && k1 - block == b.high;
      const Plan plan{factor,
                      keys.odd_v    ? KEY_BLOCK
                      : b.has_dense ? 2 * DEPTH
                                    : DEPTH,
                      !bent && (!b.has_dense || b.masked) && !keys.odd_k && !x.odd &&
                          (whole || SCALED_QUERIES<E>)};
      block_probabilities<E>(h, b, k, keys, plan);
      add_values<E>(h, b, v, keys);
    }
  }
  for (int i = 0; i < n; i++) finish<E>(h, subs[i]);
}
