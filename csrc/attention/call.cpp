#include "attention/call.h"

#include <limits>

namespace fusedattn {

Rules Call::rules(index_t b, index_t h) const {
  const std::size_t i = std::size_t(b), head = std::size_t(h);
  Rules r{};
  r.q_offset = q_offset[i];
  r.left = left;
  r.right = right;
  r.q_length = q_length[i];
  r.kv_length = kv_length[i];
  if (!segments.empty()) r.segments = segments[i].view();
  r.mask = mask.at(b, h);
  r.bias = bias.at(b, h);
  r.softcap = softcap;
  r.alibi_slope = alibi_slopes.empty() ? 0.0 : alibi_slopes[i * std::size_t(heads) + head];
  r.sink = sinks.empty() ? -std::numeric_limits<double>::infinity() : sinks[head];
  r.dropout = dropout;
  r.dropout.batch = std::uint32_t(b);
  r.dropout.head = std::uint32_t(h);
  return r;
}

}  // namespace fusedattn
