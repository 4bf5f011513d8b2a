// What one instruction set offers: the tables of functions that isa/NAME.cpp exports. The one place
// that lists them; isa/dispatch.cpp chooses among them.
#pragma once

#include "kernel/attention/backward.h"
#include "kernel/attention/delta.h"
#include "kernel/attention/few.h"
#include "kernel/attention/forward.h"
#include "kernel/layers/activations.h"
#include "kernel/layers/adamw.h"
#include "kernel/layers/dropout.h"
#include "kernel/layers/embedding.h"
#include "kernel/layers/layer_norm.h"
#include "kernel/layers/product.h"
#include "kernel/layers/softmax.h"
#include "kernel/layers/squares.h"
#include "kernel/vector/limits.h"

namespace fusedattn {
namespace {

inline constexpr int TASK_QUERIES = 512;  // of forward, which share the copies of K and V

// Attention of one element type.
template <class E>
constexpr Kernels kernels{.query_block = LANES<Compute<E>>,
                          .sub_blocks = TASK_QUERIES / LANES<Compute<E>>,
                          .few_queries = FEW,
                          .least_dims = 0,
                          .back_queries = BACK_QUERIES,
                          .back_keys = BACK_KEYS,
                          .forward_scratch = forward_scratch<E>,
                          .forward = forward<E>,
                          .few_scratch = few_scratch<E>,
                          .forward_few = forward_few<E>,
                          .delta = delta<E>,
                          .visible_blocks = visible_blocks<BACK_QUERIES>,
                          .backward_scratch = backward_scratch<E>,
                          .backward = backward<E>,
                          .round = round_rows<E>,
                          .multiply_adds = multiply_adds<E>};

// The encoder's layers in float32 or float64.
template <class T>
constexpr LayerKernels layer_kernels{.rows_at_once = 256,
                                     .rows_together = PRODUCT_ROWS,
                                     .panel = PANEL<T>,
                                     .product_scratch = product_scratch<T>,
                                     .product = product<T>,
                                     .activate = activate_rows<T>,
                                     .layer_norm = layer_norm<T>,
                                     .layer_norm_backward = layer_norm_backward<T>,
                                     .adamw = adamw<T>,
                                     .sum_of_squares = sum_of_squares<T>,
                                     .log_sum_exp = log_sum_exp<T>,
                                     .softmax_gradient = softmax_gradient<T>,
                                     .gather = gather<T>,
                                     .scatter = scatter<T>,
                                     .drop_rows = drop_rows<T>};

// Everything, by multiply-adds.
constexpr KernelTable whole_table(const char* name) {
  return {.name = name,
          .base = nullptr,
          .kernels = {&kernels<float>, &kernels<double>, &kernels<Half>, &kernels<BFloat>},
          .read = read_stream,
          .layers = {&layer_kernels<float>, &layer_kernels<double>}};
}

// bfloat16 alone, multiplied in pairs; `base` has the rest.
constexpr KernelTable bfloat16_table(const char* name, const KernelTable& base) {
  return {.name = name,
          .base = &base,
          .kernels = {nullptr, nullptr, nullptr, &kernels<BFloat>},
          .read = read_stream,
          .layers = {nullptr, nullptr}};
}

}  // namespace
}  // namespace fusedattn
