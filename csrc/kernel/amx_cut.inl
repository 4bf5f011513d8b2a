// Cutting numbers into bfloat16 pieces, and matrices into the operands of amx.inl's products: as
// rows or words, as they lie or transposed.

// Pieces of 16 numbers: float32 numbers whose lower 16 bits are 0.
template <int P> struct Cut {
  Vec<float> piece[P];
};
FA_INLINE Vec<float> upper(Vec<float> x) {
  return (Vec<float>)((Words)x & 0xffff0000);
}
// Truncated: for what was computed and may be NaN, which stays NaN.
template <int P> FA_INLINE Cut<P> cut(Vec<float> x) {
  Cut<P> c;
  FA_UNROLL
  for (int i = 0; i < P; i++) {
    c.piece[i] = upper(x);
    x -= c.piece[i];
  }
  return c;
}
FA_INLINE bool any_lane(IntVec<float> x) {
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
}
// The largest magnitude met, which tells afterwards whether something could not be cut.
struct Largest {
  Words bits{};
  FA_INLINE_MEMBER bool is_odd() const { return any_lane((IntVec<float>)(bits >= 0x7f7f8000)); }
};
// The first piece rounded, so that the signs of the others are random: for operands. CAREFUL: 0 for
// what cannot be cut; else nonsense.
template <class E, bool CAREFUL>
FA_INLINE Cut<PIECES<E>> cut_operand(Vec<float> x, Largest& largest) {
  const Words magnitude = (Words)x & 0x7fffffff;
  largest.bits = (Words)_mm512_maskz_max_epu32(0xffff, (__m512i)largest.bits, (__m512i)magnitude);
  if (CAREFUL) x = magnitude >= 0x7f7f8000 ? Vec<float>{} : x;
  if constexpr (PIECES<E> == 3) {
    const Vec<float> first = upper((Vec<float>)((Words)x + 0x8000));
    const Cut<2> rest = cut<2>(x - first);
    return {first, rest.piece[0], rest.piece[1]};
  } else {
    return cut<PIECES<E>>(x);
  }
}

// Words (low[i], high[i]) of the upper halves.
FA_INLINE Vec<float> pair_words(Vec<float> low, Vec<float> high) {
  constexpr int high_and_mask_or_low = 0xEA;
  return (Vec<float>)_mm512_ternarylogic_epi32((__m512i)high, _mm512_set1_epi32(-65536),
                                               (__m512i)((Words)low >> 16), high_and_mask_or_low);
}
// 32 elements in a row: those of `first`, then those of `second`.
template <int... I> FA_INLINE Vec<float> join(Vec<float> first, Vec<float> second, Seq<I...>) {
  typedef uint16_t Elements __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
  return (Vec<float>)__builtin_shufflevector((Elements)first, (Elements)second, (2 * I + 1)...);
}
FA_INLINE Vec<float> join_elements(Vec<float> first, Vec<float> second) {
  return join(first, second, typename MakeSeq<32>::type{});
}

// 16 numbers of a row from column c; 0 beyond the row. Native: the whole row can be loaded.
template <class E>
FA_INLINE Vec<float> numbers_at(const char* row, index_t col, index_t c, index_t cols,
                                bool native) {
  if (native && c + W<float> <= cols) return load_as<E>(row + c * col);
  if (c >= cols) return Vec<float>{};
  return gather_as<E>(row + c * col, col, int(min_index(W<float>, cols - c)));
}
// How numbers are read and cut. WHOLE: the matrix is native and comes in whole tiles.
template <class E, bool WHOLE, bool CAREFUL> struct Cutter {
  const Matrix& src;
  index_t rows, cols;
  bool native;
  Largest& largest;

  FA_INLINE_MEMBER Cut<PIECES<E>> at(index_t r, index_t c) const {
    const char* p = src.data + r * src.row;
    Vec<float> x{};
    if (WHOLE)
      x = load_as<E>(p + c * index_t(sizeof(E)));
    else if (r < rows)
      x = numbers_at<E>(p, src.col, c, cols, native);
    return cut_operand<E, CAREFUL>(x, largest);
  }
  // 32 numbers of a row; 0 beyond.
  FA_INLINE_MEMBER Cut<PIECES<E>> row(index_t r, index_t c) const {
    const auto first = at(r, c), second = at(r, c + W<float>);
    Cut<PIECES<E>> x;
    FA_UNROLL
    for (int n = 0; n < PIECES<E>; n++) x.piece[n] = join_elements(first.piece[n], second.piece[n]);
    return x;
  }
  // Words of rows r and r + 1, 16 columns from c; 0 beyond.
  FA_INLINE_MEMBER Cut<PIECES<E>> row_pair(index_t r, index_t c) const {
    const auto low = at(r, c), high = at(r + 1, c);
    Cut<PIECES<E>> x;
    FA_UNROLL
    for (int n = 0; n < PIECES<E>; n++) x.piece[n] = pair_words(low.piece[n], high.piece[n]);
    return x;
  }
};

