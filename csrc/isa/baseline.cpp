#define FUSEDATTN_TABLE table_baseline
#define FUSEDATTN_ISA_NAME "baseline"
#define FUSEDATTN_VECTOR_BYTES 16
#define FUSEDATTN_REGISTERS 16
#include "kernel/kernel.inl"
