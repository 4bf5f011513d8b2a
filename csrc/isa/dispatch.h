// Which instruction set: the best that this CPU runs, or the one that was asked for.
//
// Lists exactly the sets that CMakeLists.txt built, one line for each in dispatch.cpp. Beside it
// stands one file for each, which is the whole kernel compiled with the set's flags and exports a
// table of functions. Computes nothing and knows no kernel but by its table. Asked by the work
// division for each call, and by the bindings before they release the GIL, so that a wrong
// FUSEDATTN_ISA is an error and no surprise.
#pragma once

#include <string>
#include <vector>

#include "kernel/task.h"

namespace fusedattn {

// The kernels in use: the best that this CPU runs, or what FUSEDATTN_ISA names; throws
// std::invalid_argument if it names something unknown or unsupported.
const KernelTable& kernel_table();
void set_isa(const std::string& name);  // for tests; "" goes back to the default
bool isa_is_forced();                   // by either
const KernelTable& best_table();        // that this CPU runs

// The functions of an element type: the table's own, or those of its base.
const Kernels& kernels_in(const KernelTable& table, DType dtype);

std::vector<std::string> built_isas();      // worst first
std::vector<std::string> supported_isas();  // those that this CPU runs, worst first

}  // namespace fusedattn
