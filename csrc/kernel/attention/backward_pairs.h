// What differs in the backward pass where bfloat16 is multiplied in pairs: P and dS, computed in
// float32, enter the gradient products rounded, as words of two queries (dk, dv) and of two keys
// (dq). dS is scaled before it is rounded, so that Q and K enter as they are.
//
// Cost for four vectors of P and dS: 6 roundings, 4 permutations, 14 loads and stores, some 30
// cycles beside 4 * 5 * d / 2 for the products: a twentieth at d = 64.
#pragma once

#include "kernel/attention/backward_block.h"
#include "kernel/vector/pairs.h"

namespace fusedattn {
namespace {

#if defined(__AVX512BF16__)

// p_words, ds_words, ds_rows from the first nq rows of p and ds_in.
FA_NOINLINE void round_block(const BackwardBlock<float>& b, const float* ds_in, index_t nq,
                             bool need_ds, float scale) {
  using T = float;
  const Vec<T> f = splat(scale), zero{};
  for (index_t i = 0; i < nq; i += 2) {
    const bool two = i + 1 < nq;
    const T *p = b.p + i * BACK_KEYS, *ds = ds_in + i * BACK_KEYS;
    T *p_words = b.p_words + i / 2 * BACK_KEYS, *ds_words = b.ds_words + i / 2 * BACK_KEYS;
    for (index_t k = 0; k < b.nk_padded; k += W<T>)
      store(p_words + k, rounded_words(load(p + k), two ? load(p + BACK_KEYS + k) : zero));
    if (!need_ds) continue;
    T* rows = b.ds_rows + i * (BACK_KEYS / 2);
    for (index_t k = 0; k < b.nk_padded; k += 2 * W<T>) {
      const bool wide = k + W<T> < b.nk_padded;
      const Vec<T> a = load(ds + k) * f, b0 = two ? load(ds + BACK_KEYS + k) * f : zero;
      const Vec<T> a1 = wide ? load(ds + k + W<T>) * f : zero;
      const Vec<T> b1 = wide && two ? load(ds + BACK_KEYS + k + W<T>) * f : zero;
      store(ds_words + k, rounded_words(a, b0));
      if (wide) store(ds_words + k + W<T>, rounded_words(a1, b1));
      store(rows + k / 2, rounded(a, a1));
      store(rows + BACK_KEYS / 2 + k / 2, rounded(b0, b1));
    }
  }
  // A word's second key beyond the last one: whatever was computed there must not meet K's 0.
  if (b.nk % 2)
    for (index_t i = 0; i < nq; i++)
      __builtin_memset(reinterpret_cast<char*>(b.ds_rows + i * (BACK_KEYS / 2)) + 2 * b.nk, 0, 2);
}

// careful_accumulate for words. `rows` are interleaved.
FA_NOINLINE void careful_accumulate_words(const BackwardBlock<float>& b, const float* a, index_t nq,
                                          bool by_key, Rows<float> rows, index_t n, float* c,
                                          index_t c_row) {
  using T = float;
  const index_t outer = by_key ? b.nk : nq, inner = by_key ? nq : b.nk;
  const index_t next = by_key ? BACK_KEYS : 1;  // from an entry to the other one of its word
  for (index_t i = 0; i < outer; i++)
    for (index_t x = 0; x < n; x += W<T>) {
      const int width = int(min_index(W<T>, n - x));
      Vec<T> acc{};
      for (index_t p = 0; p < inner; p += 2) {
        const T* dense = b.dense + (by_key ? p * BACK_KEYS + i : i * BACK_KEYS + p);
        const T* at = a + (by_key ? p / 2 * BACK_KEYS + i : (i * BACK_KEYS + p) / 2);
        const Vec<T> row = masked_words(load(rows.data + p / 2 * rows.ld + x), dense[0],
                                        p + 1 < inner ? dense[next] : -Bits<T>::infinity);
        acc = multiply_add<BFloat>(splat_operand<BFloat>(at), row, acc);
      }
      T* to = c + i * c_row + x;
      store_n(to, load_n(to, width) + acc, width);
    }
}

#endif

}  // namespace
}  // namespace fusedattn
