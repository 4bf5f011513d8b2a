// Products of float32 matrices on tiles (tiles.h says how numbers are cut and what that costs).
//
// Cost model, in cycles: a band of 32 rows of A times a band of 32 columns of B takes 384 for
// every 32 of k (24 instructions of 16), 12 for each unit of depth. Both bands are cut: 192 bytes
// of each for a unit of depth. The band of B is TILED_DEPTH deep, 24 KB, and stays in L1; those of
// A come from L2 at 16 bytes a cycle, one after the other. Cutting takes about 0.3 for an element,
// 0.45 if it is transposed on the way, and its products m / 85 (of B) or n / 85 (of A): a few
// hundred rows and columns pay for it. What becomes of the sums is done by the vector units while
// the tiles multiply the next bands.
//
// An element of C is a sum on tiles for each piece of k, and the sum of those, in order. Pieces are
// multiples of 32 whose sizes depend on k alone, so an element's bits depend on its row of A, its
// column of B and k. One that comes out not finite is computed again by multiply-adds: NaN,
// infinities, and numbers whose pieces or whose products overflow.
#pragma once

#include "kernel/amx/cut.h"
#include "kernel/amx/pace.h"
#include "kernel/layers/product.h"

namespace fusedattn {
namespace {

inline constexpr index_t BAND = 2 * TILE;
inline constexpr index_t TILED_DEPTH = 128;
inline constexpr index_t PIECE_BYTES = BAND * DEPTH * 2;
inline constexpr index_t STEP_BYTES = 3 * PIECE_BYTES;  // a band, DEPTH deep

FA_INLINE index_t bands_of(index_t n) {
  return (n + BAND - 1) / BAND;
}
// As depth_of, in steps of DEPTH.
FA_INLINE index_t tiled_depth_of(index_t k) {
  const index_t steps = max_index(1, up_to(k, DEPTH) / DEPTH);
  const index_t pieces = up_to(steps * DEPTH, TILED_DEPTH) / TILED_DEPTH;
  return (steps + pieces - 1) / pieces * DEPTH;
}

// ---- cutting ----

// Three pieces of 32 numbers, as words (low[i], high[i]).
FA_INLINE void cut_band_words(Vec<float> low, Vec<float> high, char* dst) {
  store_words<3>(dst, PIECE_BYTES, cut_number<3>(low), cut_number<3>(high));
}

// The R x C numbers of a matrix from (r, c), where vectors can be read: in place, or else copied,
// with zeros beyond `rows` and `cols`.
template <index_t R, index_t C>
FA_INLINE Rows<float> cut_source(const Matrix& m, index_t r, index_t rows, index_t c, index_t cols,
                                 float* copy) {
  char* at = m.data + r * m.row + c * m.col;
  const bool whole = rows >= R && cols >= C, straight = m.col == index_t(sizeof(float));
  if (whole && straight)
    return {reinterpret_cast<const float*>(at), m.row / index_t(sizeof(float))};
  if (!whole) __builtin_memset(copy, 0, R * C * sizeof(float));
  const index_t nr = min_index(R, rows), nc = min_index(C, cols);
  if (straight)
    copy_rows<float>({at, m.row, m.col}, 0, nr, nc, 1.0f, copy, C);
  else
    pack_transposed<float>({at, m.col, m.row}, 0, nc, nr, 1.0f, copy, C);
  return {copy, C};
}

// Rows [i, i + rows) of A, `depth` of k from k0. Tiles lie one after the other; a word holds k and
// k + 16, as it does in B.
FA_NOINLINE void cut_band_of_a(const Matrix& a, index_t i, index_t rows, index_t k0, index_t depth,
                               float* copy, char* dst) {
  for (index_t k = 0; k < depth; k += DEPTH, dst += STEP_BYTES)
    for (index_t t = 0; t < min_index(BAND, rows); t += TILE) {
      const Rows<float> x = cut_source<TILE, DEPTH>(a, i + t, rows - t, k0 + k, depth - k, copy);
      for (index_t r = 0; r < TILE; r++) {
        const float* row = x.data + r * x.ld;
        cut_band_words(load(row), load(row + TILE), dst + (t + r) * 64);
      }
    }
}
// Columns [j, j + columns) of B.
FA_NOINLINE void cut_band_of_b(const Matrix& b, index_t k0, index_t depth, index_t j,
                               index_t columns, float* copy, char* dst) {
  for (index_t k = 0; k < depth; k += DEPTH, dst += STEP_BYTES)
    for (index_t t = 0; t < min_index(BAND, columns); t += TILE) {
      const Rows<float> x = cut_source<DEPTH, TILE>(b, k0 + k, depth - k, j + t, columns - t, copy);
      keep_awake();
      for (index_t r = 0; r < TILE; r++)
        cut_band_words(load(x.data + r * x.ld), load(x.data + (r + TILE) * x.ld),
                       dst + r * 128 + t * 4);
    }
}

// ---- products ----

// A piece of k for one band of columns.
struct BandPlace {
  index_t j, columns, k0, depth;
  bool first, done;
};
// Sums on their way to C, from `row` on.
struct BandSums {
  const Product* p;
  BandPlace at;
  index_t i, rows, row;  // the first one's number, how many there are, the next one
  float* sums;           // 32 x 32
  float* copy;           // scratch for a band of B
  bool summed_again;
};

// Sums that are not finite again, by multiply-adds.
FA_NOINLINE void sum_again(BandSums& s) {
  const Product& p = *s.p;
  const BandPlace& at = s.at;
  for (index_t k = 0; k < at.depth; k += DEPTH)
    for (index_t t = 0; t < BAND; t += TILE) {
      alignas(64) float copy[DEPTH * TILE];
      const Rows<float> x = cut_source<DEPTH, TILE>(p.b, at.k0 + k, at.depth - k, at.j + t,
                                                    max_index(0, at.columns - t), copy);
      for (index_t r = 0; r < DEPTH; r++)
        store(s.copy + (k + r) * BAND + t, load(x.data + r * x.ld));
    }
  for (index_t r = 0; r < s.rows; r++) {
    const char* a = p.a.data + (s.i + r) * p.a.row + at.k0 * p.a.col;
    Vec<float> sum[2] = {};
    for (index_t k = 0; k < at.depth; k++)
      for (int v = 0; v < 2; v++)
        sum[v] = fma<float>(splat(*reinterpret_cast<const float*>(a + k * p.a.col)),
                            load(s.copy + k * BAND + v * TILE), sum[v]);
    for (int v = 0; v < 2; v++) {
      float* tiled = s.sums + r * BAND + v * TILE;
      const Vec<float> x = load(tiled);
      store(tiled, x - x == Vec<float>{} ? x : sum[v]);
    }
  }
  s.summed_again = true;
}

// A row of sums becomes one of C, activations and all: they must not wait for memory.
template <int NJ> FA_INLINE void finish_row(BandSums& s) {
  const Product& p = *s.p;
  const float* sums = s.sums + s.row * BAND;
  Vec<float> x[NJ], check{};
  FA_UNROLL
  for (int v = 0; v < NJ; v++) {
    x[v] = load(sums + v * TILE);
    check = fma<float>(x[v], Vec<float>{}, check);
  }
  if (_mm512_cmpneq_ps_mask((__m512)check, _mm512_setzero_ps()) && !s.summed_again) {
    sum_again(s);
    for (int v = 0; v < NJ; v++) x[v] = load(sums + v * TILE);
  }
  const index_t i = s.i + s.row, j = s.at.j;
  const Joining<float> with = joining<float>(p, i, j, s.at.first);
  float* c = row_of<float>(p.c, i) + j;
  const int last = int(s.at.columns - (NJ - 1) * TILE);
  const auto each = [&](auto&& f) FA_LAMBDA {
    FA_UNROLL
    for (int v = 0; v < NJ; v++) f(x[v], v * TILE, v == NJ - 1 ? last : TILE);
  };
  if (with.bias)
    each([&](Vec<float>& sum, index_t at, int lanes)
             FA_LAMBDA { sum += load_lanes(with.bias + at, lanes); });
  if (with.before)
    each([&](Vec<float>& sum, index_t at, int lanes)
             FA_LAMBDA { sum += load_lanes(with.before + at, lanes); });
  float* slope = p.slope.data ? row_of<float>(p.slope, i) + j : nullptr;
  if (s.at.done)
    with_then(p.then, [&]<Then THEN>() FA_LAMBDA { activate<float, THEN>(x, slope, last); });
  each([&](Vec<float> sum, index_t at, int lanes) FA_LAMBDA { store_lanes(c + at, sum, lanes); });
}
// For the line of C to be there in time. Rows are often a multiple of 4096 bytes apart and share a
// few cache lines.
inline constexpr index_t ROWS_AHEAD = 6;
FA_INLINE void expect_row(const Matrix& m, index_t i, index_t j) {
  char* at = m.data + i * m.row + j * index_t(sizeof(float));
  __builtin_prefetch(at, 1, 3);
  __builtin_prefetch(at + 64, 1, 3);
}
FA_NOINLINE void finish_next(BandSums& s) {
  const Product& p = *s.p;
  if (s.at.columns > TILE)
    finish_row<2>(s);
  else
    finish_row<1>(s);
  expect_row(p.c, s.i + s.row + ROWS_AHEAD, s.at.j);
  if (p.slope.data && s.at.done) expect_row(p.slope, s.i + s.row + ROWS_AHEAD, s.at.j);
  s.row++;
}

FA_NOINLINE void finish_rows(BandSums& s) {
  while (s.row < s.rows) finish_next(s);
}
// Beside the products of a band two rows of the sums before become rows of C at each call, as long
// as there are any: in even steps (Paced) they took 7 % longer on an Emerald Rapids.
struct FinishRows {
  Fetcher& fetcher;
  BandSums& last;
  FA_INLINE_MEMBER void operator()(int) {
    for (int i = 0; i < 2 && last.row < last.rows; i++) finish_next(last);
    fetch(fetcher);
  }
};
inline constexpr index_t CALLS = piece_order<3, 3>().n;  // of it for DEPTH numbers along the sum

// Scratch of one task.
struct TiledProductScratch {
  char *a, *b;
  float *sums[2], *copy;

