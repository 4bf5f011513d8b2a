// From Python objects to strided views: the one place for boundary errors. Every message names the
// argument, what was expected and what came.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"

namespace fusedattn {

namespace py = pybind11;

using Shape = std::vector<index_t>;

inline std::string text_of(const Shape& shape) {
  std::string s = "(";
  for (std::size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

inline Shape join(Shape shape, index_t last) {
  shape.push_back(last);
  return shape;
}

[[noreturn]] inline void wrong_value(const std::string& name, const std::string& expected,
                                     const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}
[[noreturn]] inline void wrong_type(const std::string& name, const std::string& expected,
                                    const std::string& got) {
  throw py::type_error(name + ": expected " + expected + ", got " + got);
}
inline std::string type_name(py::handle object) {
  return Py_TYPE(object.ptr())->tp_name;
}

// An array as it is: NumPy arrays themselves, others through __array__ or DLPack, never copied
// here.
inline py::array array_of(const char* name, py::handle object) {
  if (py::isinstance<py::array>(object)) return py::reinterpret_borrow<py::array>(object);
  const auto numpy = py::module_::import("numpy");
  if (py::hasattr(object, "__array__")) return numpy.attr("asarray")(object);
  if (py::hasattr(object, "__dlpack__")) return numpy.attr("from_dlpack")(object);
  wrong_type(name, "an array (NumPy's, or an object with __array__ or DLPack on the CPU)",
             type_name(object));
}

inline std::string dtype_name(const py::array& a) {
  return py::str(a.dtype().attr("str")).cast<std::string>() + " (" +
         py::str(a.dtype()).cast<std::string>() + ")";
}

inline DType dtype_of(const char* name, const py::array& a) {
  const py::dtype t = a.dtype();
  const bool native = t.byteorder() == '=' || t.byteorder() == '|';
  if (t.kind() == 'f' && native && t.itemsize() == 4) return DType::float32;
  if (t.kind() == 'f' && native && t.itemsize() == 8) return DType::float64;
  if (t.kind() == 'f' && native && t.itemsize() == 2) return DType::float16;
  if (native && t.itemsize() == 2 && py::str(t).cast<std::string>() == "bfloat16")
    return DType::bfloat16;
  wrong_type(name, "native-endian float32, float64, float16 or bfloat16 (ml_dtypes)",
             dtype_name(a));
}

inline Shape shape_of(const py::array& a) {
  return Shape(a.shape(), a.shape() + a.ndim());
}

// Axes of (..., H, S, D) in an array of n dimensions; -1 where a missing head axis counts as 1.
struct Axes {
  int head, row, col;
};
inline Axes axes_of(bool bshd, int n) {
  if (n == 2) return {-1, 0, 1};
  return bshd ? Axes{n - 2, n - 3, n - 1} : Axes{n - 3, n - 2, n - 1};
}

// Offsets in bytes of the samples: all combinations of the first `lead` axes, last one fastest; a
// zero stride broadcasts.
inline std::vector<index_t> batch_offsets(const Shape& lead, const std::vector<index_t>& strides) {
  std::vector<index_t> offsets{0};
  for (std::size_t axis = 0; axis < lead.size(); axis++) {
    std::vector<index_t> next;
    next.reserve(offsets.size() * std::size_t(lead[axis]));
    for (const index_t o : offsets)
      for (index_t i = 0; i < lead[axis]; i++) next.push_back(o + i * strides[axis]);
    offsets = std::move(next);
  }
  return offsets;
}

inline Tensor tensor_of(const py::array& a, Axes axes) {
  Tensor t;
  const int lead = std::max(0, int(a.ndim()) - 3);
  t.data = static_cast<char*>(const_cast<void*>(a.data()));
  t.batch = batch_offsets(Shape(a.shape(), a.shape() + lead),
                          std::vector<index_t>(a.strides(), a.strides() + lead));
  t.head = axes.head < 0 ? 0 : index_t(a.strides(axes.head));
  t.row = index_t(a.strides(axes.row));
  t.col = index_t(a.strides(axes.col));
  return t;
}

// A mask or bias that broadcasts, as NumPy does, to `full` = (..., H, Sq, Sk).
inline Tensor broadcast_tensor(const char* name, const py::array& a, const Shape& full) {
  const std::size_t n = full.size(), own = std::size_t(a.ndim());
  std::vector<index_t> strides(n, 0);
  bool fits = own <= n;
  for (std::size_t i = 0; fits && i < own; i++) {
    const index_t size = index_t(a.shape(i)), want = full[n - own + i];
    fits = size == want || size == 1;
    strides[n - own + i] = size == 1 ? 0 : index_t(a.strides(i));
  }
  if (!fits) wrong_value(name, "a shape that broadcasts to " + text_of(full), text_of(shape_of(a)));
  Tensor t;
  const std::size_t lead = n < 3 ? 0 : n - 3;
  t.data = static_cast<char*>(const_cast<void*>(a.data()));
  t.batch = batch_offsets(Shape(full.begin(), full.begin() + index_t(lead)), strides);
  t.head = n < 3 ? 0 : strides[n - 3];
  t.row = strides[n - 2];
  t.col = strides[n - 1];
  return t;
}

// Integers, one for each sample: a number, or an integer array of shape `lead` (or (batch,)).
inline std::vector<index_t> integers_of(const char* name, py::handle object, const Shape& lead,
                                        index_t batch) {
  if (PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr())) {
    const long long x = PyLong_AsLongLong(object.ptr());
    if (x == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      wrong_value(name, "an integer of 64 bits", py::str(object).cast<std::string>());
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

// None, or (left, right): how many keys before and after its own position a query sees; -1 is no
// end.
inline void window_of(py::handle object, Call& c) {
  if (object.is_none()) return;
  const std::string expected = "None or (left, right), two integers of at least -1";
  if (!PySequence_Check(object.ptr()) || py::isinstance<py::str>(object) || py::len(object) != 2)
    wrong_value("window", expected, py::repr(object).cast<std::string>());
  const auto side = [&](py::object x) -> index_t {
    if (!PyIndex_Check(x.ptr()) || PyBool_Check(x.ptr()))
      wrong_type("window", expected, py::repr(object).cast<std::string>());
    int beyond = 0;  // 64 bits
    const long long n = PyLong_AsLongLongAndOverflow(py::int_(x).ptr(), &beyond);
    if (beyond < 0 || (beyond == 0 && n < -1))
      wrong_value("window", expected, py::repr(object).cast<std::string>());
    return beyond > 0 || n < 0 ? UNBOUNDED : std::min<index_t>(n, UNBOUNDED);
  };
  const auto sides = py::reinterpret_borrow<py::sequence>(object);
  c.left = side(sides[0]);
  c.right = side(sides[1]);
}

inline double finite_number(const char* name, py::handle object) {
  const double x = PyFloat_AsDouble(object.ptr());
  if (x == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    wrong_type(name, "a number", type_name(object));
  }
  if (!std::isfinite(x))
    wrong_value(name, "a finite number", std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf");
  return x;
}

// An array of one of the given shapes.
inline void check_shape(const char* name, const py::array& a, const std::vector<Shape>& shapes) {
  if (std::find(shapes.begin(), shapes.end(), shape_of(a)) != shapes.end()) return;
  std::string expected = "shape " + text_of(shapes[0]);
  for (std::size_t i = 1; i < shapes.size(); i++)
    if (shapes[i] != shapes[i - 1]) expected += " or " + text_of(shapes[i]);
  wrong_value(name, expected, "shape " + text_of(shape_of(a)));
}

// Floating-point numbers in an array of one of the given shapes, C order.
inline std::vector<double> numbers_of(const char* name, py::handle object,
                                      const std::vector<Shape>& shapes) {
  const py::array a = array_of(name, object);
  if (a.dtype().kind() != 'f' && dtype_name(a).find("bfloat16") == std::string::npos)
    wrong_type(name, "an array of floating-point numbers", dtype_name(a));
  check_shape(name, a, shapes);
  const auto values = py::array_t<double, py::array::c_style | py::array::forcecast>(a);
  return std::vector<double>(values.data(), values.data() + values.size());
}

// Integers in an array of one of the given shapes, C order.
inline std::vector<index_t> ids_of(const char* name, py::handle object,
                                   const std::vector<Shape>& shapes) {
  const py::array a = array_of(name, object);
  if (a.dtype().kind() != 'i' && a.dtype().kind() != 'u')
    wrong_type(name, "an array of integers", dtype_name(a));
  check_shape(name, a, shapes);
  const auto values = py::array_t<index_t, py::array::c_style | py::array::forcecast>(a);
  return std::vector<index_t>(values.data(), values.data() + values.size());
}

// The seed of dropout, an integer of 64 bits without sign.
inline std::uint64_t seed_of(py::handle object) {
  const std::string expected = "an integer from 0 to 2**64 - 1";
  if (!PyIndex_Check(object.ptr()) || PyBool_Check(object.ptr()))
    wrong_type("seed", expected + " where dropout_p is not 0", type_name(object));
  const py::int_ number(py::reinterpret_borrow<py::object>(object));
  const unsigned long long seed = PyLong_AsUnsignedLongLong(number.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    wrong_value("seed", expected, py::str(object).cast<std::string>());
  }
  return seed;
}

inline bool is_bshd(py::handle layout) {
  if (!py::isinstance<py::str>(layout)) wrong_type("layout", "'bhsd' or 'bshd'", type_name(layout));
  const auto text = layout.cast<std::string>();
  if (text != "bhsd" && text != "bshd") wrong_value("layout", "'bhsd' or 'bshd'", "'" + text + "'");
  return text == "bshd";
}

inline bool truth_of(const char* name, py::handle object) {
  if (object.ptr() == Py_True || object.ptr() == Py_False) return object.ptr() == Py_True;
  if (type_name(object).find("numpy.bool") != 0)
    wrong_type(name, "True or False", type_name(object));
  return PyObject_IsTrue(object.ptr()) == 1;
}

// Could two elements share memory? Yes if, strides sorted, one is less than the extent of those
// below it (some layouts that interleave without sharing are refused too; nobody allocates such an
// output by accident).
inline bool overlaps_itself(const py::array& a) {
  std::vector<std::pair<index_t, index_t>> axes;  // |stride|, length
  for (py::ssize_t i = 0; i < a.ndim(); i++)
    if (a.shape(i) > 1) axes.emplace_back(std::abs(index_t(a.strides(i))), index_t(a.shape(i)));
  std::sort(axes.begin(), axes.end());
  index_t extent = index_t(a.itemsize());
  for (const auto& [stride, length] : axes) {
    if (stride < extent) return a.size() > 0;
    extent += stride * (length - 1);
  }
  return false;
}

inline int threads_of(py::handle object) {
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

// New array, C-contiguous; a size that no memory could hold is a ValueError or MemoryError that
// names the array.
inline py::array allocate(const char* name, const py::dtype& dtype, const Shape& shape) {
  double bytes = double(dtype.itemsize());
  for (const index_t n : shape) bytes *= double(n);
  if (bytes > 9e18) wrong_value(name, "a result that fits in memory", "shape " + text_of(shape));
  PyObject* raw =
      PyObject_CallFunctionObjArgs(py::module_::import("numpy").attr("empty").ptr(),
                                   py::tuple(py::cast(shape)).ptr(), dtype.ptr(), nullptr);
  if (!raw) {
    if (PyErr_ExceptionMatches(PyExc_MemoryError)) {
      PyErr_Clear();
      PyErr_Format(PyExc_MemoryError, "%s: cannot allocate shape %s", name, text_of(shape).c_str());
    }
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::array>(raw);
}

// Runs f(loop) without the GIL; a signal that came meanwhile becomes Python's exception.
inline bool signals_pending() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <class F> void run_without_gil(F&& f) {
  Loop loop{signals_pending};
  bool done;
  {
    const py::gil_scoped_release release;
    done = f(loop);
  }
  if (!done) throw py::error_already_set();
}

}  // namespace fusedattn
