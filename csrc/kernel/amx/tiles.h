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
// Numbers that are not finite (and those that round to infinity) cannot be cut. The code calls them
// uncut: 0 stands in an operand in their place, and whoever cuts is told, to put things right by
// hand. Numbers below 2^-100 lose their last pieces, as the instruction takes subnormal numbers for
// 0.
//
// Speeds in the comments of this folder were measured on a Granite Rapids.
//
// An element of a product is the same sum in the same order wherever it lies in a tile: its bits
// depend on where its terms lie along the sum, modulo 32, and on nothing else.
#pragma once

#include "kernel/vector/element.h"
#include "kernel/vector/scratch.h"

namespace fusedattn {
namespace {

template <class E> inline constexpr int PIECES = 3;
template <> inline constexpr int PIECES<Half> = 2;
template <> inline constexpr int PIECES<BFloat> = 1;

// Pieces of P: enough for what is summed up in float32 and rounded to E.
template <class E> inline constexpr int P_PIECES = PIECES<E> == 3 ? 3 : 2;
// Do rules and exponentials run beside the products? There are too few where numbers are one piece.
template <class E> inline constexpr bool PIPELINED = PIECES<E> > 1;

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
// As rows: `rows` by `depth`; as words: `depth` by `columns`. Both rounded up to whole tiles. Rows
// are an odd number of cache lines apart: tiles load 1.6 times as fast from the L2 cache as at even
// ones.
FA_INLINE Operand operand(char* data, index_t rows, index_t row_bytes) {
  const index_t row = (up_to(row_bytes, 64) / 64 | 1) * 64;
  return {data, row, up_to(rows, TILE) * row};
}
FA_INLINE Operand as_rows(char* data, index_t rows, index_t depth) {
  return operand(data, rows, up_to(depth, DEPTH) * 2);
}
FA_INLINE Operand as_words(char* data, index_t depth, index_t columns) {
  return operand(data, up_to(depth, DEPTH) / 2, up_to(columns, TILE) * 4);
}
FA_INLINE Operand taken(Layout& scratch, int pieces, Operand x) {
  x.data = scratch.take<char>(pieces * x.piece);
  return x;
}
FA_INLINE Operand rows_operand(Layout& scratch, int pieces, index_t rows, index_t depth) {
  return taken(scratch, pieces, as_rows(nullptr, rows, depth));
}
FA_INLINE Operand words_operand(Layout& scratch, int pieces, index_t depth, index_t columns) {
  return taken(scratch, pieces, as_words(nullptr, depth, columns));
}

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
// Each product takes 16 cycles; work(how many) is called once for up to four, to run beside them.
struct Nothing {
  FA_INLINE_MEMBER void operator()(int) {}
};
template <int MI, int NJ, class Work = Nothing> FA_INLINE void multiply_tiles(Work work = {}) {
  asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0");
  if (NJ == 2) asm volatile("tdpbf16ps %tmm7, %tmm4, %tmm1");
  work(MI * NJ);
  if (MI == 2) asm volatile("tdpbf16ps %tmm6, %tmm5, %tmm2");
  if (MI == 2 && NJ == 2) asm volatile("tdpbf16ps %tmm7, %tmm5, %tmm3");
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

// The unit that multiplies tiles falls asleep when it has had nothing to do for some 1,500 cycles,
// and is slow for the 1,000 that follow. Long computations in between call this. Tile 0 is lost.
FA_INLINE void keep_awake() {
  asm volatile("tdpbf16ps %tmm2, %tmm3, %tmm0");
  asm volatile("tdpbf16ps %tmm2, %tmm3, %tmm0");
}

// The order of the products of pieces, small ones first. From one to the next one piece changes.
struct PieceOrder {
  int n = 0, x[6] = {}, y[6] = {};
  constexpr void add(int i, int j) { x[n] = i, y[n++] = j; }
  constexpr bool new_x(int t) const { return t == 0 || x[t] != x[t - 1]; }
  constexpr bool new_y(int t) const { return t == 0 || y[t] != y[t - 1]; }
};
template <int PX, int PY> constexpr PieceOrder piece_order() {
  PieceOrder o;
  const int first = PX == 1 ? PY - 1 : 0;
  if (PX == 3) o.add(2, first);
  if (PX > 1) o.add(1, first);
  if (PX > 1 && PY > 1) o.add(1, 1);
  o.add(0, PX > 1 && PY > 1 ? 1 : first);
  if (PX > 1 && PY == 3) o.add(0, 2);
  if (PX == 1 && PY == 3) o.add(0, 1);
  if (PY > 1) o.add(0, 0);
  return o;
}
// f<0>(), f<1>() and so on.
template <class F, int... I> FA_INLINE void unrolled(F&& f, Seq<I...>) {
  (f.template operator()<I>(), ...);
}
template <int N, class F> FA_INLINE void unrolled(F&& f) {
  unrolled(f, typename MakeSeq<N>::type{});
}

// MI x NJ tiles: c = a b, over `steps` times DEPTH, which lie a_step and b_step bytes apart; c_row
// in bytes. The order of products follows X's pieces: those of a, or where SWAP those of b. So x y
// and y x have the same bits.
template <int PA, int PB, int MI, int NJ, bool SWAP = false, bool ADD = false, class Work = Nothing>
FA_INLINE void stepped_product(const Operand& a, index_t a_step, const Operand& b, index_t b_step,
                               index_t steps, float* c, index_t c_row, Work work = {}) {
  constexpr PieceOrder order = SWAP ? piece_order<PB, PA>() : piece_order<PA, PB>();
  if constexpr (ADD)
    load_sums<MI, NJ>(c, c_row);
  else
    clear_tiles<MI, NJ>();
  const char *ap = a.data, *bp = b.data;
  for (index_t s = 0; s < steps; s++, ap += a_step, bp += b_step)
    unrolled<order.n>([&]<int T>() FA_LAMBDA {
      constexpr bool new_a = SWAP ? order.new_y(T) : order.new_x(T),
                     new_b = SWAP ? order.new_x(T) : order.new_y(T);
      constexpr int i = SWAP ? order.y[T] : order.x[T], j = SWAP ? order.x[T] : order.y[T];
      if constexpr (new_a) load_rows_tiles<MI>(ap + i * a.piece, a.row);
      if constexpr (new_b) load_words_tiles<NJ>(bp + j * b.piece, b.row);
      multiply_tiles<MI, NJ>(work);
    });
  store_tiles<MI, NJ>(c, c_row);
}
// The same of operands whose steps follow one another.
template <int PA, int PB, int MI, int NJ, bool SWAP = false, bool ADD = false, class Work = Nothing>
FA_INLINE void tile_product(const Operand& a, const Operand& b, index_t steps, float* c,
                            index_t c_row, Work work = {}) {
  stepped_product<PA, PB, MI, NJ, SWAP, ADD>(a, 2 * DEPTH, b, DEPTH / 2 * b.row, steps, c, c_row,
                                             work);
}

// f<MI, NJ>() for as many tiles, one or two in each direction, as hold rows x columns.
template <class F> FA_INLINE void with_tiles(index_t rows, index_t columns, F&& f) {
  with_count<2>(rows > TILE ? 2 : 1, [&]<int MI>() FA_LAMBDA {
    with_count<2>(columns > TILE ? 2 : 1,
                  [&]<int NJ>() FA_LAMBDA { f.template operator()<MI, NJ>(); });
  });
}
// f<MI, NJ>(i, j) for each 2 x 2 tiles of an m x n matrix, or fewer at its ends.
template <class F> FA_INLINE void in_tile_pairs(index_t m, index_t n, F&& f) {
  for (index_t i = 0; i < m; i += 2 * TILE)
    for (index_t j = 0; j < n; j += 2 * TILE)
      with_tiles(m - i, n - j,
                 [&]<int MI, int NJ>() FA_LAMBDA { f.template operator()<MI, NJ>(i, j); });
}
// c (m x n, rounded up to whole tiles) = a b, or where ADD c += a b.
template <int PA, int PB, bool SWAP = false, bool ADD = false, class Work = Nothing>
FA_NOINLINE void multiply_operands(index_t m, index_t n, index_t depth, const Operand& a,
                                   const Operand& b, float* c, index_t c_row, Work work = {}) {
  const index_t steps = (depth + DEPTH - 1) / DEPTH;
  in_tile_pairs(m, n, [&]<int MI, int NJ>(index_t i, index_t j) FA_LAMBDA {
    const Operand at{a.data + i * a.row, a.row, a.piece}, bt{b.data + 4 * j, b.row, b.piece};
    float* ct = reinterpret_cast<float*>(reinterpret_cast<char*>(c + j) + i * c_row);
    tile_product<PA, PB, MI, NJ, SWAP, ADD>(at, bt, steps, ct, c_row, work);
  });
}

// What the unit for tiles can do at most, on numbers that are not all the same: with zeros it is
// clocked higher. A round is 12 chains of multiplications, as in limits.h.
FA_ENTRY double multiply_tiles_flops(index_t rounds) {
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

}  // namespace
}  // namespace fusedattn
