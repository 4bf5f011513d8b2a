// One pool for attention and for NumPy's matrix products.
//
// Takes over no OpenBLAS that somebody else already serves, nor any where
// FUSEDATTN_SHARE_BLAS_THREADS=0 says so. The pool calls it once, before its first parallel loop.
#pragma once

namespace fusedattn {

// Hands our pool to every OpenBLAS in the process that lets a caller supply its threads. True if
// there was one.
bool share_with_blas();

}  // namespace fusedattn
