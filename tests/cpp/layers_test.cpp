// The layers' functions by the kernels of every instruction set that runs here: close to plain
// loops in double precision, and the same bits whatever the threads.
#include <cstdio>
#include <limits>

#include "layer_case.h"

namespace fusedattn::test {
namespace {

int failures = 0;

void check(const LayerCase& c, const std::string& isa, DType dtype, const char* what, double error,
           double limit) {
  if (error <= limit) return;
  failures++;
  std::printf("FAILED %s %s %s %s: error %.1f eps, at most %.0f\n", c.name.c_str(), isa.c_str(),
              dtype == DType::float64 ? "float64" : "float32", what, error, limit);
}

}  // namespace

std::vector<LayerCase> layer_cases() {
  std::vector<LayerCase> cases;
  for (const auto& some : {product_cases(), elementwise_cases(), row_cases()})
    cases.insert(cases.end(), some.begin(), some.end());
  return cases;
}

int test_layers() {
  const std::vector<LayerCase> cases = layer_cases();
  for (const LayerCase& c : cases) {
    const Results want = c.expected();
    for (const std::string& isa : supported_isas()) {
      set_isa(isa);
      for (const DType dtype : {DType::float32, DType::float64}) {
        Loop loop{};
        const double eps = dtype == DType::float64 ? std::numeric_limits<double>::epsilon()
                                                   : std::numeric_limits<float>::epsilon();
        const Results got = c.computed({dtype, 1, loop}), again = c.computed({dtype, 3, loop});
        check(c, isa, dtype, "is complete", got.size() == want.size() ? 0 : INFINITY, 0);
        for (std::size_t i = 0; i < std::min(got.size(), want.size()); i++)
          check(c, isa, dtype, want[i].name, error(got[i].values, want[i].values, eps), 20);
        check(c, isa, dtype, "same bits with three threads", got == again ? 0 : INFINITY, 0);
      }
    }
  }
  std::printf("layers: %d cases, %d failures\n", int(cases.size()), failures);
  return failures;
}

}  // namespace fusedattn::test
