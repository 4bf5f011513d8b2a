// 64-bit Arm: vectors of 16 bytes, fused multiply-adds.
#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_neon;
constinit const KernelTable table_neon = whole_table("neon");

}  // namespace fusedattn
