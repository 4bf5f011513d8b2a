// Errors about arguments: every message names the argument, what was expected and what came.
//
// Every TypeError and ValueError of the core is raised through these, before anything is written.
// Called by the other files of this folder.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "kernel/task.h"

namespace fusedattn {

namespace py = pybind11;

using Shape = std::vector<index_t>;

[[noreturn]] void wrong_value(const std::string& name, const std::string& expected,
                              const std::string& got);
[[noreturn]] void wrong_type(const std::string& name, const std::string& expected,
                             const std::string& got);

std::string text_of(const Shape& shape);     // "(2, 3)"
std::string text_of(py::handle object);      // str(object)
std::string type_name(py::handle object);    // "list"
std::string dtype_name(const py::array& a);  // "<f4 (float32)"

}  // namespace fusedattn
