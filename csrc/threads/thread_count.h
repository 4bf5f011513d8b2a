// How many threads a call uses if it does not say.
//
// Reads the environment once, when the library is loaded; sets no variable and no number of
// OpenMP's. The bindings ask for every call.
#pragma once

namespace fusedattn {

// The default number of threads: set_num_threads, else FUSEDATTN_NUM_THREADS, else OpenMP's
// (OMP_NUM_THREADS), else the CPUs this process may run on. A limit set on OpenMP later
// (threadpoolctl) lowers all of them.
int get_num_threads();
void set_num_threads(int n);  // 0: back to the default

}  // namespace fusedattn
