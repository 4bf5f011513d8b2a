// AVX2 with fused multiply-adds and conversions of float16: vectors of 32 bytes.
#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_avx2;
constinit const KernelTable table_avx2 = whole_table("avx2");

}  // namespace fusedattn
