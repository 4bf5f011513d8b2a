// Products on tiles (AMX): 16 x 32 by 32 x 16 bfloat16 numbers into 16 x 16 sums in float32, at
// sixteen times the rate of float32 multiply-adds.
//
// A float32 number is the sum of three bfloat16 pieces, exactly: 24 bits in three times eight. Of
// the nine products of pieces the six that matter are summed up (Henry, Tang and Heinecke,
// arXiv:1904.06376); what is left out is below 2^-24 of a product, less than a float32
// multiply-add rounds away. float16 needs two pieces, bfloat16 one. So float32 at full accuracy
// costs 6/16 of its multiply-adds, and the sums have fewer roundings: an instruction makes a sum of
// 32 products first.
//
// Operands in scratch, `pieces` matrices each, padded with zeros:
//   rows   A of A B: 16-bit elements, 16 rows by 32 elements (64 bytes) to a tile
//   words  B of A B: words of two elements that are neighbours along the sum, 16 rows of words (32
//          elements of the sum) by 16 columns to a tile
// Numbers that are not finite (and those that round to infinity) cannot be cut: they are replaced
// by 0, and whoever cuts is told, to put things right by hand. Numbers below 2^-100 lose their last
// pieces, as the instruction takes subnormal numbers for 0.
//
// An element of a product is the same sum in the same order wherever it lies in a tile: its bits
// depend on where its terms lie along the sum, modulo 32, and on nothing else.

template <class E> inline constexpr int PIECES = 3;
template <> inline constexpr int PIECES<Half> = 2;
template <> inline constexpr int PIECES<BFloat> = 1;

inline constexpr index_t TILE = 16;   // rows of a tile; its columns are TILE words
inline constexpr index_t DEPTH = 32;  // elements along the sum

FA_INLINE index_t up_to(index_t n, index_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Eight tiles of 16 rows of 64 bytes while this lives.
struct Tiles {
  FA_INLINE_MEMBER Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  FA_INLINE_MEMBER ~Tiles() { asm volatile("tilerelease"); }
};

// An operand: bytes from row to row and from piece to piece.
struct Operand {
  char* data;
  index_t row, piece;
};
// As rows: `rows` by `depth`; as words: `depth` by `columns`. Both rounded up to whole tiles.
FA_INLINE index_t rows_bytes(index_t rows, index_t depth) {
  return up_to(rows, TILE) * up_to(depth, DEPTH) * 2;
}
FA_INLINE index_t words_bytes(index_t depth, index_t columns) {
  return rows_bytes(columns, depth);
}
FA_INLINE Operand rows_operand(char*& scratch, int pieces, index_t rows, index_t depth) {
  const index_t piece = rows_bytes(rows, depth);
  return {carve<char>(scratch, pieces * piece), up_to(depth, DEPTH) * 2, piece};
}
FA_INLINE Operand words_operand(char*& scratch, int pieces, index_t depth, index_t columns) {
  const index_t piece = words_bytes(depth, columns);
  return {carve<char>(scratch, pieces * piece), up_to(columns, TILE) * 4, piece};
}

// ---- products ----

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 words.
template <int MI> FA_INLINE void load_rows_tiles(const char* a, index_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(a), "r"(row) : "memory");
  if (MI == 2)
    asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(a + TILE * row), "r"(row) : "memory");
}
template <int NJ> FA_INLINE void load_words_tiles(const char* b, index_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(b), "r"(row) : "memory");
  if (NJ == 2) asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(b + 64), "r"(row) : "memory");
}
// The unit for tiles is busy for 16 cycles with each of these, while the vector units are idle:
// meanwhile() does something else.
template <int MI, int NJ, class Work> FA_INLINE void multiply_tiles(Work& meanwhile) {
  asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0");
  meanwhile();
  if constexpr (NJ == 2) {
    asm volatile("tdpbf16ps %tmm7, %tmm4, %tmm1");
    meanwhile();
  }
  if constexpr (MI == 2) {
    asm volatile("tdpbf16ps %tmm6, %tmm5, %tmm2");
    meanwhile();
  }
  if constexpr (MI == 2 && NJ == 2) {
    asm volatile("tdpbf16ps %tmm7, %tmm5, %tmm3");
    meanwhile();
  }
}
struct Nothing {
  FA_INLINE_MEMBER void operator()() {}
};
template <int MI, int NJ> FA_INLINE void multiply_tiles() {
  Nothing nothing;
  multiply_tiles<MI, NJ>(nothing);
}
template <int MI, int NJ> FA_INLINE void clear_tiles() {
  asm volatile("tilezero %tmm0");
  if (NJ == 2) asm volatile("tilezero %tmm1");
  if (MI == 2) asm volatile("tilezero %tmm2");
  if (MI == 2 && NJ == 2) asm volatile("tilezero %tmm3");
}
template <int MI, int NJ> FA_INLINE void load_sums(const float* c, index_t row) {
  const char* p = reinterpret_cast<const char*>(c);
  asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(p), "r"(row) : "memory");
  if (NJ == 2) asm volatile("tileloadd (%0,%1,1), %%tmm1" ::"r"(p + 64), "r"(row) : "memory");
  p += TILE * row;
  if (MI == 2) asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(p), "r"(row) : "memory");
  if (MI == 2 && NJ == 2)
    asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(p + 64), "r"(row) : "memory");
}
template <int MI, int NJ> FA_INLINE void store_tiles(float* c, index_t row) {
  char* p = reinterpret_cast<char*>(c);
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(p), "r"(row) : "memory");
  if (NJ == 2) asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(p + 64), "r"(row) : "memory");
  p += TILE * row;
  if (MI == 2) asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(p), "r"(row) : "memory");
  if (MI == 2 && NJ == 2)
    asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(p + 64), "r"(row) : "memory");
}

