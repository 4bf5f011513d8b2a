#define FUSEDATTN_TABLE table_neon
#define FUSEDATTN_ISA_NAME "neon"
#define FUSEDATTN_VECTOR_BYTES 16
#define FUSEDATTN_REGISTERS 32
#include "kernel/kernel.inl"
