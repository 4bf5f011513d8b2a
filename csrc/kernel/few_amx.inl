// Forward for a few queries on tiles: few.inl's softmax, row by row, between products that have the
// bits of forward_amx.inl's. All rows of the group are the columns of one tile:
//
//   S^T [keys x 16] = rows of K, words of Q^T;   O [16 x dv] = rows of P, words of V
//
// K is cut where it lies along d and V in pairs of rows, so neither is transposed, 32 keys at a
// time: their pieces stay in L1. Cost for 128
// keys of d = 128, in cycles: cutting 2 * 1024 vectors of float32 at 4 to 5, products 2 * 3000
// (float32), about 128 KB in 16,000: more than the memory delivers.

// Logits of rows or keys that could not be cut, by hand; s[key][row].
template <class E>
FA_NOINLINE void mend_few(const Row<float>* rows, int count, const Matrix& k, index_t n, index_t d,
                          float factor, float* s) {
  for (index_t i = 0; i < n; i++) {
    const bool odd_key = is_odd_row<E>(k, i, d);
    for (int r = 0; r < count; r++) {
      const Matrix& q = rows[r].head->q;
      if (odd_key || is_odd_row<E>(q, rows[r].query, d))
        s[i * TILE + r] = dot_rows<E>(k, i, q, rows[r].query, d) * factor;
    }
  }
}

// What could not be cut of V, for the rows that may see it; p[key] from key k0.
template <class E>
FA_NOINLINE void mend_few_values(const Row<float>& x, const Matrix& v, index_t first, index_t n,
                                 index_t dv, float* sums) {
  for (index_t key = 0; key < n; key++) {
    if (x.has_dense && x.dense[key] == -Bits<float>::infinity) continue;
    for (index_t c = 0; c < dv; c++) {
      const float value = number_at<E>(v, first + key, c);
      if (is_odd(value)) sums[c] += x.p[key] * value;
    }
  }
}

// P = exp2(S - max) of keys [k0, k0 + n), cut into row r of `words`, whose first key is a multiple
// of 32, `before` keys earlier; the sums in the order of forward_amx.inl.
template <class E>
FA_NOINLINE void few_exponentials(Row<float>& x, int r, index_t k0, index_t n, index_t before,
                                  const Operand& words) {
  using T = float;
  few_rules<E>(x, k0, n);
  T* p = x.p - before;
  const index_t all = up_to(before + n, DEPTH);
  for (index_t i = 0; i < before; i++) p[i] = -Bits<T>::infinity;
  for (index_t i = before + round_up<T>(n); i < all; i++) p[i] = -Bits<T>::infinity;
  T max = x.max;
  for (index_t i = 0; i < all && max == Bits<T>::lowest; i += DEPTH) max = few_max(x, p + i, DEPTH);
  max = next_max(max, few_max(x, p, all));
  const Vec<T> rescale = exp2<T>(splat(x.max) - splat(max)), top = splat(max);
  T sum = 0;
  for (index_t i = 0; i < all; i += DEPTH) {
    const Vec<T> a = exp2<T>(load(p + i) - top), b = exp2<T>(load(p + i + W<T>) - top);
    store(p + i, a);
    store(p + i + W<T>, b);
    for (int j = 0; j < W<T>; j++) sum = (sum + a[j]) + b[j];
    constexpr int P = P_PIECES<E>;
    store_words<P>(words.data + r * words.row + 2 * i, words.piece, cut_computed<P>(a),
                   cut_computed<P>(b));
  }
  x.total = x.sum = fma<T>(splat(x.sum), rescale, splat(sum))[0];
  x.max = max;
  x.rescale = rescale[0];
}

template <class E> static size_t few_scratch_amx(const ForwardHead& h) {
  const index_t dv = up_to(h.dv, TILE);
  char* end = nullptr;  // what is carved
  rows_operand(end, PIECES<E>, DEPTH, h.d);
  words_operand(end, PIECES<E>, DEPTH, h.dv);
  words_operand(end, PIECES<E>, h.d, TILE);
  rows_operand(end, P_PIECES<E>, TILE, KEY_BLOCK);
  const index_t numbers =
      4 * (2 * TILE * dv + 2 * FEW * (KEY_BLOCK + 2 * W<float>)+KEY_BLOCK * TILE);
  const index_t elements = (FEW * h.d + KEY_BLOCK * (h.d + h.dv)) * index_t(sizeof(E));
  return size_t(end - static_cast<char*>(nullptr) + numbers + elements + 24 * 64);
}

