#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_avx2;
constinit const KernelTable table_avx2 = whole_table("avx2");

}  // namespace fusedattn
