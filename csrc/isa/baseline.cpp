#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_baseline;
constinit const KernelTable table_baseline = whole_table("baseline");

}  // namespace fusedattn
