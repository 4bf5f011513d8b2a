// The part of the module that computes attention: a request becomes arrays.
//
// Decides nothing about rules (request.cpp reads them) and computes nothing. Called by module.cpp
// once, when the module is imported.
#pragma once

#include "bindings/messages.h"

namespace fusedattn {

void bind_attention(py::module_& m);

}  // namespace fusedattn
