// The kernels of every instruction set that this CPU (or the emulator) runs, without Python: for
// cross builds, sanitizers and clang-tidy. The Python tests cover far more; these travel.
//
//   kernel_test                    attention and layers against plain loops
//   kernel_test --bits             print a hash of each result for each instruction set
//   kernel_test --check-bits FILE  compare the hashes with a file's
//   kernel_test --write-bits FILE  write that file
#include <cstdio>
#include <string>

#include "bits.h"
#include "numbers.h"

int main(int argc, char** argv) {
  using namespace fusedattn;
  const std::string mode = argc > 1 ? argv[1] : "", file = argc > 2 ? argv[2] : "";
  if (mode == "--bits") return test::print_bits(), 0;
  if (mode == "--check-bits" && argc == 3) return test::check_bits(file) != 0;
  if (mode == "--write-bits" && argc == 3) return test::write_bits(file) != 0;
  if (argc > 1) return std::fprintf(stderr, "unknown arguments: see kernel_test.cpp\n"), 2;
  std::string names;
  for (const std::string& isa : supported_isas()) names += " " + isa;
  std::printf("instruction sets:%s\n", names.c_str());
  const int attention = test::test_attention(), layers = test::test_layers();
  return attention + layers != 0;
}
