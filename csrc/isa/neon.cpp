#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_neon;
constinit const KernelTable table_neon = whole_table("neon");

}  // namespace fusedattn
