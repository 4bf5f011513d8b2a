// The work of an encoder's layers on whole arrays, divided over threads: one function a layer.
//
// The bits of a result do not depend on the division. Arguments are taken at their word, since the
// bindings have checked them, and every array is the caller's. Called with the GIL released.
#pragma once

#include "kernel/layer_task.h"
#include "threads/pool.h"

namespace fusedattn {

// How to run: float32 or float64, on how many threads.
struct Run {
  DType dtype;
  int threads;
  Loop& loop;
};

// All return false if interrupted. Throw std::bad_alloc.
bool run_product(const Run& run, const Product& p);
bool run_activate(const Run& run, const Product& p);  // c in place, by `then`
bool run_layer_norm(const Run& run, const LayerNorm& n, index_t rows);
bool run_layer_norm_backward(const Run& run, const LayerNormBackward& n, index_t rows);
bool run_adamw(const Run& run, const AdamW& a, index_t elements);
bool run_sum_of_squares(const Run& run, const void* x, index_t elements, double& sum);
bool run_log_sum_exp(const Run& run, const Softmax& s, index_t rows);
bool run_softmax_gradient(const Run& run, const Softmax& s, index_t rows);
bool run_gather(const Run& run, const Gather& g, index_t rows);
bool run_scatter(const Run& run, const Scatter& s, index_t sums);
bool run_drop_rows(const Run& run, const DropRows& d, index_t rows);

}  // namespace fusedattn
