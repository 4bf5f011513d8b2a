// The two products of few.h. Rows of K and V are fetched in the order of their addresses,
// which is what memory is fast at, and cut a few hundred bytes at a time, 16 rows or pairs of rows
// one after the other: as much as leaves the pieces in the L1 cache until they are multiplied.
// While the tiles multiply some, the vector units cut the next. Nobody looks whether numbers can be
// cut: those that cannot make all sums they reach NaN or infinite, which tells afterwards.
#pragma once

#include "kernel/amx/cut.h"

namespace fusedattn {
namespace {

// Tiles: 0 sums S^T [16 keys x columns]; 2 words of Q^T; 3, 4 K as rows or V as words; 5 rows of P;
// 6, 7 sums O [rows x 32]. A multiplication takes 16 cycles for 16 rows on its left, 10 for 8.
struct FewTiles {
  index_t rows, columns;  // queries; in S^T a power of two

  FA_INLINE_MEMBER FewTiles(index_t count) : rows(count), columns(1) {
    while (columns < count) columns *= 2;
    configure();
  }
  FA_INLINE_MEMBER ~FewTiles() { asm volatile("tilerelease"); }
  FA_INLINE_MEMBER void configure() const {
    const uint16_t s = uint16_t(4 * columns);
    const uint8_t n = uint8_t(rows);
    alignas(64) const struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config{.row_bytes = {s, s, s, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, n, n, n}};
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
};

template <int T> FA_INLINE void load_tile(const char* p, index_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row), "i"(T) : "memory");
}
template <int T> FA_INLINE void store_tile(float* p, index_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row), "i"(T) : "memory");
}
template <int C, int A, int B> FA_INLINE void multiply_tile_pair() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Bytes: fetched into L2 and, where cutting is the limit, into L1 ahead of what is cut.
inline constexpr index_t LEAD = 3584, NEAR = 1024, TILE_BYTES = 1024;
inline constexpr index_t CUT_TILES = 12;  // of all pieces, in a block that is cut

// Rows of a block of K or V: those before `split`, a multiple of 32, where they lie, the others
// copied, with zeros around them.
struct FewRows {
  Matrix whole, rest;
  index_t split;

  FA_INLINE_MEMBER Matrix at(index_t r) const {  // its first row is row r
    const Matrix& m = r < split ? whole : rest;
    return {m.data + (r < split ? r : r - split) * m.row, m.row, m.col};
  }
};

// Lines of K or V that are fetched into L2 ahead of the 16 rows that are cut: row after row, or
// rows r and r + 16 of each 32 together. No Fetcher (vector/fetch.h): that spreads what is read
// after this task over its steps, this stays a fixed distance ahead of the task's own reading, to
// its end.
struct FewFetch {
  const char *at, *row_end;
  index_t row, bytes, lead;    // bytes from row to row, of a row, fetched but not yet cut
  index_t rows = TILE, other;  // left of 16; bytes to the row that goes along, 0 if none

  FA_INLINE_MEMBER FewFetch(const Matrix& m, index_t first, index_t row_bytes, bool pairs,
                            bool useful)
      : at(m.data + first * m.row),
        row_end(at + row_bytes),
        row(m.row),
        bytes(row_bytes),
        lead(useful ? 0 : UNBOUNDED),
        other(pairs ? TILE * m.row : 0) {
    passed(0);
  }
  FA_INLINE_MEMBER void passed(index_t n) {  // bytes of a row are cut
    for (lead -= n; lead < TILE * bytes + LEAD; lead += 64) {
      prefetch_far(at);
      if (other) prefetch_far(at + other);
      at += 64;
      if (at < row_end) continue;
      row_end += row;
      if (--rows == 0) row_end += other, rows = TILE;
      at = row_end - bytes;
    }
  }
};

// Words of 16 elements and the 16 after them.
template <int... I> FA_INLINE Vec<float> interleave(Vec<float> x, Seq<I...>) {
  typedef uint16_t Elements __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));
  return (Vec<float>)__builtin_shufflevector((Elements)x, (Elements)x, (I / 2 + I % 2 * 16)...);
}
// Words of `low` and `high`, 16 elements each, in pieces a tile apart. Nobody looks whether numbers
// can be cut.
template <class E> FA_INLINE void cut_words_unseen(char* to, const char* low, const char* high) {
  constexpr int P = PIECES<E>;
  if constexpr (P == 1) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)),
                  b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
    const Vec<float> both =
        (Vec<float>)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(a), b, 1);
    store(reinterpret_cast<float*>(to), interleave(both, typename MakeSeq<32>::type{}));
  } else {
    store_words<P>(to, TILE_BYTES, cut_number<P>(load_as<E>(low)), cut_number<P>(load_as<E>(high)));
  }
}

