// The state of backward for one block of keys, and which of its pairs are computed.
#pragma once

#include "kernel/vector/element.h"
#include "kernel/vector/vec.h"

namespace fusedattn {
namespace {

inline constexpr index_t BACK_KEYS = 64, BACK_QUERIES = 64, STRIP = 16;

// Where the tile's rows may look: for each strip of STRIP queries the keys [begin, end) that are
// computed.
struct Strips {
  bool plain;  // every query sees every key of the block, and no rule changes a logit
  bool whole;  // every strip computes every key
  int count;
  Interval keys[BACK_QUERIES / STRIP];
};

template <class T> struct BackwardBlock {
  index_t k0, nk, nk_padded;
  T *kt, *vt;  // (d, BACK_KEYS) K^T * factor; (d_v, BACK_KEYS) V^T; pairs: words, no factor
  T factor, after = 1, q_factor = 1;  // of the logits (see logit_factors), of q when it is copied
  T* k;                               // (BACK_KEYS, ld) K * k_scale
  T *p, *ds, *dense;                  // (BACK_QUERIES, BACK_KEYS)
  // pairs: words of two queries (BACK_QUERIES / 2, BACK_KEYS); of two keys (BACK_QUERIES, BACK_KEYS
  // / 2), (BACK_KEYS / 2, ld); of two queries (BACK_QUERIES / 2, ld or ld_v)
  T *p_words, *ds_words, *ds_rows, *k_words, *q_words, *dout_words;
  T *bent, *keep;  // likewise: dS times the slope of the softcap, dropout's 0 or 1; or null
  T *q_copy, *dout_copy, *dk, *dv;
  T* dbias;          // (BACK_KEYS) if the bias is broadcast over queries
  index_t ld, ld_v;  // d, d_v rounded up to W
};

}  // namespace
}  // namespace fusedattn
