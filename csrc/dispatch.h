// Which instruction set: one line for each in dispatch.cpp.
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

std::vector<std::string> built_isas();      // worst first
std::vector<std::string> supported_isas();  // those that this CPU runs, worst first

}  // namespace fusedattn
