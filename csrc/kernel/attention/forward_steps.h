// The three steps of the forward pass over one block of keys: scores, exponentials, values.
#pragma once

#include "kernel/attention/queries.h"
#include "kernel/vector/exp.h"

namespace fusedattn {
namespace {

template <class E, int NI, int NQ, class T = Compute<E>>
FA_INLINE void score_tile(Rows<T> k, const T* q, index_t d, T factor, T* p, Vec<T> (&max)[NQ]) {
  Vec<T> acc[NI][NQ] = {};
  multiply_tile<E, NI, NQ>(acc, k.data, k.ld, 1, q, NQ * W<T>, d);
  FA_UNROLL
  for (int i = 0; i < NI; i++) {
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      if constexpr (PAIRS<E>) acc[i][j] *= splat(factor);
      store(p + (i * NQ + j) * W<T>, acc[i][j]);
      max[j] = max_or_second<T>(acc[i][j], max[j]);
    }
  }
}

// p[key][query] = k[key] . q[query] for n keys (times factor for pairs: q is not scaled then); the
// maximum over keys joins max_io. COLD: keys and values come from memory and are fetched, keys a
// tile ahead.
template <class E, int NQ, bool COLD, class T = Compute<E>>
FA_NOINLINE void scores(index_t n, Rows<T> k, Rows<T> v, const T* q, index_t d, index_t d_v,
                        T factor, T* p, T* max_io) {
  Vec<T> max[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) max[j] = load(max_io + j * W<T>);
  in_tiles<tile_rows<NQ>>(n, [&]<int NI>(index_t i) FA_LAMBDA {
    for (index_t r = i; COLD && r < i + NI; r++) {
      for (index_t c = 0; c < d; c += LINE<T>) prefetch_near(k.data + (r + NI) * k.ld + c);
      if constexpr (!PAIRS<E>)  // whose values were copied to scratch just now
        for (index_t c = 0; c < d_v; c += LINE<T>) prefetch_far(v.data + r * v.ld + c);
    }
    score_tile<E, NI, NQ>({k.data + i * k.ld, k.ld}, q, d, factor, p + i * NQ * W<T>, max);
  });
  FA_UNROLL
  for (int j = 0; j < NQ; j++) store(max_io + j * W<T>, max[j]);
}

// P = exp2(S - max) in place, with the running maximum and sum; rescale = what the sums so far must
// be multiplied by.
template <class T, int NQ>
FA_NOINLINE void exponentials(index_t n, T* p, const T* block_max, T* max_io, T* sum_io, T* rescale,
                              Fetcher& fetcher) {
  Vec<T> max[NQ], sum[NQ];
  FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    const Vec<T> before = load(max_io + j * W<T>);
    max[j] = max_or_second<T>(load(block_max + j * W<T>), before);
    store(max_io + j * W<T>, max[j]);
    store(rescale + j * W<T>, exp2<T>(before - max[j]));
    sum[j] = Vec<T>{};
  }
#pragma GCC unroll 1
  for (index_t i = 0; i < n; i++) {
    fetch(fetcher);
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      T* at = p + (i * NQ + j) * W<T>;
      const Vec<T> e = exp2<T>(load(at) - max[j]);
      sum[j] += e;
      store(at, e);
    }
  }
  FA_UNROLL
  for (int j = 0; j < NQ; j++)
    store(sum_io + j * W<T>, fma<T>(load(sum_io + j * W<T>), load(rescale + j * W<T>), sum[j]));
}

// The block's own sum is made first and then joins the rescaled sums so far: one chain over all
// keys would lose a digit on long rows.
template <class E, int NI, int NQ, class T = Compute<E>>
FA_INLINE void value_tile(Rows<T> v, const T* p, T* o, const T* rescale, index_t n) {
  Vec<T> acc[NI][NQ] = {};
  multiply_tile<E, NI, NQ>(acc, v.data, 1, v.ld, p, NQ * W<T>, n);
  FA_UNROLL
  for (int i = 0; i < NI; i++) {
    FA_UNROLL
    for (int j = 0; j < NQ; j++) {
      T* at = o + (i * NQ + j) * W<T>;
      store(at, fma<T>(load(at), load(rescale + j * W<T>), acc[i][j]));
    }
  }
}
// o[dim][query] = o * rescale + sum over n keys (pairs: words of two keys) of v[key][dim] *
// p[key][query]
template <class E, int NQ, class T = Compute<E>>
FA_NOINLINE void values(index_t n, Rows<T> v, const T* p, index_t d_v, T* o, const T* rescale) {
  in_tiles<tile_rows<NQ>>(d_v, [&]<int NI>(index_t i) FA_LAMBDA {
    value_tile<E, NI, NQ>({v.data + i, v.ld}, p, o + i * NQ * W<T>, rescale, n);
  });
}

// The same where V holds something that is not finite and P marks masked entries by -1: 0 * NaN
// must not happen.
template <class T, int NQ>
FA_NOINLINE void careful_values(index_t n, Rows<T> v, const T* p, index_t d_v, T* o,
                                const T* rescale) {
  for (index_t i = 0; i < d_v; i++) FA_UNROLL
  for (int j = 0; j < NQ; j++) {
    T* at = o + (i * NQ + j) * W<T>;
    Vec<T> acc{};
    for (index_t key = 0; key < n; key++) {
      const Vec<T> e = load(p + (key * NQ + j) * W<T>);
      acc = e < Vec<T>{} ? acc : fma<T>(splat(v.data[key * v.ld + i]), e, acc);
    }
    store(at, fma<T>(load(at), load(rescale + j * W<T>), acc));
  }
}

}  // namespace
}  // namespace fusedattn
