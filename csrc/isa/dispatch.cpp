#include "isa/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fusedattn {

extern const KernelTable table_baseline, table_avx2, table_avx512, table_avx512bf16, table_amx,
    table_neon;

namespace {

#if defined(__x86_64__)
// Bits that not every compiler's __builtin_cpu_supports knows by name. Whether the system saves the
// registers is asked with those it does know.
[[maybe_unused]] bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
[[maybe_unused]] bool has_amx_bf16() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE);
}
[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool runs_avx512bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
}
// Linux lets a process use the tiles once it has asked to.
[[maybe_unused]] bool runs_amx() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool allowed = runs_avx512() && has_amx_bf16() &&
                              syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return allowed;
#else
  return false;
#endif
}
#endif

struct Isa {
  const KernelTable* table;
  bool (*runs_here)();
  bool (*pays_here)() = [] { return true; };
};

// Worst first; FUSEDATTN_HAVE_NAME is what CMakeLists.txt built. Adding an instruction set is one
// file isa/NAME.cpp, one line there and one here.
const Isa isas[] = {
#if defined(FUSEDATTN_HAVE_BASELINE)
    {&table_baseline, [] { return true; }},
#endif
#if defined(FUSEDATTN_HAVE_AVX2)
    {&table_avx2, runs_avx2},
#endif
#if defined(FUSEDATTN_HAVE_AVX512)
    {&table_avx512, runs_avx512},
#endif
#if defined(FUSEDATTN_HAVE_AVX512BF16)
    // vdpbf16ps is slow on Intel's CPUs: on a Granite Rapids forward ran at 0.57 of the speed that
    // widening to float32 has.
    {&table_avx512bf16, runs_avx512bf16, [] { return !__builtin_cpu_is("intel"); }},
#endif
#if defined(FUSEDATTN_HAVE_AMX)
    {&table_amx, runs_amx},
#endif
#if defined(FUSEDATTN_HAVE_NEON)
    {&table_neon, [] { return true; }},
#endif
};

std::atomic<const KernelTable*> chosen{nullptr};
std::atomic<bool> forced{false};

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& n : names) all += (all.empty() ? "" : ", ") + n;
  return all;
}

const KernelTable* find(const std::string& name, const char* source) {
  const KernelTable* best = nullptr;
  for (const Isa& isa : isas)
    if (isa.runs_here() && (name.empty() ? isa.pays_here() : name == isa.table->name))
      best = isa.table;
  if (!best)
    throw std::invalid_argument(
        std::string(source) + ": expected one of the instruction sets that this CPU runs (" +
        joined(supported_isas()) + "; built: " + joined(built_isas()) + "), got '" + name + "'");
  return best;
}

}  // namespace

const KernelTable& kernel_table() {
  const KernelTable* table = chosen.load(std::memory_order_relaxed);
  if (!table) {
    const char* name = std::getenv("FUSEDATTN_ISA");
    table = find(name ? name : "", "FUSEDATTN_ISA");
    forced.store(name && *name, std::memory_order_relaxed);
    chosen.store(table, std::memory_order_relaxed);
  }
  return *table;
}

void set_isa(const std::string& name) {
  const KernelTable* table = name.empty() ? nullptr : find(name, "set_isa");
  forced.store(table != nullptr);
  chosen.store(table);
}

bool isa_is_forced() {
  return forced.load(std::memory_order_relaxed);
}

const KernelTable& best_table() {
  return *find("", "");
}

const Kernels& kernels_in(const KernelTable& table, DType dtype) {
  const Kernels* own = table.kernels[int(dtype)];
  return own ? *own : *table.base->kernels[int(dtype)];
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas) names.push_back(isa.table->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas)
    if (isa.runs_here()) names.push_back(isa.table->name);
  return names;
}

}  // namespace fusedattn
