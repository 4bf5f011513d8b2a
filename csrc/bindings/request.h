// Python arguments become a Call: every argument checked in order, by name.
//
// Allocates no result and computes nothing. Called by attention.cpp, once for each call.
#pragma once

#include <vector>

#include "attention/call.h"
#include "bindings/rules.h"
#include "bindings/views.h"

namespace fusedattn {

// The shapes of one call, and the call with its inputs filled in.
struct Request {
  Call call;
  py::array q, k, v;  // kept alive
  std::vector<py::array> others;
  py::dtype dtype, lse_dtype;
  Shape lead, out_shape, lse_shape, scores;  // scores: what masks and biases broadcast to
  Axes q_axes, k_axes;
  std::vector<Shape> segment_rows[2];  // possible shapes of the segment ids of queries and of keys
};

// Every sample has the same lengths.
Request rectangular(py::handle q, py::handle k, py::handle v, const RuleArguments& rules,
                    py::handle layout, py::handle num_threads);

// Sample b is rows [cu[b], cu[b + 1]) of (T, H, D).
Request packed(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens_q,
               py::handle cu_seqlens_k, const RuleArguments& rules, py::handle num_threads);

// Keys and values in pages: sample b's key j is row j % page_size of page block_table[b, j /
// page_size].
Request paged(py::handle q, py::handle k, py::handle v, py::handle block_table,
              const RuleArguments& rules, py::handle layout, py::handle num_threads);

}  // namespace fusedattn
