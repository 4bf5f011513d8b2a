// From Python objects to plain numbers, and small arrays of them, checked by name.
//
// Takes no number for what it is not: a bool is no integer, a float no length, NaN no scale. Called
// by request.cpp and module.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/call.h"
#include "bindings/messages.h"

namespace fusedattn {

// Integers, one for each sample: a number, or an integer array of shape `lead` (or (batch,)).
std::vector<index_t> integers_of(const char* name, py::handle object, const Shape& lead,
                                 index_t batch);

// None, or (left, right): how many keys before and after its own position a query sees; -1 is no
// end. Left as it is for None.
void window_of(py::handle object, Call& c);

double finite_number(const char* name, py::handle object);

// Floating-point numbers in an array of one of the given shapes, C order.
std::vector<double> numbers_of(const char* name, py::handle object,
                               const std::vector<Shape>& shapes);

// Integers in an array of one of the given shapes, C order.
std::vector<index_t> ids_of(const char* name, py::handle object, const std::vector<Shape>& shapes);

// The seed of dropout, an integer of 64 bits without sign.
std::uint64_t seed_of(py::handle object);

bool is_bshd(py::handle layout);
bool truth_of(const char* name, py::handle object);
int threads_of(py::handle object);  // None: the default

}  // namespace fusedattn
