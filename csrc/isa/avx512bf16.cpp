#define FUSEDATTN_TABLE table_avx512bf16
#define FUSEDATTN_ISA_NAME "avx512bf16"
#define FUSEDATTN_BASE table_avx512
#define FUSEDATTN_VECTOR_BYTES 64
#define FUSEDATTN_REGISTERS 32
#include "kernel/kernel.inl"
