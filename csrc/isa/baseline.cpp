// Any CPU of the architecture: on x86-64 vectors of 16 bytes (SSE2), where a multiply-add is a
// product and a sum, each rounded; on 64-bit Arm what neon.cpp is.
#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_baseline;
constinit const KernelTable table_baseline = whole_table("baseline");

}  // namespace fusedattn
