// The part of the module that the encoder's layers use.
#pragma once

#include "numpy_view.h"

namespace fusedattn {

void bind_layers(py::module_& m);

}  // namespace fusedattn
