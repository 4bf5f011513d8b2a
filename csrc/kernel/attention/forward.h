// Forward: out = softmax(scale * q k^T + ...) v for a range of queries of one head, block by block,
// with the online softmax of Milakov and Gimelshein (2018) as FlashAttention (Dao et al., 2022)
// uses it. No score matrix.
//
// Queries lie in the lanes: S^T [keys x queries] from rows of K broadcast from where they are and
// packed Q^T, then O^T [d_v x queries] += V^T P^T with rows of V broadcast from where they are. So
// K and V are neither packed nor transposed, and max, sum and rescaling are vertical. Only Q on the
// way in and O on the way out are transposed.
//
// Cost for a block of 128 keys and 64 queries at d = 64, W = 16: 2 * 128 * 4 * 64 = 65,536
// multiply-adds (one a cycle), the exp pass 128 * 4 vectors at about 7 cycles (5 %), rescaling O 64
// * 4 (0.4 %), storing and re-reading P 3 %.
#pragma once

#include "kernel/attention/finish.h"
#include "kernel/attention/forward_block.h"
#include "kernel/attention/forward_loop.h"
#include "kernel/attention/pages.h"
#include "kernel/vector/scratch.h"

namespace fusedattn {
namespace {

// The engine of forward_in_blocks on multiply-adds, and its scratch.
template <class E> struct MultiplyAddForward {
  using T = Compute<E>;
  static constexpr int widest = MAX_NJ;
  static constexpr bool trims = !PAIRS<E>;  // words hold two keys

  const ForwardHead& h;
  const NextQueries& next;
  const index_t begin_at, k_ld, v_ld;  // the first query; elements from row to row of copies
  const bool k_in_place, v_in_place;
  T *p, *tile, *k_copy, *v_copy;
  Queries<T>* subs;
  T *q, *o, *sums;  // of all queries: (d, lanes) and (d_v, lanes) of each sub-block, four numbers
  Rows<T> k{}, v{};
  Finite v_finite{};
  index_t key_end = 0;
  Fetcher fetcher;

  FA_INLINE_MEMBER MultiplyAddForward(const ForwardHead& head, index_t q_begin, index_t queries,
                                      const NextQueries& then, Layout& scratch)
      : h(head),
        next(then),
        begin_at(q_begin),
        k_ld(words<E>(head.d)),
        v_ld(PAIRS<E> ? round_up<T>(head.d_v) : head.d_v),
        k_in_place(!head.pages.table && is_ready<E>(head.k, head.d)),
        v_in_place(!head.pages.table && !PAIRS<E> && is_ready<E>(head.v)) {
    // All sub-blocks but the last are full, so their lanes add up to this.
    const index_t lanes = round_up<T>(queries);
    p = scratch.take<T>((KEY_BLOCK + W<T>)*LANES<T>);
    tile = scratch.take<T>(KEY_BLOCK * LANES<T>);
    k_copy = scratch.take<T>(k_in_place ? 0 : KEY_BLOCK * h.d);
    v_copy = scratch.take<T>(v_in_place ? 0 : KEY_BLOCK * round_up<T>(h.d_v));
    subs = scratch.take<Queries<T>>(lanes / W<T>);
    q = scratch.take<T>(h.d * lanes);
    o = scratch.take<T>(h.d_v * lanes);
    sums = scratch.take<T>(4 * lanes);
  }

  FA_INLINE_MEMBER void begin(Queries<T>& x) {
    const index_t lanes = x.vectors * W<T>, at = x.first - begin_at;
    x.q = q + h.d * at;
    x.o = o + h.d_v * at;
    x.max = sums + 4 * at;
    x.sum = x.max + lanes;
    x.seen = x.sum + lanes;
    x.total = PAIRS<E> ? x.seen + lanes : x.sum;
    if constexpr (PAIRS<E>)
      pack_words(h.q, x.first, x.count, h.d, x.q, lanes);
    else
      pack_transposed<E>(h.q, x.first, x.count, h.d, T(logit_factors<T>(h.scale, h.rules).before),
                         x.q, lanes);
    __builtin_memset(x.o, 0, size_t(h.d_v * lanes) * sizeof(T));
    for (index_t i = 0; i < lanes; i++)
      x.max[i] = Bits<T>::lowest, x.sum[i] = x.total[i] = x.seen[i] = 0;
  }
  FA_INLINE_MEMBER void plan(int count, Interval any) {
    queue_next_queries<E>(fetcher, h, next);
    start_fetching(fetcher, count * (any.high - any.low / KEY_BLOCK * KEY_BLOCK));
  }
  FA_INLINE_MEMBER void take_keys(index_t block, index_t rows) {
    key_end = block + rows;
    v_finite = {rows};
    if (h.pages.table) {
      copy_pages<E>(h.k, h.pages, h.pages.k_page, block, rows, h.d, k_copy, k_ld);
      copy_value_pages<E>(h.v, h.pages, block, rows, h.d_v, v_copy, v_ld);
      k = {k_copy, k_ld}, v = {v_copy, v_ld};
    } else {
      k = key_rows<E>(h.k, block, rows, h.d, k_copy, k_in_place);
      v = value_rows<E>(h.v, block, rows, h.d_v, v_copy, v_in_place);
    }
  }
  FA_INLINE_MEMBER void attend(int i, index_t block, index_t k0, index_t k1, bool use_mask) {
    Queries<T>& x = subs[i];
    if (PAIRS<E>) k0 = k0 / 2 * 2, k1 = min_index((k1 + 1) / 2 * 2, key_end);  // whole words
    const bool cold = i == 0 && block > 0;  // the task before has fetched the first block
    with_count<MAX_NJ>(x.vectors, [&]<int NQ>() FA_LAMBDA {
      forward_block<E, NQ>(h, x, k, v, cold, block, k0, k1, use_mask, p, tile, fetcher, v_finite);
    });
  }
  FA_INLINE_MEMBER void end(int count) {
    for (int i = 0; i < count; i++) finish<E>(h, subs[i]);
  }
};

template <class E> FA_ENTRY size_t forward_scratch(const ForwardHead& h, index_t queries) {
  Layout measure(nullptr);
  MultiplyAddForward<E>(h, 0, queries, {}, measure);
  return measure.bytes();
}
template <class E>
FA_ENTRY void forward(const ForwardHead& h, index_t q_begin, index_t q_end, const NextQueries& next,
                      void* scratch) {
  Layout layout(scratch);
  MultiplyAddForward<E> engine(h, q_begin, q_end - q_begin, next, layout);
  forward_in_blocks(engine, h, q_begin, q_end);
}

}  // namespace
}  // namespace fusedattn
