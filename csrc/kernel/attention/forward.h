// Forward: out = softmax(scale * q k^T + ...) v for a range of queries of one head, tile by tile,
// with the online softmax of Milakov and Gimelshein (2018) as FlashAttention (Dao et al., 2022)
// uses it. No score matrix.
//
// Queries lie in the lanes: S^T [keys x queries] from rows of K broadcast from where they are and
// packed Q^T, then O^T [dv x queries] += V^T P^T with rows of V broadcast from where they are. So K
// and V are neither packed nor transposed, and max, sum and rescaling are vertical. Only Q on the
// way in and O on the way out are transposed.
//
// Cost for a block of 128 keys and 64 queries at d = 64, W = 16: 2 * 128 * 4 * 64 = 65,536
// multiply-adds (one a cycle), the exp pass 128 * 4 vectors at about 7 cycles (5 %), rescaling O 64
// * 4 (0.4 %), storing and re-reading P 3 %.
#pragma once

#include "kernel/attention/dense_scores.h"
#include "kernel/attention/finish.h"
#include "kernel/attention/forward_pairs.h"
#include "kernel/attention/forward_steps.h"
#include "kernel/attention/operands.h"
#include "kernel/attention/pages.h"
#include "kernel/rules/dropout.h"
#include "kernel/vector/scratch.h"
#include "kernel/vector/tanh.h"

namespace fusedattn {
namespace {

// S = S * factor, where a scale is out of the ordinary; the maximum over keys joins max_io.
template <class T, int NQ> FA_NOINLINE void stretch(index_t n, T* p, T factor, T* max_io) {
  for (index_t i = 0; i < n; i++) FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    T *at = p + (i * NQ + j) * W<T>, *max = max_io + j * W<T>;
    const Vec<T> s = load(at) * splat(factor);
    store(at, s);
    store(max, max_or_second<T>(s, load(max)));
  }
}

// S = softcap * tanh(S), in log2 units; the maximum over keys joins max_io.
template <class T, int NQ> FA_NOINLINE void bend(index_t n, T* p, T softcap, T* max_io) {
  const Vec<T> cap = splat(softcap * T(LOG2E));
  Vec<T> max[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) max[j] = load(max_io + j * W<T>);
#pragma GCC unroll 1
  for (index_t i = 0; i < n; i++) {
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      T* at = p + (i * NQ + j) * W<T>;
      const Vec<T> s = cap * tanh<T>(load(at));
      store(at, s);
      max[j] = max_or_second<T>(s, max[j]);
    }
  }
  FA_UNROLL
  for (int j = 0; j < NQ; j++) store(max_io + j * W<T>, max[j]);
}

// The same of all rows of a block, found out once for all sub-blocks.
struct Finite {
  index_t rows;
  enum { unknown, yes, no } known = unknown;
};
template <class E, class T = Compute<E>>
FA_INLINE bool is_finite(Finite& f, Rows<T> v, index_t dv) {
  if (f.known == Finite::unknown)
    f.known = finite_values<E>(v, 0, f.rows, dv) ? Finite::yes : Finite::no;
  return f.known == Finite::yes;
}

