#define FUSEDATTN_TABLE table_amx
#define FUSEDATTN_ISA_NAME "amx"
#define FUSEDATTN_BASE table_avx512
#define FUSEDATTN_VECTOR_BYTES 64
#define FUSEDATTN_REGISTERS 32
#define FUSEDATTN_AMX
#include "kernel/kernel.inl"
