#include "attention/packed_queries.h"

#include <cstring>

#include "attention/tasks.h"

namespace fusedattn {
namespace {

bool is_crowded(const Tensor& t, index_t size) {
  return t.col == size && t.row != 0 && t.row % 4096 == 0;
}

Matrix copy_rows(const Matrix& m, index_t rows, index_t bytes, index_t size, char* to) {
  for (index_t r = 0; r < rows; r++) {
    for (index_t ahead = 0; ahead < bytes && r + 8 < rows; ahead += 64)
      __builtin_prefetch(m.data + (r + 8) * m.row + ahead);
    std::memcpy(to + r * bytes, m.data + r * m.row, std::size_t(bytes));
  }
  return {to, bytes, size};
}

}  // namespace

PackedQueries::PackedQueries(const Call& c, index_t sq, bool worth)
    : size(is_narrow(c.dtype) ? 2 : compute_size(c.dtype)),
      q_bytes(sq * c.d * size),
      dout_bytes(sq * c.d_v * size),
      dq_bytes(c.dq.data ? sq * c.d * size : 0),
      used(worth && !is_narrow(c.dtype) && is_crowded(c.q, size) && is_crowded(c.dout, size)) {}

void PackedQueries::lay_out(char* memory, index_t group) {
  q = memory;
  dout = q + group * q_bytes;
  dq = dout + group * dout_bytes;
}

PackedQueries::Rows PackedQueries::copy(const Call& c, index_t b, index_t h, index_t g) const {
  const index_t sq = c.sq[std::size_t(b)], row = c.d * size;
  copy_rows(c.q.at(b, h), sq, row, size, q + g * q_bytes);
  return {copy_rows(c.dout.at(b, h), sq, c.d_v * size, size, dout + g * dout_bytes),
          {c.dq.data ? dq + g * dq_bytes : nullptr, row, size}};
}

void PackedQueries::give_to(const Call& c, BackwardHead& head) const {
  head.q = {q, c.d * size, size};
  head.dout = {dout, c.d_v * size, size};
  head.dq = {c.dq.data ? dq : nullptr, c.d * size, size};
  head.q_head = q_bytes;
  head.dout_head = dout_bytes;
  head.dq_head = dq_bytes;
}

}  // namespace fusedattn
