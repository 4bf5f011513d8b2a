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

DType dtype_named(const std::string& name) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};  // by DType
  const auto at = std::find(std::begin(names), std::end(names), name);
  if (at == std::end(names))
    wrong_value("dtype", "'float32', 'float64', 'float16' or 'bfloat16'", "'" + name + "'");
  return DType(at - std::begin(names));
}

}  // namespace
}  // namespace fusedattn

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace fusedattn;
  using py::literals::operator""_a;
  m.doc() = "The C++ core of fusedattn; the public functions are in the package.";
  m.attr("__version__") = FUSEDATTN_VERSION;

  bind_attention(m);
  m.def("get_num_threads", &get_num_threads, "How many threads a call uses if it does not say.");
  m.def(
      "set_num_threads", [](py::handle n) { set_num_threads(n.is_none() ? 0 : threads_of(n)); },
      "Chooses that number; None goes back to the environment's.", "n"_a);
  m.def("cpu_info", &fusedattn::cpu_info,
        "What this build and this CPU offer, and what is in use.");
  m.def("set_isa", &set_isa, "Forces an instruction set, for tests; '' goes back to the default.",
        "name"_a);
  m.def(
      "measure_peak",
      [](const std::string& dtype, int threads) {
        const DType type = dtype_named(dtype);
        const py::gil_scoped_release release;
        return measure_peak(type, threads);
      },
      "Multiply-add flops a second that this CPU reaches.", "dtype"_a, "threads"_a);
  m.def(
      "measure_bandwidth",
      [](int threads) {
        const py::gil_scoped_release release;
        return measure_bandwidth(threads);
      },
      "Bytes a second that this machine reads.", "threads"_a);
  bind_layers(m);
}
