// AVX-512 (F, DQ, BW, VL): vectors of 64 bytes, twice as many registers.
#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_avx512;
constinit const KernelTable table_avx512 = whole_table("avx512");

}  // namespace fusedattn
