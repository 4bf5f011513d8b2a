// The queries that forward takes at once and their running softmax.
#pragma once

#include "kernel/rules/intervals.h"
#include "kernel/vector/fetch.h"
#include "kernel/vector/tile.h"

namespace fusedattn {
namespace {

inline constexpr index_t KEY_BLOCK = 128;
template <class T> inline constexpr int LINE = 64 / int(sizeof(T));  // elements in a cache line
template <class T> inline constexpr int LANES = MAX_NJ * W<T>;  // queries in the widest sub-block

// Up to LANES queries and their running softmax, in log2 units.
template <class T> struct Queries {
  index_t first, count;
  int vectors;  // in use, ceil(count / W); also the row length of q, o and p in vectors
  Span keys;
  T* q;                 // (d, lanes)   Q^T * scale * log2(e); pairs: words of Q^T
  T* o;                 // (d_v, lanes)  sum of P V so far
  T *max, *sum, *seen;  // (lanes); seen: 1 once a key was allowed
  T* total;             // (lanes) what o is divided by: sum, for pairs that of the rounded P
};

inline constexpr index_t RAGGED = 4;  // at most this part, 1/4, of a sub-block's keys

// As many queries as a sub-block holds, but fewer where their intervals differ much: what is ragged
// is computed in full and thrown away. The bits do not depend on it.
template <class T>
FA_INLINE void choose_width(Queries<T>& x, const ForwardHead& h, index_t q_end, int most = MAX_NJ) {
  for (int vectors = most;; vectors = (vectors + 1) / 2) {
    x.count = min_index(q_end - x.first, vectors * W<T>);
    x.vectors = int((x.count + W<T> - 1) / W<T>);
    x.keys = visible_span(h.rules, x.first, x.first + x.count, h.sk);
    const index_t any = x.keys.any.high - x.keys.any.low;
    const index_t all = max_index(x.keys.all.high - x.keys.all.low, 0);
    if (x.vectors == 1 || any > RAGGED * (any - all)) return;
  }
}

// Has the fetcher fetch what the next task reads and writes first: its queries, then their keys and
// values, then the rows of its outputs.
template <class E>
FA_INLINE void queue_next_queries(Fetcher& f, const ForwardHead& h, const NextQueries& next) {
  constexpr index_t size = sizeof(E);
  const index_t keys = next.new_keys ? min_index(h.sk, 4 * KEY_BLOCK) : 0;
  fetch_rows(f, next.out, next.begin, next.end, h.d_v * size);
  fetch_rows(f, next.v, 0, keys, h.d_v * size);
  fetch_rows(f, next.k, 0, keys, h.d * size);
  fetch_rows(f, next.q, next.begin, next.end, h.d * size);
}

}  // namespace
}  // namespace fusedattn