// Cuts native rows, 32 numbers to a unit, a block of 16 rows by a few tiles at a time: K as rows,
// 32 columns to a tile; V as words of keys r and r + 16 of 32, 16 columns to a tile. Tile (column,
// piece) at column * P + piece.
template <class E, bool VALUES> struct FewCutter {
  static constexpr index_t most = CUT_TILES / PIECES<E>,  // tiles of a piece in a block
      bytes = (VALUES ? 16 : 32) * sizeof(E), column = PIECES<E> * TILE_BYTES,
                           group = VALUES ? 2 * TILE : TILE;  // keys
  const FewRows& m;
  const index_t columns;
  const char* from;
  char* to;
  index_t high, skip, jump;  // to the other number of a word; from row to row, of both sides
  index_t width, left;       // tiles of the block; units of the row
  FewFetch fetch;

  FA_INLINE_MEMBER FewCutter(const FewRows& rows, index_t tiles, const FewFetch& f)
      : m(rows), columns(tiles), fetch(f) {}
  // The block of keys from `key` on and tiles from `c` on is next. How many units it has.
  FA_INLINE_MEMBER index_t begin(index_t key, index_t c, char* tiles) {
    const Matrix x = m.at(key);
    left = width = min_index(most, columns - c);
    from = x.data + c * bytes;
    to = tiles;
    high = VALUES ? TILE * x.row : index_t(16 * sizeof(E));
    skip = x.row - width * bytes;
    jump = 64 - width * column;
    return TILE * width;
  }
  // The one after the block of `key` and `c`, of `keys` in all; 0 if there is none.
  FA_INLINE_MEMBER index_t begin_next(index_t key, index_t c, index_t keys, char* tiles) {
    if (c + most < columns) return begin(key, c + most, tiles);
    return key + group < keys ? begin(key + group, 0, tiles) : 0;
  }
  FA_INLINE_MEMBER void unit() {
    fetch.passed(bytes);
    if constexpr (PIECES<E> == 3) prefetch_near(from + NEAR), prefetch_near(from + NEAR + high);
    cut_words_unseen<E>(to, from, from + high);
    from += bytes;
    to += column;
    if (--left) return;
    left = width;
    from += skip;
    to += jump;
  }
};

// s[key][column] = K Q^T for `rows` keys (a multiple of 16), `steps` times 32 elements. `pieces`
// has room for two blocks.
template <class E>
FA_NOINLINE void few_scores_on_tiles(const FewRows& k, index_t rows, index_t steps,
                                     const Operand& q, index_t columns, float* s, char* pieces,
                                     FewFetch& fetch) {
  constexpr int P = PIECES<E>;
  constexpr PieceOrder order = piece_order<P, P>();
  FewCutter<E, false> cutter(k, steps, fetch);
  char *now = pieces, *next = pieces + cutter.most * cutter.column;
  for (index_t n = cutter.begin(0, 0, now); n > 0; n--) cutter.unit();
  for (index_t i = 0; i < rows; i += TILE) {
    const char* words = q.data;
    asm volatile("tilezero %tmm0");
    for (index_t c = 0; c < steps; c += cutter.most) {
      const index_t end = min_index(c + cutter.most, steps);
      index_t left = cutter.begin_next(i, c, rows, next);
      const char* x = now;
      for (index_t j = c; j < end; j++, x += P * TILE_BYTES, words += TILE * q.row)
        unrolled<order.n>([&]<int T>() FA_LAMBDA {
          constexpr int px = order.x[T], py = order.y[T];
          if constexpr (order.new_y(T)) load_tile<2>(words + py * q.piece, q.row);
          if constexpr (order.new_x(T)) load_tile<3>(x + px * TILE_BYTES, 64);
          multiply_tile_pair<0, 3, 2>();
          constexpr int units = TILE / order.n + 1;
          for (int u = 0; u < units && left > 0; u++, left--) cutter.unit();
        });
      for (; left > 0; left--) cutter.unit();
      char* t = now;
      now = next;
      next = t;
    }
    store_tile<0>(s + i * columns, 4 * columns);
  }
  fetch = cutter.fetch;
}

