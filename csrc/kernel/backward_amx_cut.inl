// Operands of the backward pass on tiles. Numbers i and i + 16 of each 32 along a sum make a word,
// in the operands on both sides: so a word is made of two vectors without a shuffle, and one
// function cuts matrices in all four ways. Whatever is computed (P and dS) is cut in the same way.

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
// true says that there is such a number.
template <class E, bool TRANSPOSE, bool AS_ROWS, bool CAREFUL>
FA_NOINLINE bool cut_matrix(const Matrix& src, index_t r0, index_t rows, index_t cols,
                            const Operand& dst) {
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
        if (CAREFUL) low[i] = without_odd(low[i]), high[i] = without_odd(high[i]);
        largest = larger(largest, larger(magnitude(low[i]), magnitude(high[i])));
        store_words<P>(at + i * dst.row, dst.piece, cut_number<P>(low[i]), cut_number<P>(high[i]));
      }
    }
  return any_lane((IntVec<float>)(largest >= FIRST_ODD));
}
template <class E, bool TRANSPOSE, bool AS_ROWS>
FA_INLINE bool cut_matrix(const Matrix& src, index_t r0, index_t rows, index_t cols,
                          const Operand& dst) {
  const bool odd = cut_matrix<E, TRANSPOSE, AS_ROWS, false>(src, r0, rows, cols, dst);
  if (odd) cut_matrix<E, TRANSPOSE, AS_ROWS, true>(src, r0, rows, cols, dst);
  return odd;
}
