// AVX-512 that multiplies bfloat16 in pairs: attention of bfloat16. All else is avx512's.
#include "kernel/tables.h"

namespace fusedattn {

extern const KernelTable table_avx512, table_avx512bf16;
constinit const KernelTable table_avx512bf16 = bfloat16_table("avx512bf16", table_avx512);

}  // namespace fusedattn
