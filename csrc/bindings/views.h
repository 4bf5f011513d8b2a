// From NumPy arrays to strided views: any layout and any stride is only numbers.
//
// Copies no array and writes to none; what is no array, or has another shape or dtype than asked
// for, is an error by the argument's name. Called by the other files of this folder.
#pragma once

#include <vector>

#include "attention/call.h"
#include "bindings/messages.h"

namespace fusedattn {

Shape join(Shape shape, index_t last);  // (*shape, last)

// An array as it is: NumPy arrays themselves, others through __array__ or DLPack, never copied
// here.
py::array array_of(const char* name, py::handle object);

Shape shape_of(const py::array& a);
DType dtype_of(const char* name, const py::array& a);

Shape shape_of(const py::array& a);

// Axes of (..., H, S, D) in an array of n dimensions; -1 where a missing head axis counts as 1.
struct Axes {
  int head, row, col;
};
Axes axes_of(bool bshd, int n);

// Offsets in bytes of the samples: all combinations of the first `lead` axes, last one fastest; a
// zero stride broadcasts.
std::vector<index_t> batch_offsets(const Shape& lead, const std::vector<index_t>& strides);

Tensor tensor_of(const py::array& a, Axes axes);

// A mask or bias that broadcasts, as NumPy does, to `full` = (..., H, Sq, Sk).
Tensor broadcast_tensor(const char* name, const py::array& a, const Shape& full);

// An array of one of the given shapes.
void check_shape(const char* name, const py::array& a, const std::vector<Shape>& shapes);

// Could two elements share memory? Yes if, strides sorted, one is less than the extent of those
// below it (some layouts that interleave without sharing are refused too; nobody allocates such an
// output by accident).
bool overlaps_itself(const py::array& a);

// New array, C-contiguous; a size that no memory could hold is a ValueError or MemoryError that
// names the array.
py::array allocate(const char* name, const py::dtype& dtype, const Shape& shape);

}  // namespace fusedattn
