// Running without the GIL: other Python threads go on, and Ctrl-C still ends the call.
//
// f must touch no Python object. Called by every binding that computes.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "threads/pool.h"

namespace fusedattn {

inline bool signals_pending() {
  const pybind11::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Runs f(loop), which returns false if interrupted; a signal that came meanwhile becomes Python's
// exception.
template <class F> void run_without_gil(F&& f) {
  Loop loop{signals_pending};
  bool done;
  {
    const pybind11::gil_scoped_release release;
    done = std::forward<F>(f)(loop);
  }
  if (!done) throw pybind11::error_already_set();
}

}  // namespace fusedattn