// MI x NJ tiles: c = a b, over `steps` times DEPTH; c_row in bytes. Small products first, in an
// order that follows X's pieces: those of a, or where SWAP those of b. So x y and y x have the
// same bits.
template <int PA, int PB, int MI, int NJ, bool SWAP, bool ADD, class Work>
FA_INLINE void tile_product(const Operand& a, const Operand& b, index_t steps, float* c,
                            index_t c_row, Work& work) {
  constexpr int PX = SWAP ? PB : PA, PY = SWAP ? PA : PB;
  if constexpr (ADD)
    load_sums<MI, NJ>(c, c_row);
  else
    clear_tiles<MI, NJ>();
  const char *ap = a.data, *bp = b.data;
  for (index_t s = 0; s < steps; s++, ap += 2 * DEPTH, bp += DEPTH / 2 * b.row) {
    const auto load_piece = [&](bool rows, int piece) __attribute__((always_inline)) {
      if (rows)
        load_rows_tiles<MI>(ap + piece * a.piece, a.row);
      else
        load_words_tiles<NJ>(bp + piece * b.piece, b.row);
    };
    const auto x = [&](int piece) __attribute__((always_inline)) { load_piece(!SWAP, piece); };
    const auto y = [&](int piece) __attribute__((always_inline)) { load_piece(SWAP, piece); };
    y(PX == 1 ? PY - 1 : 0);
    if constexpr (PX == 3) x(2), multiply_tiles<MI, NJ>(work);
    if constexpr (PX > 1) x(1), multiply_tiles<MI, NJ>(work);
    if constexpr (PX > 1 && PY > 1) y(1), multiply_tiles<MI, NJ>(work);
    x(0), multiply_tiles<MI, NJ>(work);
    if constexpr (PX > 1 && PY == 3) y(2), multiply_tiles<MI, NJ>(work);
    if constexpr (PX == 1 && PY == 3) y(1), multiply_tiles<MI, NJ>(work);
    if constexpr (PY > 1) y(0), multiply_tiles<MI, NJ>(work);
  }
  store_tiles<MI, NJ>(c, c_row);
}
template <int PA, int PB, int MI, int NJ, bool SWAP = false>
FA_INLINE void tile_product(const Operand& a, const Operand& b, index_t steps, float* c,
                            index_t c_row) {
  Nothing work;
  tile_product<PA, PB, MI, NJ, SWAP, false>(a, b, steps, c, c_row, work);
}
// How many products of 16 x 16 sums that makes for each DEPTH.
template <int PX, int PY>
inline constexpr int PRODUCTS = PX == 3 && PY == 3   ? 6
                                : PX == 2 && PY == 3 ? 5
                                                     : PX * PY;

