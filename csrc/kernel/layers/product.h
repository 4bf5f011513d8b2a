// Matrix products with what a layer does right before and after them.
//
// Cost model: a register tile of PRODUCT_ROWS x MAX_NJ vectors keeps the multiply-add units busy
// (see tile.h). Its rows of A (6 x 256 elements) stay in L1, a packed panel of B (256 x 64)
// streams from L2 at 256 bytes for 24 multiply-adds, so packing B serves a few hundred rows of A,
// and everything done to a finished tile finds it in L1.
//
// An element of C is a chain of multiply-adds for each PRODUCT_DEPTH of k, k ascending, and the sum
// of those chains, in order: its bits depend on its row of A, its column of B and k alone.
#pragma once

#include "kernel/layers/activations.h"
#include "kernel/vector/fetch.h"
#include "kernel/vector/move.h"
#include "kernel/vector/scratch.h"
#include "kernel/vector/tile.h"

namespace fusedattn {
namespace {

template <class T> inline constexpr int PANEL = MAX_NJ * W<T>;
inline constexpr int PRODUCT_ROWS = 6;
inline constexpr index_t PRODUCT_DEPTH = 256;

// How long the pieces are that k is cut into: as even as possible.
FA_INLINE index_t depth_of(index_t k) {
  const index_t pieces = max_index(1, (k + PRODUCT_DEPTH - 1) / PRODUCT_DEPTH);
  return max_index(1, (k + pieces - 1) / pieces);
}
// Elements of a block of A, packed either way.
template <class T> FA_INLINE index_t packed_size(index_t rows, index_t depth) {
  const index_t tiles = (rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
  return tiles * (PRODUCT_ROWS * (round_up<T>(depth) + W<T>)+16);
}

// A block of A and a panel of B, packed.
template <class T> struct ProductScratch {
  T *a, *b;
  FA_INLINE_MEMBER ProductScratch(const Product& p, index_t rows, Layout& scratch)
      : a(scratch.take<T>(packed_size<T>(rows, depth_of(p.k)))),
        b(scratch.take<T>(depth_of(p.k) * PANEL<T>)) {}
};
template <class T> FA_ENTRY size_t product_scratch(const Product& p, index_t rows) {
  Layout measure(nullptr);
  ProductScratch<T>(p, rows, measure);
  return measure.bytes();
}

// Elements from one tile of packed columns to the next; the last copy of a tile writes two too
// many.
FA_INLINE index_t column_tile(index_t depth) {
  return depth * PRODUCT_ROWS + 16;
}

// dst[tile][p][r] = a[i0 + tile * PRODUCT_ROWS + r][k0 + p], where a's columns are contiguous. A
// few rows of memory at a time: their distance is often a multiple of 4096 bytes.
template <class T>
FA_NOINLINE void pack_columns(const Matrix& a, index_t i0, index_t rows, index_t k0, index_t depth,
                              T* dst) {
  constexpr index_t R = PRODUCT_ROWS, COPIED = 8, AT_ONCE = 4;
  const char* src = a.data + i0 * index_t(sizeof(T)) + k0 * a.col;
  for (index_t p0 = 0; p0 < depth; p0 += AT_ONCE) {
    const index_t n = min_index(AT_ONCE, depth - p0);
    T* d = dst + p0 * R;
    for (index_t i = 0; i < rows; i += R, d += column_tile(depth)) {
      const char* s = src + p0 * a.col + i * index_t(sizeof(T));
      if (i + COPIED <= rows) {
        for (index_t p = 0; p < n; p++)
          __builtin_memcpy(d + p * R, s + p * a.col, COPIED * sizeof(T));
      } else {
        for (index_t p = 0; p < n; p++)
          for (index_t r = 0; r < R; r++)
            d[p * R + r] = i + r < rows ? reinterpret_cast<const T*>(s + p * a.col)[r] : T(0);
      }
    }
  }
}

// acc[i][j] = sum over p < n of a[i * a_row + p * a_col] * b[p][j * W + lane]: multiply_tile for a
// panel that comes from L2 (fetching ahead is worth 3 %).
template <class T, int NI, int NJ>
FA_INLINE void multiply_panel(Vec<T> (&acc)[NI][NJ], const T* a, index_t a_row, index_t a_col,
                              const T* b, index_t n) {
  constexpr index_t AHEAD = 2 * PANEL<T>;
  const auto step = [&](const T* ap, const T* bp) FA_LAMBDA {
    Vec<T> bv[NJ];
    FA_UNROLL
    for (int j = 0; j < NJ; j++) {
      prefetch_near(bp + AHEAD + j * W<T>);
      bv[j] = load(bp + j * W<T>);
      keep_in_register(bv[j]);
    }
    FA_UNROLL
    for (int i = 0; i < NI; i++) {
      const Vec<T> av = splat(ap[i * a_row]);
      FA_UNROLL
      for (int j = 0; j < NJ; j++) acc[i][j] = fma<T>(av, bv[j], acc[i][j]);
    }
  };
  index_t p = 0;
#pragma GCC unroll 1
  for (; p + 2 <= n; p += 2) {
    step(a, b);
    step(a + a_col, b + NJ * W<T>);
    a += 2 * a_col;
    b += 2 * NJ * W<T>;
  }
  if (p < n) step(a, b);
}

// sums[i] += sum over p < depth of a[i0 + i][k0 + p], where a's columns are contiguous. Four
// vectors at once hide each other's latency.
template <class T>
FA_NOINLINE void sum_rows(const Matrix& a, index_t i0, index_t rows, index_t k0, index_t depth,
                          bool first, T* sums) {
  const char* src = a.data + i0 * index_t(sizeof(T)) + k0 * a.col;
  for (index_t i = 0; i < rows; i += 4 * W<T>) {
    const index_t n = min_index(4 * W<T>, rows - i);
    Vec<T> sum[4] = {};
    const auto each = [&](auto&& f) FA_LAMBDA {
      FA_UNROLL
      for (int v = 0; v < 4; v++) f(sum[v], i + v * W<T>, int(n - v * W<T>));
    };
    for (index_t p = 0; p < depth; p++) {
      const T* row = reinterpret_cast<const T*>(src + p * a.col);
      if (n == 4 * W<T>)
        each([&](Vec<T>& s, index_t at, int) { s += load(row + at); });
      else
        each([&](Vec<T>& s, index_t at, int lanes) {
          if (lanes > 0) s += load_n(row + at, int(min_index(lanes, W<T>)));
        });
    }
    each([&](Vec<T>& s, index_t at, int lanes) {
      if (lanes <= 0) return;
      const int own = int(min_index(lanes, W<T>));
      if (!first) s += load_lanes(sums + i0 + at, own);
      store_lanes(sums + i0 + at, s, own);
    });
  }
}

// What joins the sums in row i of C from column j on: the bias first, then what was there `before`.
// That is the sum of the earlier pieces of k, or with the first piece what the product is added to.
// null: nothing.
template <class T> struct Joining {
  const T *bias, *before;
  index_t before_row;  // elements from row to row
};
template <class T>
FA_INLINE Joining<T> joining(const Product& p, index_t i, index_t j, bool first) {
  const T* bias = first && p.bias ? static_cast<const T*>(p.bias) + j : nullptr;
  const Matrix& from = first ? p.added : p.c;
  return {bias, from.data ? row_of<const T>(from, i) + j : nullptr, from.row / index_t(sizeof(T))};
}

// What becomes of the sums of one tile, in columns from j, the last vector `last` wide.
template <class T, int NI, int NJ>
FA_INLINE void write_tile(const Product& p, Vec<T> (&acc)[NI][NJ], index_t i, index_t rows,
                          index_t j, int last, bool first, bool done) {
  const Joining<T> with = joining<T>(p, i, j, first);
  T* c = row_of<T>(p.c, i) + j;
  const index_t c_row = p.c.row / index_t(sizeof(T));
  FA_UNROLL
  for (int v = 0; v < NJ; v++) {
    const int lanes = v == NJ - 1 ? last : W<T>;
    Vec<T> b{};
    if (with.bias) b = load_lanes(with.bias + v * W<T>, lanes);
    FA_UNROLL
    for (int r = 0; r < NI; r++) {
      if (r >= rows) break;
      Vec<T> x = acc[r][v];
      if (with.bias) x += b;
      const T* y = with.before + r * with.before_row + v * W<T>;
      if (lanes == W<T>) {  // apart: or GCC 12 keeps a sum of multiply_panel's in memory on AVX2
        if (with.before) x += load(y);
        store(c + r * c_row + v * W<T>, x);
      } else {
        if (with.before) x += load_n(y, lanes);
        store_n(c + r * c_row + v * W<T>, x, lanes);
      }
    }
  }
  if (done && p.then != Then::nothing)
    activate_tile<T>(p, i, min_index(rows, NI), j, (NJ - 1) * W<T> + last);
}

// What a task computes: rows [i0, i0 + rows) and columns [j0, j1) of C. next_rows: where the rows
// begin that this thread is likely to compute next; p.m: nowhere.
struct PartOfC {
  index_t i0, rows, j0, j1, next_rows;
};

// Part `part` of `parts` of the block of m that begins at (row, col), whichever direction of m is
// contiguous.
template <class T>
FA_INLINE void fetch_block(Fetcher& f, const Matrix& m, index_t row, index_t rows, index_t col,
                           index_t cols, index_t part = 0, index_t parts = 1) {
  const auto fetch_part = [&](const Matrix& from, index_t first, index_t n, index_t bytes) {
    fetch_rows(f, from, first + n * part / parts, first + n * (part + 1) / parts, bytes);
  };
  if (m.col == index_t(sizeof(T)))
    fetch_part({m.data + col * m.col, m.row, m.col}, row, rows, cols * m.col);
  else
    fetch_part({m.data + row * m.row, m.col, m.row}, col, cols, rows * m.row);
}
// While the panel of B that begins at (k0, j), `depth` by `width`, is multiplied, what is packed
// next is fetched: first the next panel, then this panel's share of the next block of A.
template <class T>
FA_INLINE void fetch_next_blocks(Fetcher& f, const Product& p, const PartOfC& c, index_t k0,
                                 index_t depth, index_t j, index_t width) {
  const index_t n = min_index(depth, p.k - k0), after = min_index(depth, p.k - k0 - n);
  const index_t part = (j - c.j0) / width, parts = (c.j1 - c.j0 + width - 1) / width;
  clear_fetcher(f);
  if (after > 0)
    fetch_block<T>(f, p.a, c.i0, c.rows, k0 + n, after, part, parts);
  else if (c.next_rows < p.m)
    fetch_block<T>(f, p.a, c.next_rows, min_index(c.rows, p.m - c.next_rows), 0, depth, part,
                   parts);
  if (j + width < c.j1)
    fetch_block<T>(f, p.b, k0, n, j + width, min_index(width, c.j1 - j - width));
  else if (after > 0)
    fetch_block<T>(f, p.b, k0 + n, after, c.j0, min_index(width, c.j1 - c.j0));
}

// One panel of B, all rows of A.
template <class T, int NJ, bool A_ROW1>
FA_NOINLINE void product_panel(const Product& p, const T* a, index_t a_ld, const T* b,
                               index_t depth, index_t i0, index_t rows, index_t j, int last,
                               bool first, bool done, Fetcher& fetcher) {
  constexpr int NI = PRODUCT_ROWS;
  for (index_t i = 0; i < rows; i += NI) {
    fetch(fetcher);
    for (int r = 0; r < NI && i + r < rows; r++) {
      for (int v = 0; v < NJ; v++) {
        const index_t at = (j + v * W<T>)*index_t(sizeof(T));
        __builtin_prefetch(p.c.data + (i0 + i + r) * p.c.row + at, 1, 3);
        if (first && p.added.data) prefetch_near(p.added.data + (i0 + i + r) * p.added.row + at);
        if (done && p.slope.data) prefetch_near(p.slope.data + (i0 + i + r) * p.slope.row + at);
      }
    }
    Vec<T> acc[NI][NJ] = {};
    if (A_ROW1)
      multiply_panel<T, NI, NJ>(acc, a + i / NI * column_tile(depth), 1, NI, b, depth);
    else
      multiply_panel<T, NI, NJ>(acc, a + i * a_ld, a_ld, 1, b, depth);
    write_tile<T, NI, NJ>(p, acc, i0 + i, rows - i, j, last, first, done);
  }
}

template <class T, bool A_ROW1>
FA_INLINE void product_block(const Product& p, const PartOfC& c, T* a, T* b) {
  const index_t i0 = c.i0, rows = c.rows;
  const index_t depth = depth_of(p.k), a_ld = round_up<T>(depth) + W<T>;
  Fetcher fetcher;  // a step is a tile
  for (index_t k0 = 0; k0 < max_index(1, p.k); k0 += depth) {
    const index_t n = min_index(depth, p.k - k0);
    const bool first = k0 == 0, done = k0 + depth >= p.k;
    if (A_ROW1) {
      pack_columns<T>(p.a, i0, rows, k0, n, a);
      if (p.row_sums && c.j0 == 0)
        sum_rows<T>(p.a, i0, rows, k0, n, first, static_cast<T*>(p.row_sums));
    } else {
      const Matrix from{p.a.data + k0 * p.a.col, p.a.row, p.a.col};
      copy_rows<T>(from, i0, rows, n, T(1), a, a_ld);
    }
    for (index_t j = c.j0; j < c.j1; j += PANEL<T>) {
      fetch_next_blocks<T>(fetcher, p, c, k0, depth, j, PANEL<T>);
      start_fetching(fetcher, (rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS);
      const index_t columns = min_index(PANEL<T>, c.j1 - j);
      const int nj = int((columns + W<T> - 1) / W<T>), last = int(columns - (nj - 1) * W<T>);
      if (p.b.col == index_t(sizeof(T))) {
        const Matrix from{p.b.data + j * p.b.col, p.b.row, p.b.col};
        copy_rows<T>(from, k0, n, columns, T(1), b, nj * W<T>);
      } else {  // b's columns are contiguous: it is a transposed array
        const Matrix from{p.b.data + k0 * p.b.row, p.b.col, p.b.row};
        pack_transposed<T>(from, j, columns, n, T(1), b, nj * W<T>);
      }
      with_count<MAX_NJ>(nj, [&]<int NJ>() FA_LAMBDA {
        product_panel<T, NJ, A_ROW1>(p, a, a_ld, b, n, i0, rows, j, last, first, done, fetcher);
      });
    }
  }
}

template <class T>
FA_ENTRY void product(const Product& p, index_t i0, index_t rows, index_t j0, index_t j1,
                      index_t next_rows, void* scratch) {
  Layout layout(scratch);
  const auto [a, b] = ProductScratch<T>(p, rows, layout);
  const PartOfC part{i0, rows, j0, j1, next_rows};
  if (p.a.row == index_t(sizeof(T)) && (p.row_sums || p.a.col != index_t(sizeof(T))))
    product_block<T, true>(p, part, a, b);
  else
    product_block<T, false>(p, part, a, b);
}

}  // namespace
}  // namespace fusedattn
