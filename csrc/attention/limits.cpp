// Each limit is the best of five runs: whatever else the machine does can only slow one down.
#include "attention/limits.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "isa/dispatch.h"
#include "threads/pool.h"

namespace fusedattn {

double measure_peak(DType dtype, int threads) {
  const Kernels& kernels = kernels_in(best_table(), dtype);
  double best = 0;
  for (int i = 0; i < 5; i++) {
    Loop loop{};
    std::vector<double> flops(std::size_t(threads), 0.0);
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, loop,
                 [&](index_t t) { flops[std::size_t(t)] = kernels.multiply_adds(2000000); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double sum = 0;
    for (const double f : flops) sum += f;
    best = std::max(best, sum / seconds.count());
  }
  return best;
}

double measure_bandwidth(int threads) {
  constexpr std::size_t piece = 1 << 20, pieces = 256;
  const auto data = std::make_unique<char[]>(piece * pieces);
  double best = 0;
  for (int i = 0; i < 5; i++) {
    Loop loop{};
    const auto start = std::chrono::steady_clock::now();
    parallel_for(index_t(pieces), threads, loop, [&](index_t t) {
      kernel_table().read(data.get() + std::size_t(t) * piece, piece);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(piece * pieces) / seconds.count());
  }
  return best;
}

}  // namespace fusedattn
