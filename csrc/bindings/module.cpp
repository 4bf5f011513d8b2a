// The module's table of contents, and what it says of itself: instruction set, threads, limits.
//
// pybind11 lives in this folder and nowhere else. Every binding is the same four beats: convert,
// allocate, release the GIL, call.
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "attention/limits.h"
#include "bindings/attention.h"
#include "bindings/layers.h"
#include "bindings/numbers.h"
#include "isa/dispatch.h"
#include "threads/pool.h"
#include "threads/thread_count.h"

namespace fusedattn {
namespace {

py::dict cpu_info() {
  py::dict d;
  d["isa"] = kernel_table().name;
  d["isas"] = supported_isas();
  d["isas_built"] = built_isas();
  d["num_threads"] = get_num_threads();
  d["parallel"] = parallel_backend();
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["build_type"] = FUSEDATTN_BUILD_TYPE;
  return d;
}

}  // namespace
}  // namespace fusedattn

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace fusedattn;
  m.doc() = "The C++ core of fusedattn; the public functions are in the package.";
  m.attr("__version__") = FUSEDATTN_VERSION;

  bind_attention(m);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", [](py::handle n) { set_num_threads(n.is_none() ? 0 : threads_of(n)); });
  m.def("cpu_info", &fusedattn::cpu_info);
  m.def("set_isa", &set_isa);
  m.def("measure_peak", [](const std::string& dtype, int threads) {
    const char* names[] = {"float32", "float64", "float16", "bfloat16"};  // by DType
    const auto at = std::find(std::begin(names), std::end(names), dtype);
    if (at == std::end(names)) throw py::value_error("dtype: expected a float type, got " + dtype);
    const py::gil_scoped_release release;
    return measure_peak(DType(at - std::begin(names)), threads);
  });
  m.def("measure_bandwidth", [](int threads) {
    const py::gil_scoped_release release;
    return measure_bandwidth(threads);
  });
  bind_layers(m);
}
