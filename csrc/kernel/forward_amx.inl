// Forward on tiles: the same online softmax over the same blocks of keys as forward.inl, with the
// two products done by AMX from pieces of 16 bits (amx.inl). Queries lie in the lanes:
//
//   S^T [keys x queries] = rows of K, words of Q^T;   O^T [dv x queries] = rows of V^T, words of
//   P^T
//
// K and V are cut once for all queries of a task; P is cut as it is made.
//
// Cost for 16 scores (one vector) at d = 64, in cycles: the products 2 * 2 * d / 32 = 4 for each
// pair of pieces in registers, so 24 for float32 and 6 for bfloat16, and half as much again for
// loads and stores of tiles; scaling and maximum 2, exponential and cutting 9, the sums'
// rescaling 2. For 512 queries cutting K and V adds 1 to 2.

// Rows [r0, r0 + rows) of k or v, gathered from pages to scratch, `cols` elements each.
template <class E>
FA_NOINLINE Matrix gather_pages(const Matrix& m, const Pages& pages, index_t page, index_t r0,
                                index_t rows, index_t cols, E* dst) {
  for (index_t r = 0; r < rows; r++) {
    const index_t at = r0 + r;
    const char* p = m.data + pages.table[at / pages.rows] * page + at % pages.rows * m.row;
    if (m.col == index_t(sizeof(E))) {
      __builtin_memcpy(dst + r * cols, p, size_t(cols) * sizeof(E));
      continue;
    }
    for (index_t c = 0; c < cols; c++)
      __builtin_memcpy(&dst[r * cols + c], p + c * m.col, sizeof(E));
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

template <class E> static size_t forward_scratch_amx(const ForwardHead& h, index_t queries) {
  const index_t subs = (queries + W<float> - 1) / W<float>, lanes = up_to(queries, LANES<float>);
  const index_t d = up_to(h.d, DEPTH), dv = up_to(h.dv, TILE), L = LANES<float>;
  const index_t pieces =
      PIECES<E> * 2 * (lanes * d + KEY_BLOCK * (d + dv)) + 3 * P_PIECES<E> * 2 * KEY_BLOCK * L;
  const index_t numbers = 4 * (lanes * (dv + 4) + 6 * KEY_BLOCK * L + dv * L);
  const index_t gathered = h.pages.table ? KEY_BLOCK * (h.d + h.dv) * index_t(sizeof(E)) : 0;
  return size_t(pieces + numbers + gathered + subs * (index_t(sizeof(Queries<float>)) + 8 * 64) +
                16 * 64);
}

template <class E>
static void forward_amx(const ForwardHead& h, index_t q_begin, index_t q_end,
                        const NextQueries& next, void* scratch) {
  using T = float;
  const Tiles tiles;
  char* free = static_cast<char*>(scratch);
  Scored scored[3];  // scores, exponentials and values of three blocks are computed side by side
  for (Scored& b : scored) {
    b.s = carve<T>(free, KEY_BLOCK * LANES<T>);
    b.tile = carve<T>(free, KEY_BLOCK * LANES<T>);
    b.words = words_operand(free, P_PIECES<E>, KEY_BLOCK, LANES<T>);
  }
  T* sums = carve<T>(free, up_to(h.dv, TILE) * LANES<T>);
  KeyBlock keys{rows_operand(free, PIECES<E>, KEY_BLOCK, h.d),
                rows_operand(free, PIECES<E>, h.dv, KEY_BLOCK), false, false};
  E *k_rows = carve<E>(free, h.pages.table ? KEY_BLOCK * h.d : 0),
    *v_rows = carve<E>(free, h.pages.table ? KEY_BLOCK * h.dv : 0);
  auto* subs = reinterpret_cast<Queries<T>*>(
      carve<char>(free, (q_end - q_begin + W<T> - 1) / W<T> * index_t(sizeof(Queries<T>))));

  int n = 0;
  Interval any{h.sk, 0};
  for (index_t q = q_begin; q < q_end; n++) {
    Queries<T>& x = subs[n];
    x.first = q;
    choose_width<T>(x, h, q_end);
    const index_t lanes = x.vectors * W<T>;
    const Operand words = words_operand(free, PIECES<E>, h.d, lanes);
    x.q = reinterpret_cast<T*>(words.data);
    x.odd = cut_columns<E>(h.q, q, x.count, h.d, words);
    x.o = carve<T>(free, h.dv * lanes);
    x.max = carve<T>(free, lanes);
    x.total = x.sum = carve<T>(free, lanes);
    x.seen = carve<T>(free, lanes);
    __builtin_memset(x.o, 0, size_t(h.dv * lanes) * sizeof(T));
    for (index_t i = 0; i < lanes; i++) x.max[i] = Bits<T>::lowest, x.sum[i] = x.seen[i] = 0;
    any.low = min_index(any.low, x.keys.any.low);
    any.high = max_index(any.high, x.keys.any.high);
    q += x.count;
  }
  Ahead ahead = ahead_of<E>(h, next, n * (any.high - any.low / KEY_BLOCK * KEY_BLOCK));

  // Scores of block i and values of block i - 2 are multiplied while the exponentials of block
  // i - 1 are computed, which hides half of them. Where one product does for six there is nothing
  // to hide them behind, and blocks are better finished while they are in L1.
  Matrix k{}, v{};
  index_t v_block = -1;
  Exponentials<P_PIECES<E>> work{};
  Scored *first = nullptr, *second = nullptr;  // the exponentials are done, are being done
  const auto values_of_first = [&]() {
    if (!first) return;
    if (first->block != v_block) {
      v_block = first->block;
      const index_t rows = min_index(KEY_BLOCK, any.high - v_block);
      v = block_rows<E>(h.v, h.pages, h.pages.v_page, v_block, rows, h.dv, v_rows);
      keys.odd_v = cut_transposed<E>(v, 0, rows, h.dv, keys.v);
    }
    add_values<E>(h, *first, v, keys, sums, work);
  };
  int turn = 0;
  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t rows = min_index(KEY_BLOCK, any.high - block);
    k = block_rows<E>(h.k, h.pages, h.pages.k_page, block, rows, h.d, k_rows);
    keys.odd_k = cut_rows<E>(k, 0, rows, h.d, keys.k);
    for (int i = 0; i < n; i++) {
      Queries<T>& x = subs[i];
      const index_t k0 = max_index(block, x.keys.any.low),
                    k1 = min_index(block + rows, x.keys.any.high);
      if (k0 >= k1) continue;
      Cover cover = Cover::all;
      if (h.rules.mask.data) cover = mask_cover(h.rules.mask, x.first, x.count, k0, k1 - k0);
      if (cover == Cover::none) continue;
      Scored& b = scored[turn++ % 3];
      b.x = &x, b.block = block, b.k0 = k0, b.k1 = k1;
      b.low = (k0 - block) / DEPTH * DEPTH;
      b.high = up_to(k1 - block, DEPTH);
      b.words.row = 4 * x.vectors * W<T>;
      const index_t products = score_products<E>(h, b) + (first ? value_products<E>(h, *first) : 0);
      work.share = (256 * work.left + products - 1) / products;
      score_block<E>(h, b, k, keys, cover == Cover::some, work);
      values_of_first();
      work.finish();
      work = exponentials_of<E>(h, b, ahead);
      first = second;
      second = &b;
      if constexpr (PIECES<E> == 1) {
        work.finish();
        first = &b;
        values_of_first();
        first = second = nullptr;
        turn = 0;
      }
    }
  }
  values_of_first();
  work.finish();
  first = second;
  values_of_first();
  for (int i = 0; i < n; i++) finish<E>(h, subs[i]);
}
