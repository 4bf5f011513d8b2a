#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_avx512;
constinit const KernelTable table_avx512 = whole_table("avx512");

}  // namespace fusedattn
