#include "attention/statistics.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fusedattn {

double key_scale(const Call& c) {
  if (is_ordinary(c.scale)) return c.scale;
  const int most = c.dtype == DType::float64 ? 510 : 62;
  return std::ldexp(1.0, std::clamp(std::ilogb(c.scale) / 2, -most, most));
}

// dq has sums of its own in 16-bit types, which would round each, and where a part of the scale is
// still to come.
Statistics::Statistics(const Call& c) {
  const index_t size = compute_size(c.dtype);
  index_t elements = 0;
  for (std::size_t b = 0; b < std::size_t(c.batch); b++)
    elements = std::max(elements, c.lse_batch[b] + (c.heads - 1) * c.lse_head + c.sq[b]);
  data = std::make_unique_for_overwrite<char[]>(std::size_t(2 * elements * size));
  lse2 = data.get();
  delta = data.get() + elements * size;
  dq = c.dq;
  if (c.dq.data && (is_narrow(c.dtype) || !is_ordinary(c.scale))) {
    dq_data = std::make_unique_for_overwrite<char[]>(std::size_t(elements * c.d * size));
    dq = {dq_data.get(), {}, c.lse_head * c.d * size, c.d * size, size};
    for (const index_t o : c.lse_batch) dq.batch.push_back(o * c.d * size);
  }
}

void Statistics::compute(const Call& c, const Kernels& kernels, index_t b, index_t h, index_t begin,
                         index_t end, const Matrix& dout, const Matrix& head_dq) const {
  const index_t size = compute_size(c.dtype),
                at = (c.lse_batch[std::size_t(b)] + h * c.lse_head) * size;
  const Matrix dlse = c.dlse.at(b, h);
  kernels.delta(
      {c.out.at(b, h), dout, c.lse + at, dlse.data, dlse.row, lse2 + at, delta + at, c.d_v}, begin,
      end);
  if (head_dq.data)
    for (index_t q = begin; q < end; q++)
      std::memset(head_dq.data + q * head_dq.row, 0, std::size_t(c.d * size));
}

namespace {
// exp(x), relative error below 2e-16, of operations that IEEE 754 defines: std::exp depends on the
// library and on the CPU. x = n log(2) + r; a Taylor polynomial for r, |r| < 0.35. What is below
// the smallest normal number is 0, as in the kernels.
double exponential(double x) {
  if (x < -708) return 0;
  if (!(x < 709)) return x * INFINITY;  // NaN stays
  constexpr double log2_e = 1.4426950408889634, ln2_high = 0x1.62e42fefap-1,
                   ln2_low = 0x1.cf79abc9e3b3ap-40, to_integer = 0x1.8p52;
  constexpr auto taylor = [] {
    std::array<double, 14> c{1};
    for (std::size_t i = 1; i < c.size(); i++) c[i] = c[i - 1] / double(i);
    return c;
  }();
  const double n = x * log2_e + to_integer - to_integer, r = x - n * ln2_high - n * ln2_low;
  double p = 0;
  for (std::size_t i = taylor.size(); i-- > 0;) p = p * r + taylor[i];
  return p * std::bit_cast<double>(std::int64_t(n + 1023) << 52);
}

// The sink's probability times its share of the softmax's gradient; samples and queries in order.
template <class T> double sink_gradient_of(const Call& c, const char* deltas, index_t h) {
  double sum = 0;
  for (index_t b = 0; b < c.batch; b++) {
    const index_t at = c.lse_batch[std::size_t(b)] + h * c.lse_head;
    const T *lse = reinterpret_cast<const T*>(c.lse) + at,
            *delta = reinterpret_cast<const T*>(deltas) + at;
    for (index_t q = 0; q < c.sq[std::size_t(b)]; q++)
      if (!(std::isinf(lse[q]) && lse[q] < 0))  // a query that sees no key sees no sink
        sum -= exponential(c.sinks[std::size_t(h)] - double(lse[q])) * double(delta[q]);
  }
  return sum;
}
}  // namespace

double Statistics::sink_gradient(const Call& c, index_t h) const {
  return c.dtype == DType::float64 ? sink_gradient_of<double>(c, delta, h)
                                   : sink_gradient_of<float>(c, delta, h);
}

}  // namespace fusedattn
