// Cutting numbers into bfloat16 pieces, and matrices into the operands of amx.inl's products.
// Numbers i and i + 16 of each 32 along a sum make a word, in the operands on both sides: so a word
// is made of two vectors without a shuffle, and one function cuts matrices in all four ways.
// Whatever is computed (P and dS) is cut in the same way.

// Pieces of 16 numbers: float32 numbers whose lower 16 bits are 0.
template <int P> struct Cut {
  Vec<float> piece[P];
};
FA_INLINE Vec<float> upper(Vec<float> x) {
  return (Vec<float>)((Words)x & 0xffff0000);
}
FA_INLINE bool any_lane(IntVec<float> x) {
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
}
// Words (low[i], high[i]) of the upper halves.
FA_INLINE Vec<float> pair_words(Vec<float> low, Vec<float> high) {
  constexpr int high_and_mask_or_low = 0xEA;
  return (Vec<float>)_mm512_ternarylogic_epi32((__m512i)high, _mm512_set1_epi32(-65536),
                                               (__m512i)((Words)low >> 16), high_and_mask_or_low);
}
// 16 numbers of a row from column c; 0 beyond the row. Native: the whole row can be loaded.
template <class E>
FA_INLINE Vec<float> numbers_at(const char* row, index_t col, index_t c, index_t cols,
                                bool native) {
  if (native && c + W<float> <= cols) return load_as<E>(row + c * col);
  if (c >= cols) return Vec<float>{};
  return gather_as<E>(row + c * col, col, int(min_index(W<float>, cols - c)));
}

// P and dS of 16-bit types: bfloat16 takes them rounded to one piece, float16 as they are.
template <class E> inline constexpr int COMPUTED = PIECES<E> == 1 ? 1 : 3;

// The lower halves of the last piece may be anything: pair_words drops them.
template <int P> FA_INLINE void store_words(char* at, index_t piece, Cut<P> low, Cut<P> high) {
  FA_UNROLL
  for (int n = 0; n < P; n++)
    store(reinterpret_cast<float*>(at + n * piece), pair_words(low.piece[n], high.piece[n]));
}
// One piece is rounded to nearest, several are truncated. NaN stays NaN.
template <int P> FA_INLINE Cut<P> cut_computed(Vec<float> x) {
  if constexpr (P == 1) return {{(Vec<float>)((Words)x + 0x8000)}};
  Cut<P> c;
  FA_UNROLL
  for (int i = 0; i < P; i++) {
    c.piece[i] = x;
    if (i + 1 < P) x -= upper(x);
  }
  return c;
}
// Of an operand that was found to be free of numbers that cannot be cut, or is made so.
template <int P> FA_INLINE Cut<P> cut_number(Vec<float> x) {
  if constexpr (P == 3) {
    const Vec<float> first = upper((Vec<float>)((Words)x + 0x8000));
    x -= first;
    return {{first, x, x - upper(x)}};
  } else if constexpr (P == 2) {
    return {{x, x - upper(x)}};
  } else {
    return {{x}};
  }
}

// W x W numbers of src from row r and column c, 0 beyond, as rows or columns.
template <class E, bool TRANSPOSE>
FA_INLINE void load_block(const Matrix& src, index_t r, index_t rows, index_t c, index_t cols,
                          bool native, Vec<float> (&x)[TILE]) {
  const char* p = src.data + r * src.row;
  if (native && r + TILE <= rows && c + TILE <= cols) {
    FA_UNROLL
    for (int i = 0; i < TILE; i++) x[i] = load_as<E>(p + i * src.row + c * src.col);
  } else {
    for (int i = 0; i < TILE; i++)
      x[i] = r + i < rows ? numbers_at<E>(p + i * src.row, src.col, c, cols, native) : Vec<float>{};
  }
  if constexpr (TRANSPOSE) transpose_registers<float>(x);
}

FA_INLINE Words larger(Words a, Words b) {
  return a > b ? a : b;
}
FA_INLINE Words magnitude(Vec<float> x) {
  return (Words)x & 0x7fffffff;
}
inline constexpr uint32_t FIRST_ODD = 0x7f7f8000;  // numbers from here on cannot be cut
FA_INLINE Vec<float> without_odd(Vec<float> x) {
  return magnitude(x) >= FIRST_ODD ? Vec<float>{} : x;
}

// dst = rows [r0, r0 + rows) of src, or their transpose, as an operand: as rows (the sum goes along
// its rows) or as words (along its columns). CAREFUL: what cannot be cut is replaced by 0; without,
// true says that there is such a number. `factor` is applied to float32 transposed to words.
template <class E, bool TRANSPOSE, bool AS_ROWS, bool CAREFUL>
FA_NOINLINE bool cut_matrix(const Matrix& src, index_t r0, index_t rows, index_t cols,
                            const Operand& dst, float factor) {
  constexpr bool along = TRANSPOSE != AS_ROWS;  // does the sum go along src's rows?
  constexpr int P = PIECES<E>;
  const bool native = is_native<E>(src);
  const Matrix from{src.data + r0 * src.row, src.row, src.col};
  Words largest{};
  for (index_t r = 0; r < rows; r += along ? TILE : DEPTH)
    for (index_t c = 0; c < cols; c += along ? DEPTH : TILE) {
      Vec<float> low[TILE], high[TILE];
      load_block<E, TRANSPOSE>(from, r, rows, c, cols, native, low);
      load_block<E, TRANSPOSE>(from, r + (along ? 0 : TILE), rows, c + (along ? TILE : 0), cols,
                               native, high);
      const index_t outer = along ? r : c, sum = along ? c : r;
      char* at = dst.data + (AS_ROWS ? outer * dst.row + 2 * sum : sum / 2 * dst.row + 4 * outer);
      FA_UNROLL
      for (int i = 0; i < TILE; i++) {
        if (P == 3 && TRANSPOSE && !AS_ROWS) low[i] *= splat(factor), high[i] *= splat(factor);
        if (CAREFUL) low[i] = without_odd(low[i]), high[i] = without_odd(high[i]);
        largest = larger(largest, larger(magnitude(low[i]), magnitude(high[i])));
        store_words<P>(at + i * dst.row, dst.piece, cut_number<P>(low[i]), cut_number<P>(high[i]));
      }
    }
  return any_lane((IntVec<float>)(largest >= FIRST_ODD));
}
template <class E, bool TRANSPOSE, bool AS_ROWS>
FA_INLINE bool cut_matrix(const Matrix& src, index_t r0, index_t rows, index_t cols,
                          const Operand& dst, float factor = 1) {
  const bool odd = cut_matrix<E, TRANSPOSE, AS_ROWS, false>(src, r0, rows, cols, dst, factor);
  if (odd) cut_matrix<E, TRANSPOSE, AS_ROWS, true>(src, r0, rows, cols, dst, factor);
  return odd;
}

// ---- what cannot be cut, by hand ----

// Element (r, c) of a matrix, as a number.
template <class E> FA_INLINE float number_at(const Matrix& m, index_t r, index_t c) {
  return gather_as<E>(m.data + r * m.row + c * m.col, 0, 1)[0];
}
FA_INLINE bool is_odd(float x) {
  return !(__builtin_fabsf(x) < 0x1.ffp127f);  // rounds to infinity in bfloat16
}