// One block of keys [k0, k1) (at most KEY_BLOCK) for one sub-block of queries.
template <class E, int NQ, class T = Compute<E>>
FA_NOINLINE void forward_block(const ForwardHead& h, Queries<T>& x, Rows<T> k, Rows<T> v, bool cold,
                               index_t block, index_t k0, index_t k1, T* p, T* tile,
                               Fetcher& fetcher, Finite& v_finite) {
  const index_t lanes = NQ * W<T>;
  const Factors factors = logit_factors<T>(h.scale, h.rules);
  const Cover cover = cover_of<T>(h.rules, x, block);
  if (cover == Cover::none) return;
  bool use_mask = cover == Cover::some;
  if (use_mask && h.rules.mask.row == 0 && !PAIRS<E>) use_mask = trim_hidden(h.rules.mask, k0, k1);
  if (k0 >= k1) return;
  alignas(64) T block_max[LANES<T>], ignored[LANES<T>], rescale[LANES<T>];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) store(block_max + j * W<T>, splat(Bits<T>::lowest));

  // 1. scores, in up to three ranges: ragged, seen by every query, ragged
  index_t cut[4] = {k0, max_index(k0, min_index(k1, x.keys.all.low)), 0, k1};
  cut[2] = max_index(cut[1], min_index(k1, x.keys.all.high));
  Dense<T> dense[3] = {};  // made where V asks for care, and where it is one number a key
  bool has_dense_part[3] = {}, careful = false;
  for (int r = 0; r < 3; r++) {
    const index_t a = cut[r], n = cut[r + 1] - a;
    if (n <= 0) continue;
    T *pr = p + (a - k0) * lanes, *tile_r = tile + (a - k0) * lanes;
    const bool bent = h.rules.softcap > 0, ragged = r != 1,
               plain = !ragged && !has_dense(h.rules, use_mask),
               per_key = !plain && !ragged && dense_is_per_key(h.rules, use_mask);
    const Rows<T> kr{k.data + (a - block) * k.ld, k.ld}, vr{v.data + (a - block) * v.ld, v.ld};
    const bool direct = plain && !bent && factors.after == 1;
    const auto run = cold ? scores<E, NQ, true> : scores<E, NQ, false>;
    run(n, kr, vr, x.q, words<E>(h.d), h.dv, T(factors.before), pr, direct ? block_max : ignored);
    if (factors.after != 1)
      stretch<T, NQ>(n, pr, T(factors.after), plain && !bent ? block_max : ignored);
    if (bent) bend<T, NQ>(n, pr, T(h.rules.softcap), plain ? block_max : ignored);
    if (plain) {
      FA_UNROLL
      for (int j = 0; j < NQ; j++) store(x.seen + j * W<T>, splat(T(1)));
      continue;
    }
    has_dense_part[r] = true;
    if (per_key) {
      dense[r] = dense_tile<E>(h.rules, x, use_mask, ragged, a, a + n, tile_r);
      add_dense<T, NQ>(n, pr, dense[r], block_max, x.seen);
    } else {
      make_and_add_dense<E>(h.rules, x, use_mask, ragged, a, a + n, pr, block_max);
    }
    careful |= !is_finite<E>(v_finite, v, h.dv);
  }
  for (int r = 0; careful && r < 3; r++)
    if (has_dense_part[r] && !dense[r].data)
      dense[r] = dense_tile<E>(h.rules, x, use_mask, r != 1, cut[r], cut[r + 1],
                               tile + (cut[r] - k0) * lanes);

  // 2. P = exp2(S - max), running maximum and sums
  if constexpr (PAIRS<E>)
    exponentials_in_pairs<NQ>(k1 - k0, p, block_max, x.max, x.sum, x.total, rescale, fetcher);
  else
    exponentials<T, NQ>(k1 - k0, p, block_max, x.max, x.sum, rescale, fetcher);
  if (h.rules.dropout.threshold) drop_tile<E, NQ>(h.rules.dropout, x.first, k0, k1 - k0, p);

  // 3. O = O * rescale + P V
  constexpr index_t each = PAIRS<E> ? 2 : 1;
  const Rows<T> vb{v.data + (k0 - block) / each * v.ld, v.ld};
  if (!careful) {
    values<E, NQ>(words<E>(k1 - k0), vb, p, h.dv, x.o, rescale);
  } else if constexpr (PAIRS<E>) {
    careful_values_in_pairs<NQ>(words<E>(k1 - k0), vb, p, dense, cut, h.dv, x.o, rescale);
  } else {
    for (int r = 0; r < 3; r++)
      if (dense[r].data)
        mark_masked<T, NQ>(cut[r + 1] - cut[r], p + (cut[r] - k0) * lanes, dense[r]);
    careful_values<T, NQ>(k1 - k0, vb, p, h.dv, x.o, rescale);
  }
}

// The end of the last word's keys.
template <class E> FA_INLINE index_t whole_words(index_t key, index_t end) {
  return PAIRS<E> ? min_index((key + 1) / 2 * 2, end) : key;
}

template <class E> FA_ENTRY size_t forward_scratch(const ForwardHead& h, index_t queries) {
  using T = Compute<E>;
  const index_t subs =
      (queries + W<T> - 1) / W<T>;  // at most, if every sub-block were one vector wide
  const index_t lanes = round_up<T>(queries) + LANES<T>;
  const index_t elements = lanes * (h.d + h.dv + 4) + (2 * KEY_BLOCK + W<T>)*LANES<T> +
                           KEY_BLOCK * (h.d + round_up<T>(h.dv));
  return size_t(elements) * sizeof(T) + size_t(subs) * sizeof(Queries<T>) + size_t(subs) * 7 * 64 +
         8 * 64;
}

