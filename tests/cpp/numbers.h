// Numbers and results that the tests share: 16-bit storage types, exact random inputs, and what
// came out of a kernel.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace fusedattn::test {

using Numbers = std::vector<double>;

// bfloat16 is the upper half of a float32. No NaN is rounded to it here, nor to float16.
struct BFloat {
  std::uint16_t bits = 0;
  BFloat() = default;
  explicit BFloat(double x) {  // to nearest even
    const auto w = std::bit_cast<std::uint32_t>(float(x));
    bits = std::uint16_t((w + 0x7fff + ((w >> 16) & 1)) >> 16);
  }
  explicit operator double() const {
    return double(std::bit_cast<float>(std::uint32_t(bits) << 16));
  }
};

// float16 has 11 significant bits; multiples of 2^-24 below 2^-14.
struct Half {
  std::uint16_t bits = 0;
  Half() = default;
  explicit Half(double x) {  // to nearest even
    int exponent = 0;
    std::frexp(x, &exponent);
    const int unit = std::max(exponent - 11, -24);
    const double units = std::nearbyint(std::ldexp(std::fabs(x), -unit));
    bits = std::uint16_t((std::signbit(x) ? 0x8000 : 0) + 1024 * (unit + 24) + int(units));
  }
  explicit operator double() const {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    double size = std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
  }
};

template <class T> using Compute = std::conditional_t<sizeof(T) == 2, float, T>;
template <class T>
inline constexpr DType dtype_of = std::is_same_v<T, double>  ? DType::float64
                                  : std::is_same_v<T, float> ? DType::float32
                                  : std::is_same_v<T, Half>  ? DType::float16
                                                             : DType::bfloat16;
template <class T>
inline constexpr const char* name_of = std::is_same_v<T, double>  ? "float64"
                                       : std::is_same_v<T, float> ? "float32"
                                       : std::is_same_v<T, Half>  ? "float16"
                                                                  : "bfloat16";

template <class T> std::vector<T> narrowed(const Numbers& x) {
  std::vector<T> y;
  y.reserve(x.size());
  for (const double e : x) y.push_back(T(e));
  return y;
}
template <class T> Numbers widened(const std::vector<T>& x) {
  Numbers y;
  y.reserve(x.size());
  for (const T& e : x) y.push_back(double(e));
  return y;
}

// The same numbers on every machine: sums of integers of splitmix64 (Steele, Lea and Flood, 2014).
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : state_(seed) {}

  std::uint64_t word() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  index_t below(index_t n) { return index_t(word() >> 33) % n; }
  // Like a normal distribution with standard deviation 0.92, from -3.2 to 3.2. The division is
  // rounded, alike everywhere, so that float32 and float64 fill their digits and round every sum.
  double number() {
    constexpr std::uint64_t part = (1 << 22) - 1;
    const std::uint64_t a = word(), b = word();
    const auto sum =
        std::int64_t((a & part) + ((a >> 32) & part) + (b & part) + ((b >> 32) & part));
    return std::ldexp(double(sum - 2 * std::int64_t(part)), -19) / 5;
  }
  Numbers numbers(index_t n, double factor = 1) {
    Numbers x(static_cast<std::size_t>(n));
    for (double& e : x) e = number() * factor;
    return x;
  }

 private:
  std::uint64_t state_;
};

// One array that a kernel computed, widened, or what the oracle expects in its place.
struct Result {
  const char* name;
  Numbers values;

  bool operator==(const Result&) const = default;
};
using Results = std::vector<Result>;

// Largest difference in units of eps times the largest expected value; infinite for a NaN, a wrong
// infinity or a wrong size.
inline double error(const Numbers& got, const Numbers& want, double eps) {
  if (got.size() != want.size()) return INFINITY;
  double largest = 0, difference = 0;
  for (std::size_t i = 0; i < want.size(); i++) {
    if (std::isinf(want[i])) {
      if (got[i] != want[i]) return INFINITY;
      continue;
    }
    if (!std::isfinite(got[i])) return INFINITY;
    largest = std::fmax(largest, std::fabs(want[i]));
    difference = std::fmax(difference, std::fabs(got[i] - want[i]));
  }
  return difference / (eps * std::fmax(largest, 1e-3));
}

// The tests: how many checks failed; each failure is printed.
int test_attention();
int test_layers();

}  // namespace fusedattn::test