  FA_INLINE_MEMBER TiledProductScratch(index_t rows, Layout& scratch) {
    const index_t steps = TILED_DEPTH / DEPTH;
    a = scratch.take<char>(bands_of(rows) * steps * STEP_BYTES);
    b = scratch.take<char>(steps * STEP_BYTES);
    for (float*& own : sums) own = scratch.take<float>(BAND * BAND);
    copy = scratch.take<float>(TILED_DEPTH * BAND);
  }
};

// One band of columns and one piece of k, all rows of A.
FA_NOINLINE void product_band(const Product& p, const BandPlace& at, const char* a, index_t a_band,
                              const PartOfC& c, const TiledProductScratch& own, Fetcher& fetcher,
                              BandSums& last) {
  const index_t steps = up_to(at.depth, DEPTH) / DEPTH;
  const Operand b_band{own.b, 128, PIECE_BYTES};
  for (index_t i = 0; i < c.rows; i += BAND, a += a_band) {
    const index_t rows = min_index(BAND, c.rows - i);
    float* sums = last.sums == own.sums[0] ? own.sums[1] : own.sums[0];
    with_tiles(rows, at.columns, [&]<int MI, int NJ>() FA_LAMBDA {
      stepped_product<3, 3, MI, NJ>({const_cast<char*>(a), 64, PIECE_BYTES}, STEP_BYTES, b_band,
                                    STEP_BYTES, steps, sums, BAND * sizeof(float),
                                    FinishRows{fetcher, last});
    });
    finish_rows(last);
    last = {&p, at, c.i0 + i, rows, 0, sums, own.copy, false};
  }
}

FA_ENTRY void product_tiled(const Product& p, index_t i0, index_t rows, index_t j0, index_t j1,
                            index_t next_rows, void* scratch) {
  const PartOfC c{i0, rows, j0, j1, next_rows};
  Layout layout(scratch);
  const TiledProductScratch own(rows, layout);
  const index_t depth = tiled_depth_of(p.k), a_band = depth / DEPTH * STEP_BYTES;
  const Tiles tiles;
  Fetcher fetcher;
  BandSums last{};
  for (index_t k0 = 0; k0 < p.k; k0 += depth) {
    const index_t n = min_index(depth, p.k - k0);
    if (p.row_sums && j0 == 0)
      sum_rows<float>(p.a, i0, rows, k0, n, k0 == 0, static_cast<float*>(p.row_sums));
    for (index_t i = 0; i < rows; i += BAND)
      cut_band_of_a(p.a, i0 + i, rows - i, k0, n, own.copy, own.a + i / BAND * a_band);
    for (index_t j = j0; j < j1; j += BAND) {
      const index_t columns = min_index(BAND, j1 - j);
      cut_band_of_b(p.b, k0, n, j, columns, own.copy, own.b);
      fetch_next_blocks<float>(fetcher, p, c, k0, depth, j, BAND);
      start_fetching(fetcher, bands_of(rows) * up_to(n, DEPTH) / DEPTH * CALLS, LINES_AT_ONCE);
      product_band(p, {j, columns, k0, n, k0 == 0, k0 + n == p.k}, own.a, a_band, c, own, fetcher,
                   last);
    }
  }
  finish_rows(last);
}

// Narrow and shallow products gain nothing. The number of rows must not matter.
FA_INLINE bool on_tiles(const Product& p) {
  return p.n >= BAND && p.k >= 2 * DEPTH;
}

FA_ENTRY size_t product_scratch_on_tiles(const Product& p, index_t rows) {
  if (!on_tiles(p)) return product_scratch<float>(p, rows);
  Layout measure(nullptr);
  TiledProductScratch(rows, measure);
  return measure.bytes();
}

FA_ENTRY void product_on_tiles(const Product& p, index_t i0, index_t rows, index_t j0, index_t j1,
                               index_t next_rows, void* scratch) {
  (on_tiles(p) ? product_tiled : product<float>)(p, i0, rows, j0, j1, next_rows, scratch);
}

}  // namespace
}  // namespace fusedattn
