// What this machine can do at most, measured with the instructions that the kernels use: the bounds
// that benchmarks quote beside their times.
//
// Both measure the best instruction set of the CPU, whichever is in use, and take the GIL from
// nobody: the bindings release it first.
#pragma once

#include "kernel/task.h"

namespace fusedattn {

double measure_peak(DType dtype, int threads);  // multiply-add flops a second
double measure_bandwidth(int threads);          // bytes read a second

}  // namespace fusedattn
