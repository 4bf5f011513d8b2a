// Forward for a few queries against many keys (decoding, speculative decoding, short chunks):
// limited by reading K and V once, for all query heads that share them.
//
// Keys lie in the lanes for the scores: W x W elements of K are transposed in registers, so that
// every logit is the same chain over d as in forward.h; then rows of V are the vectors and P is
// broadcast. Same blocks of keys, same order of every sum: the bits are those of forward.h.
//
// Cost for W keys of d = 128 with W = 16: 8 transposes of about 70 cycles for 8 KB of K, which is
// 50 GB/s a core; the multiply-adds of up to four queries hide behind the shuffles. While K is read
// the same rows of V are fetched, while V is read the next rows of K.
#pragma once

#include "kernel/attention/few_rows.h"
#include "kernel/attention/operands.h"
#include "kernel/attention/pages.h"
#include "kernel/vector/scratch.h"

namespace fusedattn {
namespace {

inline constexpr int FEW = 8;  // queries at most, over all heads of the group

// W operands of a row: numbers, or words.
template <class S, class T = Compute<S>> FA_INLINE Vec<T> load_operands(const char* p) {
  if constexpr (PAIRS<S>)
    return load_words(p);
  else
    return load_as<S>(p);
}
template <class S> inline constexpr index_t OPERAND = PAIRS<S> ? 4 : sizeof(S);  // bytes

// W rows of W operands at `at`, transposed: t[j] holds column j.
template <class S, class T>
FA_INLINE void load_transposed(const char* at, index_t row, Vec<T> (&t)[W<T>]) {
  FA_UNROLL
  for (int i = 0; i < W<T>; i += 2) {
    t[i] = load_operands<S>(at);
    t[i + 1] = load_operands<S>(at + row);
    at += 2 * row;
  }
  transpose_registers<T>(t);
}

// p[r][key] = q[r] . k[key] for n keys (times factor for pairs), rows of K in storage type S, d
// operands. Fetches the same rows of V.
template <class S, int R, class T = Compute<S>>
FA_NOINLINE void few_scores(Row<T>* rows, index_t n, const char* k, index_t k_row, const char* v,
                            index_t v_row, index_t v_bytes, index_t d, T factor) {
  const T* q[R];
  FA_UNROLL
  for (int r = 0; r < R; r++) q[r] = rows[r].q;
  for (index_t key = 0; key < n; key += W<T>) {
    const int nk = int(min_index(W<T>, n - key));
    Vec<T> acc[R] = {};
    index_t c = 0;
    const char* at = k + key * k_row;
    if (nk == W<T>)
      for (; c + W<T> <= d; c += W<T>) {
        for (int i = 0; i < nk; i++)  // a few lines at a time: a burst would only wait for itself
          if (c * OPERAND<S> < v_bytes) prefetch_far(v + (key + i) * v_row + c * OPERAND<S>);
        Vec<T> t[W<T>];
        load_transposed<S, T>(at + c * OPERAND<S>, k_row, t);
        FA_UNROLL
        for (int j = 0; j < W<T>; j++) {
          FA_UNROLL
          for (int r = 0; r < R; r++)
            acc[r] = multiply_add<S>(splat_operand<S>(q[r] + c + j), t[j], acc[r]);
        }
      }
    for (; c < d; c++) {  // the last keys, the last columns: one column at a time
      using Element = Select<PAIRS<S>, T, S>;  // words are moved as the numbers that carry them
      const Vec<T> column = gather_as<Element>(at + c * OPERAND<S>, k_row, nk);
      FA_UNROLL
      for (int r = 0; r < R; r++)
        acc[r] = multiply_add<S>(splat_operand<S>(q[r] + c), column, acc[r]);
    }
    FA_UNROLL
    for (int r = 0; r < R; r++) store(rows[r].p + key, PAIRS<S> ? acc[r] * splat(factor) : acc[r]);
  }
}

// o[r] = o[r] * rescale + sum over n keys (or words of two) of p[r][key] * v[key]; fetches n rows
// of what comes next.
template <class E, int R, int NJ, class T = Compute<E>>
FA_INLINE void few_value_tile(Row<T>* rows, index_t n, Rows<T> v, index_t column, const char* next,
                              index_t next_row, index_t next_bytes) {
  Vec<T> acc[R][NJ] = {};
  const index_t p_row = R > 1 ? rows[1].p - rows[0].p : 0;
  for (index_t key = 0; key < n; key += 4) {
    const index_t piece = min_index(4, n - key);
    constexpr index_t keys = PAIRS<E> ? 2 : 1, size = sizeof(T) / keys;
    const index_t begin = column * size, end = begin + NJ * W<T> * size;
    for (index_t i = 0; next && i < keys * piece; i++)
      for (index_t c = begin; c < min_index(end, next_bytes); c += 64)
        prefetch_far(next + (keys * key + i) * next_row + c);
    multiply_tile<E, R, NJ>(acc, rows[0].p + key, p_row, 1, v.data + key * v.ld + column, v.ld,
                            piece);
  }
  FA_UNROLL
  for (int r = 0; r < R; r++) {
    FA_UNROLL
    for (int j = 0; j < NJ; j++) {
      T* at = rows[r].o + column + j * W<T>;
      store(at, fma<T>(load(at), splat(rows[r].rescale), acc[r][j]));
    }
  }
}
template <class E, int R, class T = Compute<E>>
FA_NOINLINE void few_values(Row<T>* rows, index_t n, Rows<T> v, index_t padded, const char* next,
                            index_t next_row, index_t next_bytes) {
  constexpr int NJ = R <= 4 ? 4 : 2;
  index_t c = 0;
  for (; c + NJ * W<T> <= padded; c += NJ * W<T>)
    few_value_tile<E, R, NJ>(rows, n, v, c, next, next_row, next_bytes);
  for (; c < padded; c += W<T>) few_value_tile<E, R, 1>(rows, n, v, c, next, next_row, next_bytes);
}

// The same without the masked entries, where V holds something that is not finite.
template <class E, class T = Compute<E>>
FA_NOINLINE void few_careful_values(Row<T>& x, index_t n, Rows<T> v, index_t padded) {
  for (index_t c = 0; c < padded; c += W<T>) {
    Vec<T> acc{};
    for (index_t key = 0; key < n; key++)
      if constexpr (PAIRS<E>) {
        const Vec<T> seen = load(v.data + key * v.ld + c);
        acc = multiply_add<E>(splat_operand<E>(x.p + key),
                              masked_words(seen, x.dense[2 * key], x.dense[2 * key + 1]), acc);
      } else if (x.dense[key] != -Bits<T>::infinity) {
        acc = fma<T>(splat(x.p[key]), load(v.data + key * v.ld + c), acc);
      }
    store(x.o + c, fma<T>(load(x.o + c), splat(x.rescale), acc));
  }
}

template <class S, class T>
FA_INLINE void few_scores_of(int count, Row<T>* rows, index_t n, const char* k, index_t k_row,
                             const char* v, index_t v_row, index_t v_bytes, index_t d, T factor) {
  int r = 0;  // rows in fours, the last ones alone: V is fetched with the first
  for (; r + 4 <= count; r += 4, v_bytes = 0)
    few_scores<S, 4>(rows + r, n, k, k_row, v, v_row, v_bytes, d, factor);
  if (r + 2 <= count) {
    few_scores<S, 2>(rows + r, n, k, k_row, v, v_row, v_bytes, d, factor);
    r += 2;
    v_bytes = 0;
  }
  if (r < count) few_scores<S, 1>(rows + r, n, k, k_row, v, v_row, v_bytes, d, factor);
}

// The memory of one call.
template <class E> struct FewScratch {
  using T = Compute<E>;
  index_t ld, ld_v;  // d and d_v rounded up to W
  T *q, *o, *p, *dense, *k_copy, *v_copy;

  FA_INLINE_MEMBER FewScratch(const ForwardHead& h, Layout& scratch)
      : ld(round_up<T>(h.d)), ld_v(round_up<T>(h.d_v)) {
    q = scratch.take<T>(FEW * ld);
    o = scratch.take<T>(FEW * ld_v);
    p = scratch.take<T>(FEW * KEY_BLOCK);
    dense = scratch.take<T>(FEW * KEY_BLOCK);
    k_copy = scratch.take<T>(KEY_BLOCK * ld);
    v_copy = scratch.take<T>(KEY_BLOCK * ld_v);
  }
};
template <class E> FA_ENTRY size_t few_scratch(const ForwardHead& h) {
  Layout measure(nullptr);
  FewScratch<E>(h, measure);
  return measure.bytes();
}

// All queries of `group` heads that share one key/value head; at most FEW in all.
template <class E>
FA_ENTRY void forward_few(const ForwardHead* heads, index_t group, void* scratch) {
  using T = Compute<E>;
  const ForwardHead& h = heads[0];
  Layout layout(scratch);
  const FewScratch<E> own(h, layout);
  const index_t ld = own.ld, ld_v = own.ld_v;
  T *k_copy = own.k_copy, *v_copy = own.v_copy;
  const bool paged = h.pages.table;
  const bool k_native = !paged && is_native<E>(h.k) && (!PAIRS<E> || h.d % 2 == 0);
  const bool v_ready = !paged && sizeof(E) == sizeof(T) && is_native<E>(h.v) && h.d_v % W<T> == 0;
  const T factor = T(logit_factors<T>(h.scale, h.rules).before);

  Row<T> rows[FEW];
  int count;
  const Interval any = begin_rows(heads, group, rows, count, [&](Row<T>& x, int r) FA_LAMBDA {
    x.q = own.q + r * ld;
    x.o = own.o + r * ld_v;
    x.p = own.p + r * KEY_BLOCK;
    x.dense = own.dense + r * KEY_BLOCK;
    copy_operands<E>(x.head->q, x.query, 1, h.d, factor, x.q, ld);
    __builtin_memset(x.o, 0, size_t(ld_v) * sizeof(T));
  });

  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    index_t k0 = max_index(block, any.low);
    const index_t k1 = min_index(block + KEY_BLOCK, any.high);
    if (PAIRS<E>) k0 = k0 / 2 * 2;
    const index_t n = k1 - k0, n_words = PAIRS<E> ? words<E>(n) : n;
    // 1. scores
    const char *k = h.k.data + k0 * h.k.row, *v = h.v.data + k0 * h.v.row;
    const index_t k_bytes = h.d * index_t(sizeof(E)),
                  v_bytes = paged ? 0 : h.d_v * index_t(sizeof(E));  // nothing to fetch ahead
    if (k_native) {
      few_scores_of<E>(count, rows, n, k, h.k.row, v, h.v.row, v_bytes, words<E>(h.d), factor);
    } else {
      using S = Select<PAIRS<E>, E, T>;
      if (paged)
        copy_pages<E>(h.k, h.pages, h.pages.k_page, k0, n, h.d, k_copy, ld);
      else
        copy_operands<E>(h.k, k0, n, h.d, T(1), k_copy, ld);
      few_scores_of<S>(count, rows, n, reinterpret_cast<const char*>(k_copy),
                       ld * index_t(sizeof(T)), v, h.v.row, v_bytes, words<E>(h.d), factor);
    }
    // 2. P = exp2(S - max)
    bool masked = false;
    for (int r = 0; r < count; r++) {
      few_softmax<E>(rows[r], k0, n);
      masked |= rows[r].has_dense;
    }
    // 3. O = O * rescale + P V
    Rows<T> vr{v_copy, ld_v};
    if (paged)
      copy_value_pages<E>(h.v, h.pages, k0, n, h.d_v, v_copy, ld_v);
    else if constexpr (PAIRS<E>)
      interleave_rows(h.v, k0, n, h.d_v, v_copy, ld_v);
    else
      vr = rows_at<E>(h.v, k0, n, h.d_v, v_copy, ld_v, v_ready);
    const char* next = !paged && k0 + 2 * n <= any.high ? k + n * h.k.row : nullptr;
    if (masked && !finite_values<E>(vr, 0, n, h.d_v)) {
      for (int r = 0; r < count; r++)
        rows[r].has_dense ? few_careful_values<E>(rows[r], n_words, vr, ld_v)
                          : few_values<E, 1>(rows + r, n_words, vr, ld_v, nullptr, 0, 0);
      continue;
    }
    int r = 0;
    for (; r + 4 <= count; r += 4, next = nullptr)
      few_values<E, 4>(rows + r, n_words, vr, ld_v, next, h.k.row, k_bytes);
    if (r + 2 <= count) {
      few_values<E, 2>(rows + r, n_words, vr, ld_v, next, h.k.row, k_bytes);
      r += 2;
      next = nullptr;
    }
    if (r < count) few_values<E, 1>(rows + r, n_words, vr, ld_v, next, h.k.row, k_bytes);
  }

  finish_few<E>(rows, count, ld_v);
}

}  // namespace
}  // namespace fusedattn
