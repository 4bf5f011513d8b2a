// How backward is cut: a task is a block of keys of one key/value head, or a whole key/value head
// where heads are plenty; who owns what, and who waits for whom where several tasks add to the same
// elements.
//
// Neither the cut nor the number of threads changes a single bit, since what is added to is added
// in the same order either way. Computes no gradient. Made by backward.cpp, once for each call.
#pragma once

#include <memory>
#include <vector>

#include "attention/call.h"
#include "attention/tasks.h"

namespace fusedattn {

struct BackwardPlan {
  const Call& call;
  const Kernels& kernels;
  double flops;
  int threads;
  index_t group;     // query heads that share a key/value head
  bool shared_bias;  // several key/value heads or samples add to the same elements of dbias
  bool by_head;      // a task is a whole key/value head
  Numbering tasks;   // over samples
  Numbering blocks;  // over samples: blocks of queries of all query heads
  std::vector<Interval> visible;  // keys that a block of queries sees, numbered so, head 0's alone

  explicit BackwardPlan(const Call& c);

  struct Place {
    index_t b, kv, h, block;  // sample, key/value head, its first query head, block of keys
  };
  Place place(index_t task) const;
  index_t query_blocks(index_t b) const;  // of one head
  index_t key_blocks(index_t b) const;

  const Interval* visible_at(index_t b) const;
  Turns turns_of_dq(const Place& at) const;
  Turns turns_of_bias(index_t task, const Place& at) const;

 private:
  std::unique_ptr<int[]> dq_turns_;  // one for each of `blocks`; null: nobody else adds to dq
  std::unique_ptr<int[]>
      bias_turns_;             // one for each block of queries of the longest sample; or null
  std::vector<int> left_out_;  // numbered as `visible`, or empty; see Turns

  void divide();
  void take_turns();
};

}  // namespace fusedattn
