// The second half of a unit of forward on tiles: P, cut as it is made, and the products V^T P^T.
#pragma once

#include "kernel/amx/forward_scores.h"
#include "kernel/attention/finish.h"

namespace fusedattn {
namespace {

// Bits of a block's keys by `lanes` queries: 1 where dropout keeps P. Key by key, a number for 16
// queries.
struct Kept {
  __mmask16 bits[KEY_BLOCK * LANES<float> / W<float>];
};
// Of DRAWN keys from `key` of the block on, which is a multiple of that.
FA_INLINE void draw_kept(const Dropout& drop, index_t first, index_t lanes, index_t block,
                         index_t key, Kept& kept) {
  const __m512i threshold = _mm512_set1_epi32(int(drop.threshold));
  for_words(drop, first, lanes, block + key, DRAWN,
            [&](index_t k, index_t lane, Random words) FA_LAMBDA {
              kept.bits[((key + k) * lanes + lane) / W<float>] =
                  _mm512_cmpge_epu32_mask((__m512i)words, threshold);
            });
}

// What a mask says of 64 keys from `key` of the block on: b.shown, and x.seen.
FA_NOINLINE void read_mask(const Matrix& mask, Scored& b, index_t key) {
  const index_t lanes = b.x->vectors * W<float>, first = b.block + key;
  const uint64_t inside = ~uint64_t(0) << max_index(b.k0 - first, 0);  // from k0 on
  for (index_t i = 0; i < lanes; i++) {
    const char* p = mask.data + (b.x->first + min_index(i, b.x->count - 1)) * mask.row;
    uint64_t bits = 0;
    if (mask.col == 1 && first + 64 <= b.k1) {
      const __m512i bytes = _mm512_loadu_si512(p + first);
      bits = _mm512_test_epi8_mask(bytes, bytes);
    } else {
      for (index_t k = 0; k < min_index(64, b.k1 - first); k++)
        bits |= uint64_t(p[(first + k) * mask.col] != 0) << k;
    }
    bits &= inside;
    b.shown[0][i] = uint32_t(bits), b.shown[1][i] = uint32_t(bits >> DEPTH);
    if (bits) b.x->seen[i] = 1;
  }
}

// 1, 2, 4, ...: broadcast from memory, which costs nothing.
struct BitTable {
  uint32_t bit[DEPTH];
};
inline constexpr BitTable BITS = [] {
  BitTable t{};
  for (int i = 0; i < int(DEPTH); i++) t.bit[i] = 1u << i;
  return t;
}();
// S of key i of 32, -inf where it is not shown.
FA_INLINE Vec<float> show(Vec<float> s, const uint32_t* shown, index_t i) {
  const __m512i bit = _mm512_set1_epi32(int(BITS.bit[i]));
  const __mmask16 lanes = _mm512_test_epi32_mask(_mm512_loadu_si512(shown), bit);
  return (Vec<float>)_mm512_mask_mov_ps((__m512)splat(-Bits<float>::infinity), lanes, (__m512)s);
}

// P = exp2(S - max) of keys i and i + 16, W queries of each, cut into words; the sum. DROPS: what
// is not kept counts in the sum alone.
template <class E, bool DROPS>
FA_INLINE void cut_probabilities(Vec<float> x, Vec<float> y, Vec<float> max, Vec<float>& sum,
                                 const __mmask16* kept, index_t apart, char* to, index_t piece) {
  constexpr int P = P_PIECES<E>;
  x = exp2<float>(x - max);
  y = exp2<float>(y - max);
  sum = (sum + x) + y;
  if constexpr (DROPS) {
    x = (Vec<float>)_mm512_maskz_mov_ps(kept[0], (__m512)x);
    y = (Vec<float>)_mm512_maskz_mov_ps(kept[apart], (__m512)y);
  }
  store_words<P>(to, piece, cut_computed<P>(x), cut_computed<P>(y));
}
// A line or two of the bias that comes next, of the query that these keys' number says.
template <class E> FA_INLINE void fetch_bias(const Scored& b, index_t query, index_t key) {
  if (!b.bias.data) return;
  const char* bias = b.bias.data + query * b.bias.row + key * b.bias.col;
  prefetch_far(bias);
  if (sizeof(E) == 4) prefetch_far(bias + 64);
}
FA_INLINE void begin_block(Scored& b, index_t lanes) {
  __builtin_memcpy(b.max, b.x->max, size_t(lanes) * sizeof(float));
  for (index_t i = 0; i < lanes; i += W<float>) {
    store(b.block_max + i, splat(Bits<float>::lowest));
    store(b.sum + i, Vec<float>{});
  }
}
// b.max is what P is relative to, b.sum its sum.
FA_INLINE void end_probabilities(Scored& b) {
  using T = float;
  TiledQueries& x = *b.x;
  for (index_t i = 0; i < x.vectors * W<T>; i += W<T>) {
    const Vec<T> max = load(b.max + i), rescale = exp2<T>(load(x.max + i) - max);
    store(b.rescale + i, rescale);
    store(x.max + i, max);
    store(x.sum + i, fma<T>(load(x.sum + i), rescale, load(b.sum + i)));
    if (b.plan.raw && !b.masked) store(x.seen + i, splat(T(1)));
  }
}

// What was cut into words, put together again.
FA_INLINE float word_element(const Operand& words, int pieces, index_t key, index_t column) {
  float sum = 0;
  const index_t row = key / DEPTH * (DEPTH / 2) + key % (DEPTH / 2);
  for (int n = pieces - 1; n >= 0; n--) {
    uint32_t w;
    __builtin_memcpy(&w, words.data + n * words.piece + row * words.row + 4 * column, 4);
    w = key % DEPTH >= DEPTH / 2 ? w & 0xffff0000 : w << 16;
    float x;
    __builtin_memcpy(&x, &w, 4);
    sum += x;
  }
  return sum;
}

// What could not be cut of V, for the queries that may see it.
template <class E>
FA_NOINLINE void add_uncut_values(const Scored& b, const Matrix& v, index_t d_v) {
  const index_t lanes = b.x->vectors * W<float>;
  for (index_t key = b.k0; key < b.k1; key++) {
    const int r = (key >= b.cut[1]) + (key >= b.cut[2]);
    const Dense<float>& dense = b.dense[r];
    for (index_t c = 0; c < d_v; c++) {
      const float value = number_at<E>(v, key - b.block, c);
      if (!cannot_be_cut(value)) continue;
      for (index_t j = 0; j < lanes; j++) {
        const index_t lane = j % W<float>;
        if (!dense.data ||
            dense_at(dense, key - b.cut[r], int(j / W<float>))[lane] != -Bits<float>::infinity)
          b.x->o[c * lanes + j] += word_element(b.words, P_PIECES<E>, key - b.block, j) * value;
      }
    }
  }
}

FA_INLINE void clear_sums(const ForwardHead& h, TiledQueries& x) {
  __builtin_memset(x.o, 0, size_t(up_to(h.d_v, TILE) * x.vectors * W<float>) * sizeof(float));
}
// O = O * rescale + P V, beside it `work`. Pipelined, the block's own sum is made first and then
// joins, with fewer roundings, or is the output if there is but one block; else O has been
// rescaled, and the sums go on in the tiles.
template <class E, class Work>
FA_NOINLINE void add_values(const ForwardHead& h, Scored& b, Work work) {
  using T = float;
  TiledQueries& x = *b.x;
  constexpr int P = P_PIECES<E>;
  const Operand& v = b.keys->v;
  const index_t lanes = x.vectors * W<T>, steps = (b.high - b.low) / DEPTH;
  const bool uncut = b.keys->uncut_v, direct = x.single && !uncut;
  if (x.single && uncut) clear_sums(h, x), x.single = false;
  alignas(64) T factor[LANES<T>];
  if (direct) finish_sums(h, x, factor);
  in_tile_pairs(h.d_v, lanes, [&]<int MI, int NJ>(index_t i, index_t j) FA_LAMBDA {
    const Operand rows{v.data + i * v.row + 2 * b.low, v.row, v.piece},
        words{b.words.data + b.low / 2 * b.words.row + 4 * j, b.words.row, b.words.piece};
    T* o = x.o + i * lanes + j;
    if constexpr (!PIPELINED<E>)
      return tile_product<PIECES<E>, P, MI, NJ, false, true>(rows, words, steps, o, 4 * lanes,
                                                             work);
    tile_product<PIECES<E>, P, MI, NJ>(rows, words, steps, b.sums, 8 * TILE, work);
    if (direct) {
      const Matrix out{h.out.data + i * h.out.col, h.out.row, h.out.col};
      return unpack_transposed<E>(b.sums, 2 * TILE, factor + j, out, x.first + j,
                                  min_index(NJ * TILE, x.count - j),
                                  min_index(MI * TILE, h.d_v - i));
    }
    for (index_t c = 0; c < MI * TILE; c++) {
      FA_UNROLL
      for (int n = 0; n < NJ; n++) {
        T* at = o + c * lanes + n * TILE;
        store(at, fma<T>(load(at), load(b.rescale + j + n * TILE),
                         load(b.sums + c * 2 * TILE + n * TILE)));
      }
    }
  });
  x.finished = direct;
  if (uncut) add_uncut_values<E>(b, b.v, h.d_v);
}

}  // namespace
}  // namespace fusedattn
