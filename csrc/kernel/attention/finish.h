// What the sums of forward become: outputs and log-sum-exps. Called once for each sub-block or row,
// on multiply-adds and on tiles.
#pragma once

#include "kernel/attention/queries.h"
#include "kernel/vector/exp.h"

namespace fusedattn {
namespace {

// What the sums become: the factor of the output, and the log-sum-exp. A sink joins the sum.
// Nothing summed: either no key was allowed (0 and -inf), or every allowed logit was -inf (the
// softmax of -inf is NaN). `rounded` is the sum that the output belongs to, `sink` in log2 units,
// `scale` that of dropout.
template <class T> struct Finished {
  Vec<T> factor, lse;
};
template <class T>
FA_INLINE Finished<T> finished(Vec<T> max, Vec<T> sum, Vec<T> rounded, Vec<T> seen, Vec<T> sink,
                               T scale) {
  const Vec<T> zero{}, nan = splat(T(__builtin_nan("")));
  const Vec<T> top = max_or_second<T>(sink, max), rescale = exp2<T>(max - top),
               sink_weight = exp2<T>(sink - top), total = fma<T>(sum, rescale, sink_weight);
  const Vec<T> lse = (top + log2_positive<T>(total)) * splat(T(LN2));
  const Vec<T> factor = rescale / fma<T>(rounded, rescale, sink_weight) * splat(scale);
  return {seen == zero    ? zero
          : total == zero ? nan
                          : factor,
          seen == zero    ? splat(-Bits<T>::infinity)
          : total == zero ? nan
                          : lse};
}

// The factors of x's outputs, and its log-sum-exps.
template <class T> FA_NOINLINE void finish_sums(const ForwardHead& h, Queries<T>& x, T* factor) {
  alignas(64) T lse[LANES<T>];
  for (int j = 0; j < x.vectors; j++) {
    const index_t at = j * W<T>;
    const Finished<T> f =
        finished<T>(load(x.max + at), load(x.sum + at), load(x.total + at), load(x.seen + at),
                    splat(T(h.rules.sink * LOG2E)), T(h.rules.dropout.scale));
    store(factor + at, f.factor);
    store(lse + at, f.lse);
  }
  __builtin_memcpy(static_cast<T*>(h.lse) + x.first, lse, size_t(x.count) * sizeof(T));
}
template <class E, class T = Compute<E>>
FA_NOINLINE void finish(const ForwardHead& h, Queries<T>& x) {
  alignas(64) T factor[LANES<T>];
  finish_sums(h, x, factor);
  unpack_transposed<E>(x.o, x.vectors * W<T>, factor, h.out, x.first, x.count, h.d_v);
}

}  // namespace
}  // namespace fusedattn