template <class E>
FA_ENTRY void forward(const ForwardHead& h, index_t q_begin, index_t q_end, const NextQueries& next,
                      void* scratch) {
  using T = Compute<E>;
  char* free = static_cast<char*>(scratch);
  const bool k_in_place = !h.pages.table && is_ready<E>(h.k, h.d),
             v_in_place = !h.pages.table && !PAIRS<E> && is_ready<E>(h.v);
  T *p = carve<T>(free, (KEY_BLOCK + W<T>)*LANES<T>), *tile = carve<T>(free, KEY_BLOCK * LANES<T>);
  T *k_copy = carve<T>(free, k_in_place ? 0 : KEY_BLOCK * h.d),
    *v_copy = carve<T>(free, v_in_place ? 0 : KEY_BLOCK * round_up<T>(h.dv));
  auto* subs = reinterpret_cast<Queries<T>*>(
      carve<char>(free, (q_end - q_begin + W<T> - 1) / W<T> * index_t(sizeof(Queries<T>))));

  int n = 0;
  Interval any{h.sk, 0};
  for (index_t q = q_begin; q < q_end; n++) {
    Queries<T>& x = subs[n];
    x.first = q;
    x.uncovered = 0;
    choose_width<T>(x, h, q_end);
    const index_t lanes = x.vectors * W<T>;
    x.q = carve<T>(free, h.d * lanes);
    x.o = carve<T>(free, h.dv * lanes);
    x.max = carve<T>(free, lanes);
    x.sum = carve<T>(free, lanes);
    x.seen = carve<T>(free, lanes);
    x.total = PAIRS<E> ? carve<T>(free, lanes) : x.sum;
    if constexpr (PAIRS<E>)
      pack_words(h.q, q, x.count, h.d, x.q, lanes);
    else
      pack_transposed<E>(h.q, q, x.count, h.d, T(logit_factors<T>(h.scale, h.rules).before), x.q,
                         lanes);
    __builtin_memset(x.o, 0, size_t(h.dv * lanes) * sizeof(T));
    for (index_t i = 0; i < lanes; i++)
      x.max[i] = Bits<T>::lowest, x.sum[i] = x.total[i] = x.seen[i] = 0;
    any.low = min_index(any.low, x.keys.any.low);
    any.high = max_index(any.high, x.keys.any.high);
    q += x.count;
  }

  Fetcher fetcher;  // a step is a key's exponentials
  queue_next_queries<E>(fetcher, h, next);
  start_fetching(fetcher, n * (any.high - any.low / KEY_BLOCK * KEY_BLOCK));

  // Blocks start at multiples of KEY_BLOCK whatever the interval, so that a row's bits do not
  // depend on its neighbours.
  for (index_t block = any.low / KEY_BLOCK * KEY_BLOCK; block < any.high; block += KEY_BLOCK) {
    const index_t end = min_index(block + KEY_BLOCK, any.high);
    const index_t ld = words<E>(h.d), ld_v = PAIRS<E> ? round_up<T>(h.dv) : h.dv;
    Rows<T> k{k_copy, ld}, v{v_copy, ld_v};
    if (h.pages.table) {
      copy_pages<E>(h.k, h.pages, h.pages.k_page, block, end - block, h.d, k_copy, ld);
      copy_value_pages<E>(h.v, h.pages, block, end - block, h.dv, v_copy, ld_v);
    } else {
      k = key_rows<E>(h.k, block, end - block, h.d, k_copy, k_in_place);
      v = value_rows<E>(h.v, block, end - block, h.dv, v_copy, v_in_place);
    }
    Finite v_finite{end - block};
    for (int s = 0; s < n; s++) {
      Queries<T>& x = subs[s];
      index_t k0 = max_index(block, x.keys.any.low), k1 = min_index(end, x.keys.any.high);
      if (k0 >= k1) continue;
      if (PAIRS<E>) k0 = k0 / 2 * 2, k1 = whole_words<E>(k1, end);
      const bool cold = s == 0 && block > 0;  // the task before has fetched the first block
      with_count<MAX_NJ>(x.vectors, [&]<int NQ>() FA_LAMBDA {
        forward_block<E, NQ>(h, x, k, v, cold, block, k0, k1, p, tile, fetcher, v_finite);
      });
    }
  }
  for (int s = 0; s < n; s++) finish<E>(h, subs[s]);
}

}  // namespace
}  // namespace fusedattn
