// Which results are hashed, and how. Inputs are sums of integers, so that no library function
// stands between a case and its hash.
#include "bits.h"

#include <cstdio>
#include <fstream>
#include <map>
#include <set>

#include "attention_case.h"
#include "layer_case.h"

namespace fusedattn::test {
namespace {

// AMX and AVX512-BF16 make other sums; the baseline of x86-64 cannot multiply and add in one.
std::vector<std::string> sets_with_multiply_add() {
  static const std::set<std::string> promised{"avx2", "avx512", "neon"};
  std::vector<std::string> names;
  for (const std::string& isa : supported_isas())
    if (promised.count(isa)) names.push_back(isa);
  return names;
}

// FNV-1a (Fowler, Noll, Vo) over the bytes of the numbers, lowest first. A NaN is a NaN, whatever
// its payload; -0 is not 0.
std::uint64_t hash_of(const Numbers& values) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const double x : values) {
    const auto bits = std::isnan(x) ? 0x7ff8000000000000u : std::bit_cast<std::uint64_t>(x);
    for (int byte = 0; byte < 8; byte++)
      hash = (hash ^ ((bits >> (8 * byte)) & 0xff)) * 0x100000001b3u;
  }
  return hash;
}

using Hashes = std::map<std::string, std::uint64_t>;  // by "case dtype result"

void add(Hashes& hashes, const std::string& name, const char* dtype, const Results& results) {
  for (const Result& r : results) {
    std::string key = name + " " + dtype + " " + r.name;
    for (char& c : key)
      if (c == ' ') c = '.';
    hashes[key] = hash_of(r.values);
  }
}

// Of the instruction set in use.
Hashes hashes_here() {
  Hashes hashes;
  std::uint64_t seed = 100;
  std::vector<AttentionCase> cases = attention_cases();
  cases.push_back({.name = "underflow", .q_factor = 64});  // many a P is subnormal or 0
  for (const AttentionCase& c : cases) {
    const AttentionInputs in = draw(c, seed++);
    add(hashes, std::string("attention.") + c.name, "float32", computed<float>(c, in, 2));
    add(hashes, std::string("attention.") + c.name, "float64", computed<double>(c, in, 2));
  }
  for (const LayerCase& c : layer_cases()) {
    Loop loop{};
    add(hashes, c.name, "float32", c.computed({DType::float32, 2, loop}));
    add(hashes, c.name, "float64", c.computed({DType::float64, 2, loop}));
  }
  return hashes;
}

std::map<std::string, Hashes> hashes_of_all() {
  std::map<std::string, Hashes> all;
  for (const std::string& isa : sets_with_multiply_add()) {
    set_isa(isa);
    all[isa] = hashes_here();
  }
  set_isa("");
  return all;
}

}  // namespace

void print_bits() {
  for (const auto& [isa, hashes] : hashes_of_all())
    for (const auto& [name, hash] : hashes)
      std::printf("%s %s %016llx\n", name.c_str(), isa.c_str(),
                  static_cast<unsigned long long>(hash));
}

int check_bits(const std::string& path) {
  Hashes want;
  std::ifstream file(path);
  std::string name;
  for (std::uint64_t hash = 0; file >> name >> std::hex >> hash;) want[name] = hash;
  int failures = 0;
  for (const auto& [isa, hashes] : hashes_of_all()) {
    if (hashes.size() != want.size()) {
      failures++;
      std::printf("FAILED bits %s: %d results, but %d in %s\n", isa.c_str(), int(hashes.size()),
                  int(want.size()), path.c_str());
    }
    for (const auto& [result, hash] : hashes)
      if (!want.count(result) || want[result] != hash) {
        failures++;
        std::printf("FAILED bits %s %s\n", result.c_str(), isa.c_str());
      }
  }
  if (sets_with_multiply_add().empty()) std::printf("bits: no instruction set to compare\n");
  std::printf("bits: %d results, %d failures\n", int(want.size()), failures);
  return failures;
}

int write_bits(const std::string& path) {
  const std::map<std::string, Hashes> all = hashes_of_all();
  if (all.empty()) return 1;
  std::ofstream file(path);
  int differ = 0;
  for (const auto& [name, hash] : all.begin()->second) {
    bool same = true;
    for (const auto& [isa, hashes] : all) same &= hashes.at(name) == hash;
    if (same)
      file << name << " " << std::hex << hash << "\n";
    else
      differ++, std::printf("the instruction sets differ: %s\n", name.c_str());
  }
  return differ;
}

}  // namespace fusedattn::test
