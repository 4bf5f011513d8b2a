// Dropout of probabilities: Philox4x32-10, the counter-based generator of Salmon et al. (SC'11). A
// random word belongs to its (seed, batch, head, query, key), so that the same entries are kept
// whatever the tiling, the threads or the instruction set, and again in backward. Words of 32 bits
// live in lanes of 64, where one multiplication gives both halves; the upper half of a word may
// hold anything.

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

// c = Philox4x32-10 of the counters c.
FA_INLINE void philox(Wide (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  FA_UNROLL
  for (int round = 0; round < 10; round++) {
    const Wide a = multiply_words(c[0], 0xD2511F53), b = multiply_words(c[2], 0xCD9E8D57);
    c[0] = (b >> 32) ^ c[1] ^ k0;
    c[1] = b;
    c[2] = (a >> 32) ^ c[3] ^ k1;
    c[3] = a;
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

// p[key][query] = 0 where it is dropped, for keys [k0, k0 + n) and the queries from `first` on.
// Pairs: in words of two keys.
template <class E, int NQ, class T = Compute<E>>
FA_NOINLINE void drop_tile(const Dropout& drop, index_t first, index_t k0, index_t n, T* p) {
  constexpr int lanes = NQ * W<T>;
  typedef uint32_t Narrow __attribute__((vector_size(FUSEDATTN_VECTOR_BYTES / 2)));
  alignas(64) uint32_t words[4][lanes < WIDE ? WIDE : lanes];
  for (index_t group = k0 / 4; group * 4 < k0 + n; group++) {
    for (int r = 0; r < lanes; r += WIDE) {
      Wide c[4] = {Wide{} + uint64_t(group), wide_numbers() + uint64_t(first + r),
                   Wide{} + uint64_t(drop.head), Wide{} + uint64_t(drop.batch)};
      philox(c, drop.seed);
      FA_UNROLL
      for (int w = 0; w < 4; w++) {
        const Narrow narrow = __builtin_convertvector(c[w], Narrow);
        __builtin_memcpy(words[w] + r, &narrow, sizeof(narrow));
      }
    }
    for (int w = 0; w < 4; w++) {
      const index_t key = group * 4 + w - k0;
      if (key < 0 || key >= n) continue;
      if constexpr (PAIRS<E>) {
        auto* at = reinterpret_cast<BFloat*>(p + key / 2 * lanes) + key % 2;
        for (int i = 0; i < lanes; i++)
          if (words[w][i] < drop.threshold) at[2 * i] = {0};
      } else {
        T* at = p + key * lanes;
        for (int i = 0; i < lanes; i++) at[i] = words[w][i] >= drop.threshold ? at[i] : T(0);
      }
    }
  }
}

// a[0], b[0], a[1], b[1], ...
template <int... I> FA_INLINE void zip_wide(Wide a, Wide b, uint32_t* to, Seq<I...>) {
  constexpr int half = WIDE / 2;
  const Wide first = __builtin_shufflevector(a, b, (I / 2 + (I % 2 ? WIDE : 0))...);
  const Wide second = __builtin_shufflevector(a, b, (half + I / 2 + (I % 2 ? WIDE : 0))...);
  __builtin_memcpy(to, &first, sizeof(first));
  __builtin_memcpy(to + 2 * WIDE, &second, sizeof(second));
}

// keep[key] = 1 where it is kept, else 0, for one query and keys [k0, k0 + n); k0 a multiple of 4.
// Writes up to n rounded up to a multiple of 4 * WIDE.
template <class T>
FA_NOINLINE void keep_row(const Dropout& drop, index_t query, index_t k0, index_t n, T* keep) {
  for (index_t k = 0; k < n; k += 4 * WIDE) {
    Wide c[4] = {wide_numbers() + uint64_t((k0 + k) / 4), Wide{} + uint64_t(query),
                 Wide{} + uint64_t(drop.head), Wide{} + uint64_t(drop.batch)};
    philox(c, drop.seed);
    const Wide low = (c[0] & 0xffffffff) | (c[1] << 32), high = (c[2] & 0xffffffff) | (c[3] << 32);
    alignas(64) uint32_t words[4 * WIDE];
    zip_wide(low, high, words, typename MakeSeq<WIDE>::type{});
    for (int i = 0; i < 4 * WIDE; i++) keep[k + i] = T(words[i] >= drop.threshold);
  }
}
