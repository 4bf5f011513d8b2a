#include "bindings/numbers.h"

#include <algorithm>
#include <cmath>

#include "bindings/views.h"
#include "threads/thread_count.h"

namespace fusedattn {

std::vector<index_t> integers_of(const char* name, py::handle object, const Shape& lead,
                                 index_t batch) {
  if (PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr())) {
    const long long x = PyLong_AsLongLong(object.ptr());
    if (x == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      wrong_value(name, "an integer of 64 bits", text_of(object));
    }
    return std::vector<index_t>(std::size_t(batch), x);
  }
  const py::array a = py::module_::import("numpy").attr("asarray")(object);
  if (a.dtype().kind() != 'i' && a.dtype().kind() != 'u')
    wrong_type(name, "an integer or an array of integers",
               py::isinstance<py::array>(object) ? dtype_name(a) : type_name(object));
  const Shape shape = shape_of(a);
  if (shape.empty()) return integers_of(name, py::object(a.attr("item")()), lead, batch);
  if (shape != lead && shape != Shape{batch})
    wrong_value(name, "an integer or shape " + text_of(lead.empty() ? Shape{batch} : lead),
                "shape " + text_of(shape));
  const auto values = py::array_t<index_t, py::array::c_style | py::array::forcecast>(a);
  return std::vector<index_t>(values.data(), values.data() + values.size());
}

void window_of(py::handle object, Call& c) {
  if (object.is_none()) return;
  const std::string expected = "None or (left, right), two integers of at least -1";
  if (!PySequence_Check(object.ptr()) || py::isinstance<py::str>(object) || py::len(object) != 2)
    wrong_value("window", expected, text_of(py::repr(object)));
  const auto side = [&](py::object x) -> index_t {
    if (!PyIndex_Check(x.ptr()) || PyBool_Check(x.ptr()))
      wrong_type("window", expected, text_of(py::repr(object)));
    int beyond = 0;  // 64 bits
    const long long n = PyLong_AsLongLongAndOverflow(py::int_(x).ptr(), &beyond);
    if (beyond < 0 || (beyond == 0 && n < -1))
      wrong_value("window", expected, text_of(py::repr(object)));
    return beyond > 0 || n < 0 ? UNBOUNDED : std::min<index_t>(n, UNBOUNDED);
  };
  const auto sides = py::reinterpret_borrow<py::sequence>(object);
  c.left = side(sides[0]);
  c.right = side(sides[1]);
}

double finite_number(const char* name, py::handle object) {
  const double x = PyFloat_AsDouble(object.ptr());
  if (x == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    wrong_type(name, "a number", type_name(object));
  }
  if (!std::isfinite(x))
    wrong_value(name, "a finite number", std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf");
  return x;
}

std::vector<double> numbers_of(const char* name, py::handle object,
                               const std::vector<Shape>& shapes) {
  const py::array a = array_of(name, object);
  if (a.dtype().kind() != 'f' && dtype_name(a).find("bfloat16") == std::string::npos)
    wrong_type(name, "an array of floating-point numbers", dtype_name(a));
  check_shape(name, a, shapes);
  const auto values = py::array_t<double, py::array::c_style | py::array::forcecast>(a);
  return std::vector<double>(values.data(), values.data() + values.size());
}

std::vector<index_t> ids_of(const char* name, py::handle object, const std::vector<Shape>& shapes) {
  const py::array a = array_of(name, object);
  if (a.dtype().kind() != 'i' && a.dtype().kind() != 'u')
    wrong_type(name, "an array of integers", dtype_name(a));
  check_shape(name, a, shapes);
  const auto values = py::array_t<index_t, py::array::c_style | py::array::forcecast>(a);
  return std::vector<index_t>(values.data(), values.data() + values.size());
}

std::uint64_t seed_of(py::handle object) {
  const std::string expected = "an integer from 0 to 2**64 - 1";
  if (!PyIndex_Check(object.ptr()) || PyBool_Check(object.ptr()))
    wrong_type("seed", expected + " where dropout_p is not 0", type_name(object));
  const py::int_ number(py::reinterpret_borrow<py::object>(object));
  const unsigned long long seed = PyLong_AsUnsignedLongLong(number.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    wrong_value("seed", expected, text_of(object));
  }
  return seed;
}

bool is_bshd(py::handle layout) {
  if (!py::isinstance<py::str>(layout)) wrong_type("layout", "'bhsd' or 'bshd'", type_name(layout));
  const auto text = layout.cast<std::string>();
  if (text != "bhsd" && text != "bshd") wrong_value("layout", "'bhsd' or 'bshd'", "'" + text + "'");
  return text == "bshd";
}

bool truth_of(const char* name, py::handle object) {
  if (object.ptr() == Py_True || object.ptr() == Py_False) return object.ptr() == Py_True;
  if (type_name(object).find("numpy.bool") != 0)
    wrong_type(name, "True or False", type_name(object));
  return PyObject_IsTrue(object.ptr()) == 1;
}

int threads_of(py::handle object) {
  if (object.is_none()) return get_num_threads();
  const long long n =
      PyLong_Check(object.ptr()) || PyIndex_Check(object.ptr())
          ? PyLong_AsLongLong(py::int_(py::reinterpret_borrow<py::object>(object)).ptr())
          : 0;
  if (!PyIndex_Check(object.ptr()))
    wrong_type("num_threads", "a positive integer or None", type_name(object));
  if (n < 1 || n > 65535)
    wrong_value("num_threads", "an integer from 1 to 65535", std::to_string(n));
  return int(n);
}

}  // namespace fusedattn