// c (m x n, rounded up to whole tiles) = a b, or where ADD c += a b.
template <int PA, int PB, bool SWAP, bool ADD, class Work>
FA_NOINLINE void multiply_operands(index_t m, index_t n, index_t depth, const Operand& a,
                                   const Operand& b, float* c, index_t c_row, Work& work) {
  const index_t steps = (depth + DEPTH - 1) / DEPTH;
  for (index_t i = 0; i < m; i += 2 * TILE)
    for (index_t j = 0; j < n; j += 2 * TILE) {
      const Operand at{a.data + i * a.row, a.row, a.piece}, bt{b.data + 4 * j, b.row, b.piece};
      float* ct = reinterpret_cast<float*>(reinterpret_cast<char*>(c + j) + i * c_row);
      const bool two = m - i > TILE, wide = n - j > TILE;
      if (two && wide) tile_product<PA, PB, 2, 2, SWAP, ADD>(at, bt, steps, ct, c_row, work);
      if (two && !wide) tile_product<PA, PB, 2, 1, SWAP, ADD>(at, bt, steps, ct, c_row, work);
      if (!two && wide) tile_product<PA, PB, 1, 2, SWAP, ADD>(at, bt, steps, ct, c_row, work);
      if (!two && !wide) tile_product<PA, PB, 1, 1, SWAP, ADD>(at, bt, steps, ct, c_row, work);
    }
}
template <int PA, int PB, class Work>
FA_INLINE void multiply_operands(index_t m, index_t n, index_t depth, const Operand& a,
                                 const Operand& b, float* c, index_t c_row, Work& work) {
  multiply_operands<PA, PB, false, false>(m, n, depth, a, b, c, c_row, work);
}
template <int PA, int PB, bool SWAP = false, bool ADD = false>
FA_INLINE void multiply_operands(index_t m, index_t n, index_t depth, const Operand& a,
                                 const Operand& b, float* c, index_t c_row) {
  Nothing work;
  multiply_operands<PA, PB, SWAP, ADD>(m, n, depth, a, b, c, c_row, work);
}

// What the unit for tiles can do at most, on numbers that are not all the same: with zeros it is
// clocked higher. A round is 12 chains of multiplications, as in limits.inl.
static double multiply_tiles_flops(index_t rounds) {
  alignas(64) uint16_t numbers[TILE * DEPTH];
  for (index_t i = 0; i < TILE * DEPTH; i++)
    numbers[i] = uint16_t(0x3f00 | (i * 2654435761u >> 24) | i << 15);
  const Tiles tiles;
  const char* p = reinterpret_cast<const char*>(numbers);
  clear_tiles<2, 2>();
  load_rows_tiles<2>(p, 0);  // the second tile of each: a row over and over
  load_words_tiles<2>(p, 0);
  load_rows_tiles<1>(p, 64);
  load_words_tiles<1>(p, 64);
  const index_t calls = rounds / 32;  // a tile takes 16 cycles, a vector half of one
  for (index_t r = 0; r < calls; r++) multiply_tiles<2, 2>();
  return double(calls) * 4 * TILE * TILE * DEPTH * 2;
}

// ---- cutting ----

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
