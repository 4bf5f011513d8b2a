#define FUSEDATTN_TABLE table_avx2
#define FUSEDATTN_ISA_NAME "avx2"
#define FUSEDATTN_VECTOR_BYTES 32
#define FUSEDATTN_REGISTERS 16
#include "kernel/kernel.inl"
