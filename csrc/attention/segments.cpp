// One pass over the keys finds where each number lies, one over the queries looks its own up.
#include "attention/segments.h"

#include <unordered_map>

namespace fusedattn {

SegmentTable::SegmentTable(const index_t* q_ids, index_t sq, const index_t* k_ids, index_t sk) {
  struct Run {
    Interval keys;
    index_t count;
    std::int32_t number;
  };
  std::unordered_map<index_t, Run> runs;
  Run* last = nullptr;
  bool scattered = false;
  for (index_t j = 0; j < sk; j++) {
    if (j == 0 || k_ids[j] != k_ids[j - 1])
      last = &runs.try_emplace(k_ids[j], Run{{j, j}, 0, std::int32_t(runs.size())}).first->second;
    last->keys.high = j + 1;
    last->count++;
  }
  for (const auto& [id, run] : runs) scattered |= run.count != run.keys.high - run.keys.low;
  keys.reserve(std::size_t(sq));
  const Run nowhere{{0, 0}, 0, -1};
  const Run* own = &nowhere;
  for (index_t i = 0; i < sq; i++) {
    if (i == 0 || q_ids[i] != q_ids[i - 1]) {
      const auto found = runs.find(q_ids[i]);
      own = found == runs.end() ? &nowhere : &found->second;
    }
    keys.push_back(own->keys);
    if (scattered) q_number.push_back(own->number);
  }
  if (scattered)
    for (index_t j = 0; j < sk; j++) k_number.push_back(runs.at(k_ids[j]).number);
}

}  // namespace fusedattn
