#include "bindings/messages.h"

namespace fusedattn {

void wrong_value(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

void wrong_type(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::type_error(name + ": expected " + expected + ", got " + got);
}

std::string text_of(const Shape& shape) {
  std::string s = "(";
  for (std::size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

std::string text_of(py::handle object) {
  return py::str(object).cast<std::string>();
}

std::string type_name(py::handle object) {
  return Py_TYPE(object.ptr())->tp_name;
}

std::string dtype_name(const py::array& a) {
  return text_of(a.dtype().attr("str")) + " (" + text_of(a.dtype()) + ")";
}

}  // namespace fusedattn
