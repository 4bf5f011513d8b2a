// How each layer is cut into tasks: by rows of about the same work, but for products, layer norm's
// backward and scattered sums, which say why above their functions.
#include "layers/run.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "isa/dispatch.h"

namespace fusedattn {
namespace {

constexpr index_t TASK_ELEMENTS = 1 << 15;  // of elementwise work: tens of microseconds
constexpr index_t TASK_FLOPS = 1 << 21;     // of a product: likewise
constexpr index_t PARTIAL_ROWS = 64;        // rows that a partial sum of layer norm's backward has

const LayerKernels& kernels_for(const Run& run) {
  const KernelTable& table = kernel_table();
  const LayerKernels* own = table.layers[run.dtype == DType::float64];
  return own ? *own : *table.base->layers[run.dtype == DType::float64];
}
index_t pieces_of(index_t n, index_t piece) {
  return (n + piece - 1) / piece;
}
index_t size_of(const Run& run) {
  return run.dtype == DType::float64 ? 8 : 4;
}

// Rows in pieces, each of about TASK_ELEMENTS.
template <class F> bool over_rows(const Run& run, index_t rows, index_t width, F&& f) {
  const index_t step = std::max<index_t>(1, TASK_ELEMENTS / std::max<index_t>(1, width));
  return parallel_for(pieces_of(rows, step), run.threads, run.loop,
                      [&](index_t task) { f(task * step, std::min(rows, (task + 1) * step)); });
}

}  // namespace

// C is cut into tasks. Each packs its rows of A and its columns of B, so all together pack A once
// for each piece of the columns, and B once for each piece of the rows: as little as possible, with
// as many tasks for each thread.
bool run_product(const Run& run, const Product& p) {
  if (p.m == 0 || p.n == 0) return true;
  const LayerKernels& kernels = kernels_for(run);
  const double flops = 2.0 * double(p.m) * double(p.n) * double(std::max<index_t>(1, p.k));
  const auto worth = index_t(std::min(1e6, std::max(1.0, flops / double(TASK_FLOPS))));
  const index_t threads = std::min<index_t>(run.threads, worth);

  const index_t row_step = kernels.rows_together, most_columns = pieces_of(p.n, kernels.panel);
  index_t row_pieces = pieces_of(p.m, kernels.rows_at_once), column_pieces = 1;
  index_t least = std::numeric_limits<index_t>::max();
  for (index_t c = 1; c <= std::min(threads, most_columns); c++) {
    if (threads % c != 0) continue;
    const index_t each = threads / c;
    const index_t r = pieces_of(pieces_of(p.m, kernels.rows_at_once), each) * each;
    if (r > pieces_of(p.m, row_step) && r > 1) continue;
    if (const index_t packed = p.m * c + p.n * r; packed < least)
      least = packed, row_pieces = r, column_pieces = c;
  }
  const index_t rows = pieces_of(pieces_of(p.m, row_pieces), row_step) * row_step;
  const index_t columns = pieces_of(pieces_of(p.n, column_pieces), kernels.panel) * kernels.panel;
  row_pieces = pieces_of(p.m, rows);
  column_pieces = pieces_of(p.n, columns);
  const std::size_t scratch = kernels.product_scratch(p, rows);
  return parallel_for(row_pieces * column_pieces, int(threads), run.loop, [&](index_t task) {
    const index_t i = task / column_pieces * rows, j = task % column_pieces * columns;
    kernels.product(p, i, std::min(rows, p.m - i), j, std::min(p.n, j + columns),
                    std::min(p.m, i + threads / column_pieces * rows), thread_scratch(scratch));
  });
}

bool run_activate(const Run& run, const Product& p) {
  return over_rows(run, p.m, p.n,
                   [&](index_t begin, index_t end) { kernels_for(run).activate(p, begin, end); });
}

bool run_layer_norm(const Run& run, const LayerNorm& n, index_t rows) {
  return over_rows(run, rows, n.width,
                   [&](index_t begin, index_t end) { kernels_for(run).layer_norm(n, begin, end); });
}

// Partial sums of dweight and dbias for every PARTIAL_ROWS rows, added in their order.
bool run_layer_norm_backward(const Run& run, const LayerNormBackward& n, index_t rows) {
  const index_t parts = pieces_of(rows, PARTIAL_ROWS), size = n.width * size_of(run);
  std::vector<char> partial(std::size_t(2 * parts * size));
  const bool done = parallel_for(parts, run.threads, run.loop, [&](index_t part) {
    LayerNormBackward own = n;
    own.dweight = partial.data() + 2 * part * size;
    own.dbias = partial.data() + (2 * part + 1) * size;
    kernels_for(run).layer_norm_backward(own, part * PARTIAL_ROWS,
                                         std::min(rows, (part + 1) * PARTIAL_ROWS));
  });
  const auto add = [&]<class T>(T* sums, index_t which) {
    for (index_t c = 0; c < n.width; c++) sums[c] = T(0);
    for (index_t part = 0; part < parts; part++) {
      const T* own = reinterpret_cast<const T*>(partial.data() + (2 * part + which) * size);
      for (index_t c = 0; c < n.width; c++) sums[c] += own[c];
    }
  };
  for (const index_t which : {0, 1}) {
    void* sums = which ? n.dbias : n.dweight;
    if (run.dtype == DType::float64)
      add(static_cast<double*>(sums), which);
    else
      add(static_cast<float*>(sums), which);
  }
  return done;
}

bool run_adamw(const Run& run, const AdamW& a, index_t elements) {
  return over_rows(run, elements, 1,
                   [&](index_t begin, index_t end) { kernels_for(run).adamw(a, begin, end); });
}

// Partial sums of every TASK_ELEMENTS elements, added in their order.
bool run_sum_of_squares(const Run& run, const void* x, index_t elements, double& sum) {
  std::vector<double> partial(std::size_t(pieces_of(elements, TASK_ELEMENTS)));
  const bool done = over_rows(run, elements, 1, [&](index_t begin, index_t end) {
    partial[std::size_t(begin / TASK_ELEMENTS)] = kernels_for(run).sum_of_squares(x, begin, end);
  });
  sum = std::accumulate(partial.begin(), partial.end(), 0.0);
  return done;
}

bool run_log_sum_exp(const Run& run, const Softmax& s, index_t rows) {
  return over_rows(run, rows, s.classes, [&](index_t begin, index_t end) {
    kernels_for(run).log_sum_exp(s, begin, end);
  });
}

bool run_softmax_gradient(const Run& run, const Softmax& s, index_t rows) {
  return over_rows(run, rows, s.classes, [&](index_t begin, index_t end) {
    kernels_for(run).softmax_gradient(s, begin, end);
  });
}

bool run_gather(const Run& run, const Gather& g, index_t rows) {
  return over_rows(run, rows, g.width,
                   [&](index_t begin, index_t end) { kernels_for(run).gather(g, begin, end); });
}

// A few sums of many rows are cut along the columns.
bool run_scatter(const Run& run, const Scatter& s, index_t sums) {
  if (sums == 0 || s.width == 0) return true;
  const bool few = sums < 8 * run.threads;
  const index_t line = 64 / size_of(run);
  const index_t columns = few ? line : s.width, column_pieces = pieces_of(s.width, columns);
  const index_t added = s.first[sums] / sums + 1;
  const index_t step = few ? 1 : std::max<index_t>(1, TASK_ELEMENTS / (s.width * added));
  return parallel_for(
      pieces_of(sums, step) * column_pieces, run.threads, run.loop, [&](index_t task) {
        const index_t c = task % column_pieces * columns, n = task / column_pieces * step;
        for (index_t i = n; i < std::min(sums, n + step); i++)
          kernels_for(run).scatter(s, i, c, std::min(s.width, c + columns));
      });
}

bool run_drop_rows(const Run& run, const DropRows& d, index_t rows) {
  return over_rows(run, rows, d.width,
                   [&](index_t begin, index_t end) { kernels_for(run).drop_rows(d, begin, end); });
}

}  // namespace fusedattn