// sums[row][column] = P V, or where ADD += P V, for `rows` keys (a multiple of 32), `columns` times
// 16 columns. Before each 32 keys, meanwhile(first key). `pieces` has room for two blocks.
template <class E, bool ADD, class F>
FA_INLINE void few_values_on_tiles(const FewRows& v, index_t rows, index_t columns,
                                   const Operand& p, float* sums, char* pieces, FewFetch& fetch,
                                   F&& meanwhile) {
  constexpr int P = PIECES<E>;
  constexpr PieceOrder order = piece_order<P, P_PIECES<E>>();
  const index_t ld = columns * TILE;
  FewCutter<E, true> cutter(v, columns, fetch);
  char *now = pieces, *next = pieces + cutter.most * cutter.column;
  for (index_t n = cutter.begin(0, 0, now); n > 0; n--) cutter.unit();
  for (index_t i = 0; i < rows; i += DEPTH) {
    meanwhile(i);
    for (index_t begin = 0; begin < columns; begin += cutter.most) {
      const index_t end = min_index(begin + cutter.most, columns);
      index_t left = cutter.begin_next(i, begin, rows, next);
      const char* x = now;
      for (index_t c = begin; c < end; c += 2, x += 2 * P * TILE_BYTES) {
        const bool two = c + 1 < end;
        float* sum = sums + c * TILE;
        if (ADD || i) {
          load_tile<6>(reinterpret_cast<char*>(sum), 4 * ld);
          if (two) load_tile<7>(reinterpret_cast<char*>(sum + TILE), 4 * ld);
        } else {
          asm volatile("tilezero %tmm6");
          asm volatile("tilezero %tmm7");
        }
        unrolled<order.n>([&]<int T>() FA_LAMBDA {
          constexpr int px = order.x[T], py = order.y[T];
          if constexpr (order.new_y(T)) load_tile<5>(p.data + 2 * i + py * p.piece, p.row);
          if constexpr (order.new_x(T)) {
            load_tile<3>(x + px * TILE_BYTES, 64);
            if (two) load_tile<4>(x + (P + px) * TILE_BYTES, 64);
          }
          multiply_tile_pair<6, 5, 3>();
          if (two) multiply_tile_pair<7, 5, 4>();
          constexpr int units = 2 * TILE / order.n + 1;
          for (int u = 0; u < units && left > 0; u++, left--) cutter.unit();
        });
        store_tile<6>(sum, 4 * ld);
        if (two) store_tile<7>(sum + TILE, 4 * ld);
      }
      for (; left > 0; left--) cutter.unit();
      char* t = now;
      now = next;
      next = t;
    }
  }
  fetch = cutter.fetch;
}

// Are all numbers finite?
struct AllFinite {
  Words largest{};
  FA_INLINE_MEMBER void add(Vec<float> x) {
    const Words magnitude = (Words)x & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  FA_INLINE_MEMBER bool all() const {
    return !any_lane<float>((IntVec<float>)(largest >= 0x7f800000));
  }
};

// p[row][key] = factor * s[key][row] for 16 keys and C rows (a power of two). Each step halves the
// rows that are mixed in a vector.
template <int C>
FA_INLINE void few_columns(const float* s, float* p, index_t p_row, float factor,
                           AllFinite& finite) {
  Vec<float> t[C];
  FA_UNROLL
  for (int i = 0; i < C; i++) t[i] = load(s + i * W<float>);
  FA_UNROLL
  for (int part = C; part > 1; part /= 2) FA_UNROLL
  for (int at = 0; at < C; at += part) {
    Vec<float> x[C];
    FA_UNROLL
    for (int i = 0; i < part; i++) x[i] = t[at + i];
    FA_UNROLL
    for (int i = 0; i < part / 2; i++) {
      t[at + i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18,
                                          20, 22, 24, 26, 28, 30);
      t[at + part / 2 + i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 3, 5, 7, 9, 11, 13,
                                                     15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
  }
  FA_UNROLL
  for (int i = 0; i < C; i++) {
    constexpr int bits = C == 16 ? 4 : C == 8 ? 3 : C == 4 ? 2 : C == 2 ? 1 : 0;
    int row = 0;  // i's bits reversed
    for (int b = 0; b < bits; b++) row |= (i >> b & 1) << (bits - 1 - b);
    finite.add(t[i]);
    store(p + row * p_row, t[i] * splat(factor));
  }
}
template <int C>
FA_NOINLINE bool few_columns(index_t n, const float* s, float* p, index_t p_row, float factor) {
  AllFinite finite;
  for (index_t i = 0; i < n; i += W<float>) few_columns<C>(s + i * C, p + i, p_row, factor, finite);
  return finite.all();
}

}  // namespace
}  // namespace fusedattn
