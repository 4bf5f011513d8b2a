// The part of the module that the encoder's layers use: arrays in, arrays that the caller allocated
// out.
//
// Allocates no array. Bound by module.cpp once; only fusedattn.nn, fusedattn.losses and
// fusedattn.optim call what it binds.
#pragma once

#include "bindings/messages.h"

namespace fusedattn {

void bind_layers(py::module_& m);

}  // namespace fusedattn
