// Plain structs that travel from the work division (layers/run.cpp) to the kernels of the encoder's
// layers (kernel/layers/). Strides are in bytes; the elements of a row
// lie next to each other unless said otherwise.
#pragma once

#include "kernel/task.h"

namespace fusedattn {

// What a product does to its sums: an activation, whose slope it can keep for the backward pass, or
// the product with such a slope.
enum class Then { nothing, relu, gelu, gelu_tanh, tanh, times };

// c = then(added + bias + a b).
struct Product {
  Matrix a;          // (m, k), one of its strides that of an element
  Matrix b;          // (k, n), likewise
  Matrix c;          // (m, n)
  Matrix added;      // (m, n), or data null
  Matrix slope;      // (m, n): read by `times`, written by an activation unless data is null
  const void* bias;  // (n), or null
  void* row_sums;    // (m): the sums of a's rows, if not null; a's columns are contiguous then
  Then then;
  index_t m, n, k;
};

// y = (x - mean) * rstd * weight + bias for each row.
struct LayerNorm {
  Matrix x, y;
  const void *weight, *bias;  // (width)
  void *mean, *rstd;          // (rows)
  index_t width;
  double eps;
};

struct LayerNormBackward {
  Matrix x, dy, dx;
  const void* weight;       // (width)
  const void *mean, *rstd;  // (rows)
  void *dweight, *dbias;    // (width): the sums over the rows of one call
  index_t width;
};

// For each element (arXiv:1412.6980, arXiv:1711.05101):
//   m += (1 - b1) (g - m),  v += (1 - b2) (g^2 - v),  g the gradient times scale
//   p = p * shrink - rate * m / (sqrt(v) * root + eps)
struct AdamW {
  void *p, *m, *v;
  const void* g;
  double scale, b1, b2, rate, root, shrink, eps;
};

struct Softmax {
  Matrix x;           // (rows, classes)
  void* lse;          // (rows): log sum exp
  const void* share;  // (rows): what the gradient's softmax is multiplied by
  Matrix dx;          // (rows, classes)
  index_t classes;
};

// y[t] = sum of tables[i][ids[i][t]], tables up to the first without data.
inline constexpr int TABLES = 3;
struct Gather {
  Matrix tables[TABLES];
  const index_t* ids[TABLES];
  Matrix y;
  index_t width;
};

// sums[s] = sum of x[order[i]] for i in [first[s], first[s + 1]), to row rows[s] of y.
struct Scatter {
  Matrix x, y;
  const index_t *order, *first, *rows;
  index_t width;
};

// y = added + x where kept, / (1 - p): an element is kept if its random word is below `threshold`.
struct DropRows {
  Matrix x, added, y;  // added may lack data
  std::uint64_t seed;
  std::uint32_t threshold;
  double scale;
  index_t width;
};

// The functions of one element type, float32 or float64. Ranges are of rows.
struct LayerKernels {
  index_t rows_at_once;   // of A, packed, at most: as fit L2 beside a panel of B
  index_t rows_together;  // a multiple of which a task should have
  index_t panel;          // columns of C that are computed together
  std::size_t (*product_scratch)(const Product&, index_t rows);
  void (*product)(const Product&, index_t i0, index_t rows, index_t j0, index_t j1,
                  index_t next_rows, void* scratch);
  void (*activate)(const Product&, index_t begin, index_t end);  // c in place, by `then`
  void (*layer_norm)(const LayerNorm&, index_t begin, index_t end);
  void (*layer_norm_backward)(const LayerNormBackward&, index_t begin, index_t end);
  void (*adamw)(const AdamW&, index_t begin, index_t end);  // of elements
  double (*sum_of_squares)(const void* elements, index_t begin, index_t end);
  void (*log_sum_exp)(const Softmax&, index_t begin, index_t end);
  void (*softmax_gradient)(const Softmax&, index_t begin, index_t end);
  void (*gather)(const Gather&, index_t begin, index_t end);
  void (*scatter)(const Scatter&, index_t s, index_t c0, index_t c1);  // columns [c0, c1)
  void (*drop_rows)(const DropRows&, index_t begin, index_t end);
};

}  // namespace fusedattn
