// One pool for attention and for NumPy's matrix products.
#pragma once

namespace fusedattn {

// Hands our pool to every OpenBLAS in the process that lets a caller supply its threads. True if
// there was one.
bool share_with_blas();

}  // namespace fusedattn
