// Dropout of probabilities: Philox4x32-10, the counter-based generator of Salmon et al. (SC'11). 16
// random bits belong to their (seed, batch, head, query, key), so that the same entries are kept
// whatever the tiling, the threads or the instruction set, and again in backward: FlashAttention
// draws 8. Words of 32 bits live in lanes of 64, where one multiplication gives both halves; the
// upper half of a lane may hold anything.
#pragma once

#include "kernel/vector/pairs.h"

namespace fusedattn {
namespace {

FA_INLINE Wide multiply_words(Wide a, uint32_t b) {
#if FUSEDATTN_VECTOR_BYTES == 64
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif FUSEDATTN_VECTOR_BYTES == 32
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
  return (Wide)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

typedef uint32_t Random __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES)));

// The upper words in place of the lower ones. A shuffle: shifts compete with multiplications for
// the one unit that has both.
template <int... I> FA_INLINE Wide upper_words(Wide x, Seq<I...>) {
  return (Wide)__builtin_shufflevector((Random)x, (Random)x, (I | 1)...);
}
FA_INLINE Wide upper_words(Wide x) {
  return upper_words(x, typename MakeSeq<2 * WIDE>::type{});
}

// c = Philox4x32-10 of N vectors of counters c, in step: a round waits for the one before.
template <int N> FA_INLINE void philox(Wide (&c)[N][4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  FA_UNROLL
  for (int round = 0; round < 10; round++) {
    FA_UNROLL
    for (int i = 0; i < N; i++) {
      const Wide a = multiply_words(c[i][0], 0xD2511F53), b = multiply_words(c[i][2], 0xCD9E8D57);
      c[i][0] = upper_words(b) ^ c[i][1] ^ k0;
      c[i][1] = b;
      c[i][2] = upper_words(a) ^ c[i][3] ^ k1;
      c[i][3] = a;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}
FA_INLINE Wide wide_numbers() {
  Wide v{};
  FA_UNROLL
  for (int i = 0; i < WIDE; i++) v[i] = uint64_t(i);
  return v;
}

inline constexpr index_t DRAWN = 8;  // keys of a counter: two of each word, the lower half's first
// The counters of keys DRAWN * group to DRAWN * group + 7 and a query.
FA_INLINE void begin_counters(Wide (&c)[4], Wide group, Wide query, const Dropout& drop) {
  c[0] = group;
  c[1] = query;
  c[2] = Wide{} + uint64_t(drop.head);
  c[3] = Wide{} + uint64_t(drop.batch);
}

// f(key, lane, words): random bits of 2 * WIDE queries from `lane` on, in the upper half of their
// words, for keys [0, n) from k0 on and `lanes` queries from `first` on, or a few more. Even
// queries and odd ones have vectors of their own, which make one of words.
template <class F>
FA_INLINE void for_words(const Dropout& drop, index_t first, index_t lanes, index_t k0, index_t n,
                         F&& f) {
  for (index_t group = k0 / DRAWN; group * DRAWN < k0 + n; group++)
    for (index_t r = 0; r < lanes; r += 2 * WIDE) {
      Wide c[2][4];
      FA_UNROLL
      for (int i = 0; i < 2; i++)
        begin_counters(c[i], Wide{} + uint64_t(group), wide_numbers() * 2 + uint64_t(first + r + i),
                       drop);
      philox(c, drop.seed);
      FA_UNROLL
      for (int w = 0; w < 4; w++) {
        const Random words = (Random)((c[0][w] & 0xffffffff) | (c[1][w] << 32));
        const index_t key = group * DRAWN + 2 * w - k0;
        if (key >= 0 && key < n) f(key, r, words << 16);
        if (key + 1 >= 0 && key + 1 < n) f(key + 1, r, words);
      }
    }
}

// p[key][query] = 0 where it is dropped, for keys [k0, k0 + n) and the queries from `first` on.
// Pairs: in words of two keys.
template <class E, int NQ, class T = Compute<E>>
FA_NOINLINE void drop_tile(const Dropout& drop, index_t first, index_t k0, index_t n, T* p) {
  constexpr index_t lanes = NQ * W<T>;
  for_words(drop, first, lanes, k0, n, [&](index_t key, index_t r, Random words) FA_LAMBDA {
    const Random kept = (Random)(words >= drop.threshold);
    if constexpr (PAIRS<E>) {
      auto* at = reinterpret_cast<typename VecOf<float>::loose*>(p + key / 2 * lanes + r);
      *at = (Vec<float>)((Random)*at & (kept | (key % 2 ? 0xffff : 0xffff0000)));
    } else {
      const char* masks = reinterpret_cast<const char*>(&kept);
      for (index_t i = 0; i < min_index(2 * WIDE, lanes - r); i += W<T>) {
        T* at = p + key * lanes + r + i;
        const IntVec<T> keep = load_integers<T, int32_t>(masks + 4 * i, 4, W<T>);
        store(at, keep == 0 ? Vec<T>{} : load(at));
      }
    }
  });
}

// a[0], b[0], a[1], b[1], ...
template <int... I> FA_INLINE void zip_wide(Wide a, Wide b, uint32_t* to, Seq<I...>) {
  constexpr int half = WIDE / 2;
  const Wide first = __builtin_shufflevector(a, b, (I / 2 + (I % 2 ? WIDE : 0))...);
  const Wide second = __builtin_shufflevector(a, b, (half + I / 2 + (I % 2 ? WIDE : 0))...);
  __builtin_memcpy(to, &first, sizeof(first));
  __builtin_memcpy(to + 2 * WIDE, &second, sizeof(second));
}

// keep[key] = 1 where it is kept, else 0, for keys [k0, k0 + n), k0 a multiple of DRAWN, and four
// queries, whose numbers lie `ld` apart. Writes up to n rounded up to a multiple of 4 * WIDE. Half
// of a vector's counters are of one query, half of the next.
template <class T>
FA_NOINLINE void keep_rows(const Dropout& drop, index_t query, index_t k0, index_t n, T* keep,
                           index_t ld) {
  constexpr index_t half = WIDE / 2, keys = half * DRAWN;
  const Wide lane = wide_numbers();
  for (index_t k = 0; k < n; k += keys) {
    Wide c[2][4];
    FA_UNROLL
    for (int i = 0; i < 2; i++)
      begin_counters(c[i], lane % half + uint64_t((k0 + k) / DRAWN),
                     lane / half + uint64_t(query + 2 * i), drop);
    philox(c, drop.seed);
    FA_UNROLL
    for (int i = 0; i < 2; i++) {
      const Wide low = (c[i][0] & 0xffffffff) | (c[i][1] << 32),
                 high = (c[i][2] & 0xffffffff) | (c[i][3] << 32);
      alignas(64) uint32_t words[4 * WIDE];
      zip_wide(low, high, words, typename MakeSeq<WIDE>::type{});
      const char* bits = reinterpret_cast<const char*>(words);
      for (index_t r = 0; r < 2; r++)
        for (index_t j = 0; j < keys; j += W<T>, bits += 2 * W<T>) {
          const IntVec<T> drawn = load_integers<T, uint16_t>(bits, 2, W<T>);
          const IntVec<T> kept = drawn >= typename Bits<T>::type(drop.threshold >> 16);
          store(keep + (2 * i + r) * ld + k + j, kept == 0 ? Vec<T>{} : splat(T(1)));
        }
    }
  }
}

}  // namespace
}  // namespace fusedattn
