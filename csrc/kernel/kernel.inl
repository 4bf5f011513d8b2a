// The one kernel source. isa/NAME.cpp sets the target (FUSEDATTN_TABLE, FUSEDATTN_VECTOR_BYTES,
// FUSEDATTN_REGISTERS) and includes this file; all of it has internal linkage, so that code
// compiled for one instruction set never runs for another.
#include "kernel/layer_task.h"
#include "kernel/task.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fusedattn {
namespace {

// clang-format off: each builds on those above it
#include "kernel/vec.inl"
#include "kernel/element.inl"
#include "kernel/exp.inl"
#include "kernel/tanh.inl"
#include "kernel/move.inl"
#include "kernel/pairs.inl"
#include "kernel/tile.inl"
#include "kernel/rules.inl"
#include "kernel/dropout.inl"
#include "kernel/forward_tiles.inl"
#include "kernel/dense.inl"
#include "kernel/dense_scores.inl"
#include "kernel/forward_pairs.inl"
#include "kernel/forward.inl"
#include "kernel/few_rows.inl"
#include "kernel/few.inl"
#include "kernel/backward_tiles.inl"
#include "kernel/backward_pairs.inl"
#include "kernel/backward.inl"
#include "kernel/limits.inl"
#include "kernel/elementwise.inl"
#include "kernel/product.inl"
#if defined(FUSEDATTN_AMX)
#include "kernel/amx.inl"
#include "kernel/amx_cut.inl"
#include "kernel/amx_beside.inl"
#include "kernel/forward_amx_scores.inl"
#include "kernel/forward_amx_block.inl"
#include "kernel/forward_amx_strips.inl"
#include "kernel/forward_amx_pipeline.inl"
#include "kernel/forward_amx.inl"
#include "kernel/few_amx_tiles.inl"
#include "kernel/few_amx.inl"
#include "kernel/product_amx.inl"
#include "kernel/backward_amx_sight.inl"
#include "kernel/backward_amx_cells.inl"
#include "kernel/backward_amx_odd.inl"
#include "kernel/backward_amx_block.inl"
#include "kernel/backward_amx.inl"
#endif
// clang-format on

inline constexpr int TASK_QUERIES = 512;  // of forward, which share the copies of K and V

template <class E>
constexpr Kernels kernels{LANES<Compute<E>>,
                          TASK_QUERIES / LANES<Compute<E>>,
                          FEW,
                          0,
                          BACK_QUERIES,
                          BACK_KEYS,
                          forward_scratch<E>,
                          forward<E>,
                          few_scratch<E>,
                          forward_few<E>,
                          delta<E>,
                          visible_blocks,
                          backward_scratch<E>,
                          backward<E>,
                          round_rows<E>,
                          multiply_adds<E>};

template <class T>
constexpr LayerKernels layer_kernels_of{256,
                                        PRODUCT_ROWS,
                                        PANEL<T>,
                                        product_scratch<T>,
                                        product<T>,
                                        activate_rows<T>,
                                        layer_norm<T>,
                                        layer_norm_backward<T>,
                                        adamw<T>,
                                        log_sum_exp<T>,
                                        softmax_gradient<T>,
                                        gather<T>,
                                        scatter<T>,
                                        drop_rows<T>};
#if defined(FUSEDATTN_AMX)
template <class E>
constexpr Kernels amx_kernels{LANES<float>,
                              TASK_QUERIES / LANES<float>,
                              FEW_AMX,
                              PIECES<E> == 3 ? 80 : 0,
                              BACK_QUERIES_AMX,
                              BACK_KEYS_AMX,
                              forward_scratch_amx<E>,
                              forward_amx<E>,
                              few_scratch_amx<E>,
                              forward_few_amx<E>,
                              delta<E>,
                              visible_blocks_amx,
                              backward_scratch_amx<E>,
                              backward_amx<E>,
                              round_rows<E>,
                              PIECES<E> == 1 ? multiply_tiles_flops : multiply_adds<E>};
constexpr LayerKernels layer_kernels_amx = [] {
  LayerKernels k = layer_kernels_of<float>;
  k.rows_at_once = 512;
  k.rows_together = k.panel = BAND;
  k.product_scratch = product_amx_scratch;
  k.product = product_amx;
  return k;
}();
#endif

}  // namespace

// Initialised at compile time: loading the library must not run code of this instruction set.
#if defined(FUSEDATTN_AMX)
extern const KernelTable FUSEDATTN_BASE, FUSEDATTN_TABLE;
constinit const KernelTable FUSEDATTN_TABLE{
    FUSEDATTN_ISA_NAME,
    &FUSEDATTN_BASE,
    {&amx_kernels<float>, nullptr, &amx_kernels<Half>, &amx_kernels<BFloat>},
    read_stream,
    {&layer_kernels_amx, nullptr}};
#elif defined(FUSEDATTN_BASE)
extern const KernelTable FUSEDATTN_BASE, FUSEDATTN_TABLE;
constinit const KernelTable FUSEDATTN_TABLE{FUSEDATTN_ISA_NAME,
                                            &FUSEDATTN_BASE,
                                            {nullptr, nullptr, nullptr, &kernels<BFloat>},
                                            read_stream,
                                            {nullptr, nullptr}};
#else
extern const KernelTable FUSEDATTN_TABLE;
constinit const KernelTable FUSEDATTN_TABLE{
    FUSEDATTN_ISA_NAME,
    nullptr,
    {&kernels<float>, &kernels<double>, &kernels<Half>, &kernels<BFloat>},
    read_stream,
    {&layer_kernels_of<float>, &layer_kernels_of<double>}};
#endif

}  // namespace fusedattn
