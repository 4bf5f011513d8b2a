#include "kernel/amx/tables.h"

namespace fusedattn {

extern const KernelTable table_avx512, table_amx;
constinit const KernelTable table_amx = tiled_table("amx", table_avx512);

}  // namespace fusedattn