template <class E>
static void forward_few_amx(const ForwardHead* heads, index_t group, void* scratch) {
  using T = float;
  constexpr int P = P_PIECES<E>;
  const Tiles tiles;
  const ForwardHead& h = heads[0];
  char* free = static_cast<char*>(scratch);
  const index_t dv = up_to(h.dv, TILE), p_row = KEY_BLOCK + 2 * W<T>;
  const bool paged = h.pages.table != nullptr;
  E* q = carve<E>(free, FEW * h.d);
  T *o = carve<T>(free, TILE * dv), *sums = carve<T>(free, TILE * dv);
  T *p = carve<T>(free, FEW * p_row), *dense = carve<T>(free, FEW * p_row);
  T* s = carve<T>(free, KEY_BLOCK * TILE);
  E *k_rows = carve<E>(free, paged ? KEY_BLOCK * h.d : 0),
    *v_rows = carve<E>(free, paged ? KEY_BLOCK * h.dv : 0);
  const Operand k_cut = rows_operand(free, PIECES<E>, DEPTH, h.d),
                v_cut = words_operand(free, PIECES<E>, DEPTH, h.dv),
                q_cut = words_operand(free, PIECES<E>, h.d, TILE),
                p_cut = rows_operand(free, P, TILE, KEY_BLOCK);
  const LogitFactor factor = logit_factor<E>(h);

  Row<T> rows[FEW];
  int count = 0;
  Interval any{h.sk, 0};
  for (index_t g = 0; g < group; g++)
    for (index_t i = 0; i < h.sq; i++, count++) {
      Row<T>& x = rows[count];
      x = {heads + g,
           i,
           visible_keys(heads[g].rules, i),
           nullptr,
           o + count * dv,
           nullptr,
           dense + count * p_row,
           Bits<T>::lowest,
           0,
           0,
           1,
           false,
           false};
      const Matrix& from = heads[g].q;
      for (index_t c = 0; c < h.d; c++)
        __builtin_memcpy(&q[count * h.d + c], from.data + i * from.row + c * from.col, sizeof(E));
      __builtin_memset(x.o, 0, size_t(dv) * sizeof(T));
      if (x.keys.low >= x.keys.high) continue;
      any = {min_index(any.low, x.keys.low), max_index(any.high, x.keys.high)};
    }
  const Matrix q_rows{reinterpret_cast<char*>(q), h.d * index_t(sizeof(E)), index_t(sizeof(E))};
  const bool odd_q = cut_matrix<E, true, false>(q_rows, 0, count, h.d, q_cut, factor.in_q);

  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t k0 = max_index(block, any.low), k1 = min_index(block + KEY_BLOCK, any.high);
    const index_t base = k0 / DEPTH * DEPTH, n = k1 - k0, before = k0 - base, all = k1 - base;
    // 1. scores
    const Matrix k = block_rows<E>(h.k, h.pages, h.pages.k_page, base, all, h.d, k_rows);
    const Matrix v = block_rows<E>(h.v, h.pages, h.pages.v_page, base, all, h.dv, v_rows);
    bool odd_k = false, odd_v = false;
    for (index_t i = 0; i < all; i += DEPTH) {
      const index_t rest = min_index(DEPTH, all - i);
      odd_k |= cut_matrix<E, false, true>(k, i, rest, h.d, k_cut);
      multiply_operands<PIECES<E>, PIECES<E>>(rest, TILE, h.d, k_cut, q_cut, s + i * TILE,
                                              4 * TILE);
    }
    if (odd_k || odd_q) mend_few<E>(rows, count, k, all, h.d, factor.in_q, s);
    for (index_t i = 0; i < all; i += W<T>) {
      Vec<T> t[W<T>];
      FA_UNROLL
      for (int j = 0; j < W<T>; j++) t[j] = load(s + (i + j) * TILE);
      transpose_registers<T>(t);
      for (int r = 0; r < count; r++) store(p + r * p_row + i, t[r] * splat(factor.after));
    }
    // 2. P = exp2(S - max), cut into rows that begin at key `base`
    for (int r = 0; r < count; r++) {
      Row<T>& x = rows[r];
      x.p = p + r * p_row + before;
      few_exponentials<E>(x, r, k0, n, before, p_cut);
    }
    for (int c = 0; c < P; c++)
      __builtin_memset(p_cut.data + c * p_cut.piece + count * p_cut.row, 0,
                       size_t((TILE - count) * p_cut.row));
    // 3. O = O * rescale + P V, as add_values does it
    if (P < 3)
      for (int r = 0; r < count; r++)
        for (index_t c = 0; rows[r].rescale != 1 && c < dv; c += W<T>)
          store(rows[r].o + c, load(rows[r].o + c) * splat(rows[r].rescale));
    for (index_t i = 0; i < all; i += DEPTH) {
      const Operand p_part{p_cut.data + 2 * i, p_cut.row, p_cut.piece};
      odd_v |= cut_matrix<E, false, false>(v, i, min_index(DEPTH, all - i), h.dv, v_cut);
      if (P == 3 && i == 0)
        multiply_operands<P, PIECES<E>, true>(TILE, dv, DEPTH, p_part, v_cut, sums, 4 * dv);
      else
        multiply_operands<P, PIECES<E>, true, true>(TILE, dv, DEPTH, p_part, v_cut,
                                                    P == 3 ? sums : o, 4 * dv);
    }
    for (int r = 0; r < count; r++) {
      const Row<T>& x = rows[r];
      for (index_t c = 0; P == 3 && c < dv; c += W<T>)
        store(x.o + c, fma<T>(load(x.o + c), splat(x.rescale), load(sums + r * dv + c)));
      if (odd_v) mend_few_values<E>(x, v, before, n, h.dv, x.o);
    }
  }

  for (int r = 0; r < count; r++) {
    const Row<T>& x = rows[r];
    const Finished<T> f =
        finished<T>(splat(x.max), splat(x.sum), splat(x.total), splat(T(x.seen)), x.head->rules);
    store_rows<E>(x.o, dv, f.factor[0], x.head->out, x.query, 1, h.dv);
    static_cast<T*>(x.head->lse)[x.query] = f.lse[0];
  }
}