// f(cutter) with the one that fits; again, carefully, if something cannot be cut. True if so.
template <class E, class F>
FA_INLINE bool cut_with(const Matrix& src, index_t rows, index_t cols, bool whole, F&& f) {
  const bool native = is_native<E>(src);
  Largest largest;
  if (whole && native)
    f(Cutter<E, true, false>{src, rows, cols, native, largest});
  else
    f(Cutter<E, false, false>{src, rows, cols, native, largest});
  if (!largest.is_odd()) return false;
  f(Cutter<E, false, true>{src, rows, cols, native, largest});
  return true;
}

template <int N> FA_INLINE void store_pieces(const Operand& dst, index_t at, const Cut<N>& x) {
  FA_UNROLL
  for (int n = 0; n < N; n++)
    store(reinterpret_cast<float*>(dst.data + n * dst.piece + at), x.piece[n]);
}
template <int N>
FA_INLINE void store_transposed(const Operand& dst, index_t at, Vec<float> (&x)[N][TILE]) {
  for (int n = 0; n < N; n++) {
    transpose_registers<float>(x[n]);
    FA_UNROLL
    for (int i = 0; i < TILE; i++)
      store(reinterpret_cast<float*>(dst.data + n * dst.piece + at + i * dst.row), x[n][i]);
  }
}

// dst as rows = src[r0 + r][0:cols] for r < rows. True if something could not be cut.
template <class E>
FA_NOINLINE bool cut_rows(Matrix src, index_t r0, index_t rows, index_t cols, const Operand& dst) {
  src.data += r0 * src.row;
  const index_t all_rows = up_to(rows, TILE);
  return cut_with<E>(src, rows, cols, rows % TILE == 0 && cols % DEPTH == 0,
                     [&](auto cutter) __attribute__((always_inline)) {
                       for (index_t r = 0; r < all_rows; r++)
                         for (index_t c = 0; c < cols; c += DEPTH)
                           store_pieces(dst, r * dst.row + 2 * c, cutter.row(r, c));
                     });
}

// dst as words of two columns = src[r0 + r][0:cols], the rows of src in the columns: (cols / 2) x
// rows.
template <class E>
FA_NOINLINE bool cut_columns(Matrix src, index_t r0, index_t rows, index_t cols,
                             const Operand& dst) {
  src.data += r0 * src.row;
  return cut_with<E>(src, rows, cols, rows % TILE == 0 && cols % DEPTH == 0,
                     [&](auto cutter) __attribute__((always_inline)) {
                       for (index_t r = 0; r < rows; r += TILE)
                         for (index_t c = 0; c < cols; c += DEPTH) {
                           Vec<float> t[PIECES<E>][TILE];
                           for (index_t i = 0; i < TILE; i++) {
                             const auto row = cutter.row(r + i, c);
                             FA_UNROLL
                             for (int n = 0; n < PIECES<E>; n++) t[n][i] = row.piece[n];
                           }
                           store_transposed(dst, c / 2 * dst.row + 4 * r, t);
                         }
                     });
}

// dst as words of two rows = src[r0 + r][0:cols]: (rows / 2) x cols.
template <class E>
FA_NOINLINE bool cut_row_pairs(Matrix src, index_t r0, index_t rows, index_t cols,
                               const Operand& dst) {
  src.data += r0 * src.row;
  const index_t all_rows = up_to(rows, DEPTH);
  return cut_with<E>(src, rows, cols, rows % DEPTH == 0 && cols % TILE == 0,
                     [&](auto cutter) __attribute__((always_inline)) {
                       for (index_t r = 0; r < all_rows; r += 2)
                         for (index_t c = 0; c < cols; c += TILE)
                           store_pieces(dst, r / 2 * dst.row + 4 * c, cutter.row_pair(r, c));
                     });
}

// dst as rows = the transpose of src[r0 + r][0:cols]: cols x rows.
template <class E>
FA_NOINLINE bool cut_transposed(Matrix src, index_t r0, index_t rows, index_t cols,
                                const Operand& dst) {
  src.data += r0 * src.row;
  return cut_with<E>(src, rows, cols, rows % DEPTH == 0 && cols % TILE == 0,
                     [&](auto cutter) __attribute__((always_inline)) {
                       for (index_t c = 0; c < cols; c += TILE)
                         for (index_t r = 0; r < rows; r += DEPTH) {
                           Vec<float> t[PIECES<E>][TILE];
                           for (index_t i = 0; i < TILE; i++) {
                             const auto words = cutter.row_pair(r + 2 * i, c);
                             FA_UNROLL
                             for (int n = 0; n < PIECES<E>; n++) t[n][i] = words.piece[n];
                           }
                           store_transposed(dst, c * dst.row + 2 * r, t);
                         }
                     });
}

// ---- what cannot be cut, by hand ----

// Element (r, c) of a matrix, as a number.
template <class E> FA_INLINE float number_at(const Matrix& m, index_t r, index_t c) {
  return gather_as<E>(m.data + r * m.row + c * m.col, 0, 1)[0];
}
FA_INLINE bool is_odd(float x) {
  return !(__builtin_fabsf(x) < 0x1.ffp127f);  // rounds to infinity in bfloat16
}
