// Copies of a head's queries for a task that reads them once for each block of keys.
//
// Rows a multiple of 4096 bytes apart share a few sets of the caches and drive each other out.
// Where q and dout lie so, backward.cpp copies them first, and adds up dq beside them. Not for
// 16-bit types, whose dq has sums of its own, nor for queries that are read once.
#pragma once

#include "attention/call.h"

namespace fusedattn {

struct PackedQueries {
  index_t size;                           // of an element
  index_t q_bytes, dout_bytes, dq_bytes;  // of a query head
  bool used;
  char *q = nullptr, *dout = nullptr, *dq = nullptr;  // head after head

  PackedQueries(const Call& c, index_t sq, bool worth);

  index_t bytes() const { return used ? q_bytes + dout_bytes + dq_bytes : 0; }  // of a query head
  void lay_out(char* memory, index_t group);                                    // group * bytes()

  // Query head h, the g-th of its group: copies its rows; what is returned are its dout and dq.
  struct Rows {
    Matrix dout, dq;
  };
  Rows copy(const Call& c, index_t b, index_t h, index_t g) const;
  void give_to(const Call& c, BackwardHead& head) const;  // the kernel reads the copies
};

}  // namespace fusedattn
