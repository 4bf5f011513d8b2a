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
                          float* s) {
  for (index_t i = 0; i < n; i++) {
    const bool odd_key = is_odd_row<E>(k, i, d);
    for (int r = 0; r < count; r++) {
      const Matrix& q = rows[r].head->q;
      if (odd_key || is_odd_row<E>(q, rows[r].query, d))
        s[i * TILE + r] = dot_rows<E>(k, i, q, rows[r].query, d);
    }
  }
}

// What could not be cut of V, for the rows that may see it; sums[row][column], p[key] from key k0.
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

template <class E> static size_t few_scratch_amx(const ForwardHead& h) {
  const index_t d = up_to(h.d, DEPTH), dv = up_to(h.dv, TILE), ld = up_to(h.d, W<float>);
  const index_t pieces =
      PIECES<E> * 2 * (KEY_BLOCK * (d + dv) + TILE * d) + P_PIECES<E> * 2 * TILE * KEY_BLOCK;
  const index_t numbers =
      4 * ((2 * TILE + FEW) * dv + 2 * FEW * (KEY_BLOCK + 2 * W<float>)+KEY_BLOCK * TILE);
  const index_t elements = (FEW * ld + KEY_BLOCK * (h.d + h.dv)) * index_t(sizeof(E));
  return size_t(pieces + numbers + elements + 24 * 64);
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
  T *o = carve<T>(free, FEW * dv), *sums = carve<T>(free, TILE * dv);
  T *p = carve<T>(free, FEW * p_row), *dense = carve<T>(free, FEW * p_row);
  T* s = carve<T>(free, KEY_BLOCK * TILE);
  E *k_rows = carve<E>(free, paged ? KEY_BLOCK * h.d : 0),
    *v_rows = carve<E>(free, paged ? KEY_BLOCK * h.dv : 0);
  const Operand k_cut = rows_operand(free, PIECES<E>, DEPTH, h.d),
                v_cut = words_operand(free, PIECES<E>, DEPTH, h.dv),
                q_cut = words_operand(free, PIECES<E>, h.d, TILE),
                p_cut = rows_operand(free, P, TILE, KEY_BLOCK);
  const T factor = T(logit_factors<T>(h.scale, h.rules).before);

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
  const bool odd_q = cut_columns<E>(q_rows, 0, count, h.d, q_cut);

  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t k0 = max_index(block, any.low), k1 = min_index(block + KEY_BLOCK, any.high);
    const index_t base = k0 / DEPTH * DEPTH, n = k1 - k0, before = k0 - base, all = k1 - base;
    // 1. scores
    const Matrix k = block_rows<E>(h.k, h.pages, h.pages.k_page, base, all, h.d, k_rows);
    const Matrix v = block_rows<E>(h.v, h.pages, h.pages.v_page, base, all, h.dv, v_rows);
    bool odd_k = false, odd_v = false;
    for (index_t i = 0; i < all; i += DEPTH) {
      const index_t rest = min_index(DEPTH, all - i);
      odd_k |= cut_rows<E>(k, i, rest, h.d, k_cut);
      multiply_operands<PIECES<E>, PIECES<E>>(rest, TILE, h.d, k_cut, q_cut, s + i * TILE,
                                              4 * TILE);
    }
    if (odd_k || odd_q) mend_few<E>(rows, count, k, all, h.d, s);
    for (index_t i = 0; i < all; i += W<T>) {
      Vec<T> t[W<T>];
      FA_UNROLL
      for (int j = 0; j < W<T>; j++) t[j] = load(s + (i + j) * TILE);
      transpose_registers<T>(t);
      for (int r = 0; r < count; r++) store(p + r * p_row + i, t[r] * splat(factor));
    }
    // 2. P = exp2(S - max), cut into rows that begin at key `base`
    for (int r = 0; r < count; r++) {
      Row<T>& x = rows[r];
      x.p = p + r * p_row + before;
      few_softmax<E>(x, k0, n);
      for (index_t i = 0; i < before; i++) p[r * p_row + i] = 0;
      for (index_t i = all; i < up_to(all, DEPTH); i++) p[r * p_row + i] = 0;
      for (index_t i = 0; i < all; i += DEPTH) {
        const Cut<P> a = cut<P>(load(p + r * p_row + i)),
                     b = cut<P>(load(p + r * p_row + i + W<T>));
        for (int c = 0; c < P; c++)
          store(reinterpret_cast<T*>(p_cut.data + c * p_cut.piece + r * p_cut.row + 2 * i),
                join_elements(a.piece[c], b.piece[c]));
      }
    }
    for (int c = 0; c < P; c++)
      __builtin_memset(p_cut.data + c * p_cut.piece + count * p_cut.row, 0,
                       size_t((TILE - count) * p_cut.row));
    // 3. O = O * rescale + P V
    for (index_t i = 0; i < all; i += DEPTH) {
      const Operand p_part{p_cut.data + 2 * i, p_cut.row, p_cut.piece};
      odd_v |= cut_row_pairs<E>(v, i, min_index(DEPTH, all - i), h.dv, v_cut);
      if (i == 0)
        multiply_operands<P, PIECES<E>, true>(TILE, dv, DEPTH, p_part, v_cut, sums, 4 * dv);
      else
        multiply_operands<P, PIECES<E>, true, true>(TILE, dv, DEPTH, p_part, v_cut, sums, 4 * dv);
    }
    for (int r = 0; r < count; r++) {
      const Row<T>& x = rows[r];
      T* sum = sums + r * dv;
      if (odd_v) mend_few_values<E>(x, v, before, n, h.dv, sum);
      for (index_t c = 0; c < dv; c += W<T>)
        store(x.o + c, fma<T>(load(x.o + c), splat(x.rescale), load(sum + c)));
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
