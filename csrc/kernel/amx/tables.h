// What AMX offers: attention of float32 and the 16-bit types and float32's matrix products on
// tiles. The layers that multiply nothing are those of multiply-adds, compiled once more.
#pragma once

#include "kernel/amx/backward.h"
#include "kernel/amx/few.h"
#include "kernel/amx/forward.h"
#include "kernel/amx/product.h"
#include "kernel/tables.h"

namespace fusedattn {
namespace {

template <class E>
constexpr Kernels tiled_kernels{
    .query_block = LANES<float>,
    .sub_blocks = TASK_QUERIES / LANES<float>,
    .few_queries = TILED_FEW,
    .least_dims = PIECES<E> == 3 ? 80 : 0,
    .back_queries = TILED_BACK_QUERIES,
    .back_keys = TILED_BACK_KEYS,
    .forward_scratch = forward_scratch_on_tiles<E>,
    .forward = forward_on_tiles<E>,
    .few_scratch = few_scratch_on_tiles<E>,
    .forward_few = forward_few_on_tiles<E>,
    .delta = delta<E>,
    .visible_blocks = visible_blocks<TILED_BACK_QUERIES>,
    .backward_scratch = backward_scratch_on_tiles<E>,
    .backward = backward_on_tiles<E>,
    .round = round_rows<E>,
    .multiply_adds = PIECES<E> == 1 ? multiply_tiles_flops : multiply_adds<E>};

constexpr LayerKernels tiled_layer_kernels = [] {
  LayerKernels k = layer_kernels<float>;
  k.rows_at_once = 512;
  k.rows_together = k.panel = BAND;
  k.product_scratch = product_scratch_on_tiles;
  k.product = product_on_tiles;
  return k;
}();

// `base` has float64.
constexpr KernelTable tiled_table(const char* name, const KernelTable& base) {
  return {.name = name,
          .base = &base,
          .kernels = {&tiled_kernels<float>, nullptr, &tiled_kernels<Half>, &tiled_kernels<BFloat>},
          .read = read_stream,
          .layers = {&tiled_layer_kernels, nullptr}};
}

}  // namespace
}  // namespace fusedattn
