// Attention, forward and backward, by the kernels of every instruction set that runs here: close to
// the oracle, and the same bits whatever the threads.
#include <cstdio>
#include <limits>
#include <string>

#include "attention_case.h"

namespace fusedattn::test {
namespace {

int failures = 0;

void check(const AttentionCase& c, const std::string& isa, const char* dtype, const char* what,
           double error, double limit) {
  if (error <= limit) return;
  failures++;
  std::printf("FAILED attention %s %s %s %s: error %.1f eps, at most %.0f (Sq%d Sk%d D%d/%d)\n",
              c.name, isa.c_str(), dtype, what, error, limit, int(c.sq), int(c.sk), int(c.d),
              int(c.d_v));
}

template <class T>
void test(const AttentionCase& c, const std::string& isa, const AttentionInputs& in,
          const Results& want) {
  constexpr bool narrow = sizeof(T) == 2;
  const double sums = std::numeric_limits<Compute<T>>::epsilon(),
               eps = narrow ? (std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8) : sums;
  const Results got = computed<T>(c, in, 1), again = computed<T>(c, in, 3);
  check(c, isa, name_of<T>, "is complete", got.size() == want.size() ? 0 : INFINITY, 0);
  for (std::size_t i = 0; i < std::min(got.size(), want.size()); i++) {
    const std::string name = want[i].name;
    const bool forward = name == "out" || name == "lse";
    check(c, isa, name_of<T>, want[i].name,
          error(got[i].values, want[i].values, name == "lse" ? sums : eps),
          name == "lse" ? 20
          : forward     ? (narrow ? 1 : 20)
                        : (narrow ? 4 : 40));
  }
  check(c, isa, name_of<T>, "same bits with three threads", got == again ? 0 : INFINITY, 0);
}

template <class T> void test_on_all(const AttentionCase& c, const AttentionInputs& drawn) {
  const AttentionInputs in = held<T>(drawn);
  const Results want = expected(c, in);
  for (const std::string& isa : supported_isas()) {
    set_isa(isa);
    test<T>(c, isa, in, want);
  }
}

}  // namespace

int test_attention() {
  std::vector<AttentionCase> cases = attention_cases();
  for (const AttentionCase& c : attention_sizes()) cases.push_back(c);
  std::uint64_t seed = 0;
  for (const AttentionCase& c : cases) {
    const AttentionInputs in = draw(c, seed++);
    test_on_all<float>(c, in);
    test_on_all<double>(c, in);
    if (c.fits_float16) test_on_all<Half>(c, in);
    test_on_all<BFloat>(c, in);
  }
  std::printf("attention: %d cases, %d failures\n", int(cases.size()), failures);
  return failures;
}

}  // namespace fusedattn::test
