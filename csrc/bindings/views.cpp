#include "bindings/views.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace fusedattn {

Shape join(Shape shape, index_t last) {
  shape.push_back(last);
  return shape;
}

py::array array_of(const char* name, py::handle object) {
  if (py::isinstance<py::array>(object)) return py::reinterpret_borrow<py::array>(object);
  const auto numpy = py::module_::import("numpy");
  if (py::hasattr(object, "__array__")) return numpy.attr("asarray")(object);
  if (py::hasattr(object, "__dlpack__")) return numpy.attr("from_dlpack")(object);
  wrong_type(name, "an array (NumPy's, or an object with __array__ or DLPack on the CPU)",
             type_name(object));
}

DType dtype_of(const char* name, const py::array& a) {
  const py::dtype t = a.dtype();
  const bool native = t.byteorder() == '=' || t.byteorder() == '|';
  if (t.kind() == 'f' && native && t.itemsize() == 4) return DType::float32;
  if (t.kind() == 'f' && native && t.itemsize() == 8) return DType::float64;
  if (t.kind() == 'f' && native && t.itemsize() == 2) return DType::float16;
  if (native && t.itemsize() == 2 && text_of(t) == "bfloat16") return DType::bfloat16;
  wrong_type(name, "native-endian float32, float64, float16 or bfloat16 (ml_dtypes)",
             dtype_name(a));
}

Shape shape_of(const py::array& a) {
  return Shape(a.shape(), a.shape() + a.ndim());
}

Axes axes_of(bool bshd, int n) {
  if (n == 2) return {-1, 0, 1};
  return bshd ? Axes{n - 2, n - 3, n - 1} : Axes{n - 3, n - 2, n - 1};
}

std::vector<index_t> batch_offsets(const Shape& lead, const std::vector<index_t>& strides) {
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

Tensor tensor_of(const py::array& a, Axes axes) {
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

Tensor broadcast_tensor(const char* name, const py::array& a, const Shape& full) {
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

void check_shape(const char* name, const py::array& a, const std::vector<Shape>& shapes) {
  if (std::find(shapes.begin(), shapes.end(), shape_of(a)) != shapes.end()) return;
  std::string expected = "shape " + text_of(shapes[0]);
  for (std::size_t i = 1; i < shapes.size(); i++)
    if (shapes[i] != shapes[i - 1]) expected += " or " + text_of(shapes[i]);
  wrong_value(name, expected, "shape " + text_of(shape_of(a)));
}

bool overlaps_itself(const py::array& a) {
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

py::array allocate(const char* name, const py::dtype& dtype, const Shape& shape) {
  double bytes = double(dtype.itemsize());
  for (const index_t n : shape) bytes *= double(n);
  if (bytes > 9e18) wrong_value(name, "a result that fits in memory", "shape " + text_of(shape));
  try {
    return py::array(dtype, shape);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_MemoryError)) throw;
  }
  PyErr_Format(PyExc_MemoryError, "%s: cannot allocate shape %s", name, text_of(shape).c_str());
  throw py::error_already_set();
}

}  // namespace fusedattn
