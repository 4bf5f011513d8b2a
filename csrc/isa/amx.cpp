// AMX: attention of float32 and 16-bit types and float32's products on tiles. float64 is avx512's.
#include "kernel/amx/tables.h"

namespace fusedattn {

extern const KernelTable table_avx512, table_amx;
constinit const KernelTable table_amx = tiled_table("amx", table_avx512);

}  // namespace fusedattn
