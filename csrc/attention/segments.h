// Documents packed in one row: from segment numbers to the keys that each query may see.
//
// Numbers are taken as they come, in any order and of any size; whoever hands them over has seen to
// their shapes. Filled by the bindings, read by Call::rules for each head.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel/task.h"

namespace fusedattn {

// Segment numbers of one sample, and what follows from them (see Segments).
struct SegmentTable {
  std::vector<Interval> keys;
  std::vector<std::int32_t> q_number, k_number;  // empty: the intervals tell all

  SegmentTable(const index_t* q_ids, index_t sq, const index_t* k_ids, index_t sk);
  Segments view() const {
    return {keys.data(), q_number.empty() ? nullptr : q_number.data(), k_number.data()};
  }
};

}  // namespace fusedattn
