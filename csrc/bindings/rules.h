// The rules of a call by name: attributes of Python's Rules (fusedattn/_rules.py).
//
// Says nothing about what a rule means or which values it takes; request.cpp reads each where it is
// needed, and nobody else does but for what a gradient has to look like.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>

namespace fusedattn {

// A name as a template argument, so that its Python string is made once and then only compared.
template <std::size_t N> struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }
};

class RuleArguments {
 public:
  explicit RuleArguments(pybind11::handle rules) : rules_(rules) {}

  template <Name name> pybind11::object get() const {
    static PyObject* const interned = PyUnicode_InternFromString(name.text);
    PyObject* value = PyObject_GetAttr(rules_.ptr(), interned);
    if (!value) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  pybind11::handle rules_;
};

}  // namespace fusedattn
