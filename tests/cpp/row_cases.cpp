// Embeddings, forward and backward, and dropout: rows that are picked, summed or thinned out.
#include "layer_case.h"

namespace fusedattn::test {
namespace {

std::size_t at(index_t row, index_t cols, index_t col) {
  return std::size_t(row * cols + col);
}

constexpr index_t VOCABULARY = 9;
struct GatherInputs {
  std::vector<Numbers> tables;
  std::vector<std::vector<index_t>> ids;
};
GatherInputs gather_inputs(index_t rows, index_t width, int tables) {
  Draw random(std::uint64_t(rows * 1000 + width));
  GatherInputs in;
  for (int t = 0; t < tables; t++) {
    in.tables.push_back(random.numbers(VOCABULARY * width));
    in.ids.emplace_back();
    for (index_t r = 0; r < rows; r++) in.ids.back().push_back(random.below(VOCABULARY));
  }
  return in;
}

template <class T> Results gather(const Run& run, index_t rows, index_t width, int tables) {
  const GatherInputs in = gather_inputs(rows, width, tables);
  std::vector<Array<T>> data;
  for (const Numbers& table : in.tables) data.emplace_back(VOCABULARY, width, table);
  Array<T> y(rows, width);
  Gather g{};
  for (std::size_t t = 0; t < data.size(); t++) {
    g.tables[t] = data[t].matrix();
    g.ids[t] = in.ids[t].data();
  }
  g.y = y.matrix();
  g.width = width;
  if (!run_gather(run, g, rows)) return {};
  return {{"y", y.numbers()}};
}
Results gather_expected(index_t rows, index_t width, int tables) {
  const GatherInputs in = gather_inputs(rows, width, tables);
  Numbers y(std::size_t(rows * width));
  for (std::size_t t = 0; t < in.tables.size(); t++)
    for (index_t i = 0; i < rows * width; i++)
      y[std::size_t(i)] += in.tables[t][at(in.ids[t][std::size_t(i / width)], width, i % width)];
  return {{"y", y}};
}

// `rows` rows in a drawn order; the last sum has most of them.
struct ScatterInputs {
  Numbers x;
  std::vector<index_t> order, first, rows;
};
ScatterInputs scatter_inputs(index_t rows, index_t width, index_t sums) {
  Draw random(std::uint64_t(rows * 1000 + width));
  ScatterInputs in{random.numbers(rows * width), {}, {}, {}};
  for (index_t r = 0; r < rows; r++) in.order.push_back(r);
  for (index_t r = rows - 1; r > 0; r--)
    std::swap(in.order[std::size_t(r)], in.order[std::size_t(random.below(r + 1))]);
  for (index_t s = 0; s < sums; s++) {
    in.first.push_back(s);
    in.rows.push_back(sums - 1 - s);
  }
  in.first.push_back(rows);
  return in;
}

template <class T> Results scatter(const Run& run, index_t rows, index_t width, index_t sums) {
  const ScatterInputs in = scatter_inputs(rows, width, sums);
  Array<T> x(rows, width, in.x), y(sums, width);
  const Scatter s{x.matrix(), y.matrix(), in.order.data(), in.first.data(), in.rows.data(), width};
  if (!run_scatter(run, s, sums)) return {};
  return {{"y", y.numbers()}};
}
Results scatter_expected(index_t rows, index_t width, index_t sums) {
  const ScatterInputs in = scatter_inputs(rows, width, sums);
  Numbers y(std::size_t(sums * width));
  for (index_t s = 0; s < sums; s++)
    for (index_t i = in.first[std::size_t(s)]; i < in.first[std::size_t(s + 1)]; i++)
      for (index_t c = 0; c < width; c++)
        y[at(in.rows[std::size_t(s)], width, c)] += in.x[at(in.order[std::size_t(i)], width, c)];
  return {{"y", y}};
}

// --- dropout of rows

constexpr std::uint64_t SEED = 0x123456789abcdef0;
constexpr std::uint32_t THRESHOLD = 0xc0000000;
constexpr double KEPT_SCALE = 1.375;  // a number of its own: not quite 1 / (1 - p)

// The finalizer of MurmurHash3 (Appleby).
std::uint32_t mixed(std::uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

template <class T> Results drop_rows(const Run& run, index_t rows, index_t width, bool adds) {
  Draw random(std::uint64_t(rows * 1000 + width));
  Array<T> x(rows, width, random.numbers(rows * width)),
      added(rows, width, random.numbers(rows * width)), y(rows, width);
  const DropRows d{
      x.matrix(), adds ? added.matrix() : Matrix{}, y.matrix(), SEED, THRESHOLD, KEPT_SCALE, width};
  if (!run_drop_rows(run, d, rows)) return {};
  return {{"y", y.numbers()}};
}
Results drop_rows_expected(index_t rows, index_t width, bool adds) {
  Draw random(std::uint64_t(rows * 1000 + width));
  const Numbers x = random.numbers(rows * width), added = random.numbers(rows * width);
  Numbers y;
  for (index_t r = 0; r < rows; r++) {
    const std::uint32_t row =
        mixed(mixed(std::uint32_t(SEED) ^ std::uint32_t(r)) + std::uint32_t(SEED >> 32));
    for (index_t c = 0; c < width; c++) {
      const bool kept = mixed(mixed(std::uint32_t(c) + 0x9e3779b9u) ^ row) < THRESHOLD;
      y.push_back((kept ? x[at(r, width, c)] * KEPT_SCALE : 0) +
                  (adds ? added[at(r, width, c)] : 0));
    }
  }
  return {{"y", y}};
}

}  // namespace

std::vector<LayerCase> row_cases() {
  std::vector<LayerCase> cases;
  for (const index_t width : LAYER_WIDTHS) {
    const index_t rows = rows_for(width);
    const std::string size = size_text(rows, width);
    for (const int tables : {1, 2, 3})
      cases.push_back(layer_case(
          "gather_" + size + "_" + std::to_string(tables),
          [=]<class T>(const Run& run) { return gather<T>(run, rows, width, tables); },
          [=] { return gather_expected(rows, width, tables); }));
    for (const index_t sums : {index_t(1), index_t(4), rows})
      cases.push_back(layer_case(
          "scatter_" + size + "_" + std::to_string(sums),
          [=]<class T>(const Run& run) { return scatter<T>(run, rows, width, sums); },
          [=] { return scatter_expected(rows, width, sums); }));
    for (const bool adds : {false, true})
      cases.push_back(layer_case(
          "drop_rows_" + size + (adds ? "_added" : ""),
          [=]<class T>(const Run& run) { return drop_rows<T>(run, rows, width, adds); },
          [=] { return drop_rows_expected(rows, width, adds); }));
  }
  return cases;
}

}  // namespace fusedattn::test
