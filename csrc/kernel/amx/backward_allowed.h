// The state of the backward pass on tiles, and which pairs of a cell, CELL queries by CELL keys,
// are allowed.
#pragma once

#include "kernel/amx/pace.h"
#include "kernel/rules/cover.h"

namespace fusedattn {
namespace {

inline constexpr index_t CELL = 32, TILED_BACK_KEYS = 256, TILED_BACK_QUERIES = 128;
inline constexpr int CELL_ROWS = TILED_BACK_QUERIES / CELL, CELL_COLUMNS = TILED_BACK_KEYS / CELL;

// Cells [first, last) of a row or column that see something, one run after the other.
struct Runs {
  int count;
  struct {
    int first, last;
  } run[CELL_COLUMNS / 2];
};
FA_INLINE void add_to_runs(Runs& runs, int cell) {
  if (runs.count == 0 || runs.run[runs.count - 1].last < cell)
    runs.run[runs.count++] = {cell, cell};
  runs.run[runs.count - 1].last = cell + 1;
}

struct TiledBackwardBlock {
  index_t k0, nk, d, d_v;
  float factor;  // scale * log2(e), or what a softcap makes of it
  bool need_ds;
  Operand k[CELL_COLUMNS], v[CELL_COLUMNS];  // words (d / 2, CELL), for each column of cells
  Operand k_pairs;                           // words (TILED_BACK_KEYS / 2, d)
  Operand q, dout;                           // rows (TILED_BACK_QUERIES, d)
  Operand q_t, dout_t;                       // rows (d, TILED_BACK_QUERIES)
  Operand p[2], ds[2];                       // words (TILED_BACK_QUERIES / 2, CELL), of two columns
  Operand ds_rows;                           // rows (TILED_BACK_QUERIES, TILED_BACK_KEYS)
  float *s[2], *dp[2];                       // (CELL, CELL): S and dP, of two cells
  float *bent, *keep;        // (CELL, CELL): dS times the slope of the softcap, dropout's 0 or 1
  float* sum;                // of one product, before it joins others
  float *dk, *dv;            // (CELL_COLUMNS, d rounded up to TILE, CELL)
  bool begun[CELL_COLUMNS];  // is there something in them?
  float *ds_all, *dbias;     // (TILED_BACK_QUERIES, TILED_BACK_KEYS), (TILED_BACK_KEYS), for dbias
  // Rows with a number that cannot be cut, one bit each, and what these give to dq, (queries, d)
  uint32_t uncut_k[CELL_COLUMNS], uncut_v[CELL_COLUMNS], uncut_q[CELL_ROWS], uncut_dout[CELL_ROWS];
  float* uncut_dq;
  Fetcher fetcher;
  // Of the block of queries at hand
  index_t q0, nq;
  const float *lse2, *delta;
  Cover cover[CELL_ROWS][CELL_COLUMNS];
  uint32_t allowed[CELL_ROWS][CELL_COLUMNS][CELL];  // pairs: a word a query, a bit a key
  Runs rows[CELL_COLUMNS], columns[CELL_ROWS];      // that see something
};

// Of column c.
FA_INLINE float* dk_of(const TiledBackwardBlock& b, index_t c) {
  return b.dk + c * up_to(b.d, TILE) * CELL;
}
FA_INLINE float* dv_of(const TiledBackwardBlock& b, index_t c) {
  return b.dv + c * up_to(b.d_v, TILE) * CELL;
}

// Bits [low, high) of a word, as far as there are such.
FA_INLINE uint32_t bit_range(index_t low, index_t high) {
  low = max_index(low, 0);
  high = min_index(high, CELL);
  return low < high ? uint32_t((uint64_t(1) << high) - (uint64_t(1) << low)) : 0;
}
// Of the keys [k, k + n), what the mask allows a query.
FA_INLINE uint32_t mask_bits(const Matrix& mask, index_t q, index_t k, index_t n) {
  const char* p = mask.data + q * mask.row + k * mask.col;
  if (mask.col == 1) {
    const __m256i x = _mm256_maskz_loadu_epi8(bit_range(0, n), p);
    return _mm256_test_epi8_mask(x, x);
  }
  if (mask.col == 0) return *p ? bit_range(0, n) : 0;
  uint32_t bits = 0;
  for (index_t i = 0; i < n; i++) bits |= uint32_t(p[i * mask.col] != 0) << i;
  return bits;
}
FA_INLINE uint32_t segment_bits(const Segments& segments, index_t q, index_t k, index_t n) {
  uint32_t bits = 0;
  for (index_t i = 0; i < n; i++)
    bits |= uint32_t(segments.k_number[k + i] == segments.q_number[q]) << i;
  return bits;
}

// What cell (r, c) sees; `inside`: the intervals of all its queries hold all of its keys.
FA_NOINLINE Cover cover_cell(TiledBackwardBlock& b, const Rules& rules, bool use_mask, int r, int c,
                             bool inside) {
  const index_t key = b.k0 + c * CELL, n = min_index(CELL, b.nk - c * CELL);
  uint32_t* allowed = b.allowed[r][c];
  if (inside && n == CELL && r * CELL + CELL <= b.nq && !use_mask && !rules.segments.q_number) {
    __builtin_memset(allowed, 0xff, CELL * sizeof(uint32_t));
    return Cover::all;
  }
  uint32_t any = 0, all = ~0u;
  for (index_t i = 0; i < CELL; i++) {
    uint32_t bits = 0;
    if (r * CELL + i < b.nq) {
      const index_t q = b.q0 + r * CELL + i;
      bits = bit_range(0, n);
      if (!inside) {
        const Interval keys = visible_keys(rules, q);
        bits &= bit_range(keys.low - key, keys.high - key);
      }
      if (use_mask) bits &= mask_bits(rules.mask, q, key, n);
      if (rules.segments.q_number) bits &= segment_bits(rules.segments, q, key, n);
    }
    allowed[i] = bits;
    any |= bits;
    all &= bits;
  }
  return !any ? Cover::none : all == ~0u ? Cover::all : Cover::some;
}

// What each cell of a block of queries sees. False if none sees anything.
FA_NOINLINE bool cover_cells(TiledBackwardBlock& b, const Rules& rules) {
  const index_t k_end = b.k0 + b.nk;
  bool any = false;
  for (Runs& rows : b.rows) rows.count = 0;
  for (Runs& columns : b.columns) columns.count = 0;
  for (int r = 0; r * CELL < b.nq; r++) {
    const index_t begin = b.q0 + r * CELL, end = min_index(begin + CELL, b.q0 + b.nq);
    const Span span = visible_span(rules, begin, end, k_end);
    for (int c = 0; c * CELL < b.nk; c++) {
      const index_t low = b.k0 + c * CELL, high = min_index(low + CELL, k_end);
      Cover& cover = b.cover[r][c];
      cover = Cover::none;
      if (span.any.low >= high || span.any.high <= low) continue;
      cover = cover_of(rules, begin, end - begin, low, high - low);
      if (cover == Cover::none) continue;
      cover = cover_cell(b, rules, cover == Cover::some, r, c,
                         span.all.low <= low && span.all.high >= high);
      if (cover == Cover::none) continue;
      any = true;
      add_to_runs(b.rows[c], r);
      add_to_runs(b.columns[r], c);
    }
  }
  return any;
}

}  // namespace
}  // namespace fusedattn
