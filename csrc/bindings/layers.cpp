// Each binding checks its arrays by name against one dtype and the shapes that follow from the
// first, fills a plain struct and runs it.
#include "bindings/layers.h"

#include <cstdint>
#include <string>

#include "bindings/views.h"
#include "bindings/without_gil.h"
#include "isa/dispatch.h"
#include "layers/run.h"
#include "threads/thread_count.h"

namespace fusedattn {
namespace {

using H = py::handle;

// The dtype of one call; every array must have it.
struct Operands {
  DType dtype;
  py::dtype numpy;

  Operands(const char* name, H object) {
    const py::array a = array_of(name, object);
    dtype = dtype_of(name, a);
    if (dtype != DType::float32 && dtype != DType::float64)
      wrong_type(name, "float32 or float64", dtype_name(a));
    numpy = a.dtype();
  }

  void check(const char* name, const py::array& a, const Shape& shape) const {
    if (!a.dtype().equal(numpy)) wrong_type(name, text_of(numpy), dtype_name(a));
    if (shape_of(a) != shape) wrong_value(name, "shape " + text_of(shape), text_of(shape_of(a)));
    if (reinterpret_cast<std::uintptr_t>(a.data()) % std::uintptr_t(a.itemsize()) != 0)
      wrong_value(name, "an aligned array", "one that is not");
  }

  // A matrix with contiguous rows, or with `either`, contiguous columns.
  Matrix matrix(const char* name, H object, const Shape& shape, bool written,
                bool either = false) const {
    const py::array a = array_of(name, object);
    check(name, a, shape);
    index_t row = index_t(a.strides(0)), col = index_t(a.strides(1));
    const index_t item = index_t(a.itemsize());
    if (shape[1] == 1 && !(either && row == item)) col = item;
    if (shape[0] == 1 && (!either || col == item)) row = shape[1] * item;
    const bool whole = row % item == 0 && col % item == 0;
    if (a.size() > 0 && !(whole && (col == item || (either && row == item))))
      wrong_value(name, either ? "rows or columns without gaps" : "rows without gaps",
                  "strides (" + std::to_string(row) + ", " + std::to_string(col) + ")");
    if (written && !a.writeable()) wrong_value(name, "a writeable array", "a read-only one");
    return {static_cast<char*>(const_cast<void*>(a.data())), row, col};
  }
  Matrix optional(const char* name, H object, const Shape& shape, bool written) const {
    return object.is_none() ? Matrix{nullptr, 0, 0} : matrix(name, object, shape, written);
  }

  void* vector(const char* name, H object, index_t n, bool written) const {
    const py::array a = array_of(name, object);
    check(name, a, {n});
    if (n > 1 && a.strides(0) != a.itemsize())
      wrong_value(name, "a contiguous array", "stride " + std::to_string(a.strides(0)));
    if (written && !a.writeable()) wrong_value(name, "a writeable array", "a read-only one");
    return const_cast<void*>(a.data());
  }
  void* optional(const char* name, H object, index_t n, bool written) const {
    return object.is_none() ? nullptr : vector(name, object, n, written);
  }

  template <class F> void run(F&& f) const {
    kernel_table();
    const int threads = get_num_threads();
    run_without_gil([&](Loop& loop) { return f(Run{dtype, threads, loop}); });
  }
};

Shape matrix_shape(const char* name, H object) {
  const py::array a = array_of(name, object);
  if (a.ndim() != 2) wrong_value(name, "a matrix", "shape " + text_of(shape_of(a)));
  return shape_of(a);
}

const index_t* indices(const char* name, H object, index_t n, index_t below) {
  const py::array a = array_of(name, object);
  if (a.dtype().kind() != 'i' || a.itemsize() != 8) wrong_type(name, "int64", dtype_name(a));
  if (shape_of(a) != Shape{n} || (n > 1 && a.strides(0) != 8))
    wrong_value(name, "a contiguous array of shape " + text_of({n}), text_of(shape_of(a)));
  const auto* values = static_cast<const index_t*>(a.data());
  for (index_t i = 0; i < n; i++)
    if (values[i] < 0 || values[i] >= below)
      wrong_value(name, "values in [0, " + std::to_string(below) + ")", std::to_string(values[i]));
  return values;
}

Then then_of(const std::string& name) {
  if (name == "nothing") return Then::nothing;
  if (name == "relu") return Then::relu;
  if (name == "gelu") return Then::gelu;
  if (name == "gelu_tanh") return Then::gelu_tanh;
  if (name == "tanh") return Then::tanh;
  if (name == "times") return Then::times;
  wrong_value("then", "'nothing', 'relu', 'gelu', 'gelu_tanh', 'tanh' or 'times'",
              "'" + name + "'");
}

void product(H a, H b, H c, H bias, H added, H slope, H row_sums, const std::string& then) {
  const Operands all("a", a);
  const Shape sa = matrix_shape("a", a), sb = matrix_shape("b", b);
  Product p;
  p.m = sa[0];
  p.k = sa[1];
  p.n = sb[1];
  p.a = all.matrix("a", a, sa, false, true);
  p.b = all.matrix("b", b, {p.k, p.n}, false, true);
  p.c = all.matrix("c", c, {p.m, p.n}, true);
  p.bias = all.optional("bias", bias, p.n, false);
  p.added = all.optional("added", added, {p.m, p.n}, false);
  p.then = then_of(then);
  p.slope = all.optional("slope", slope, {p.m, p.n}, p.then != Then::times);
  if (p.then == Then::times && !p.slope.data) wrong_value("slope", "an array for 'times'", "None");
  p.row_sums = all.optional("row_sums", row_sums, p.m, true);
  if (p.row_sums && p.m > 1 && p.k > 0 && p.a.row != index_t(all.numpy.itemsize()))
    wrong_value("row_sums", "an a whose columns have no gaps", "one whose rows have none");
  if (p.row_sums && (p.m == 1 || p.k == 0)) {  // a single row is a single column, transposed
    p.a.row = index_t(all.numpy.itemsize());
    p.a.col = index_t(array_of("a", a).strides(1));
  }
  all.run([&](const Run& run) { return run_product(run, p); });
}

void activate(H y, H slope, const std::string& then) {
  const Operands all("y", y);
  const Shape s = matrix_shape("y", y);
  Product p{};
  p.m = s[0];
  p.n = s[1];
  p.c = all.matrix("y", y, s, true);
  p.slope = all.matrix("slope", slope, s, true);
  p.then = then_of(then);
  all.run([&](const Run& run) { return run_activate(run, p); });
}

void layer_norm(H x, H y, H weight, H bias, H mean, H rstd, double eps) {
  const Operands all("x", x);
  const Shape s = matrix_shape("x", x);
  const LayerNorm n{all.matrix("x", x, s, false),
                    all.matrix("y", y, s, true),
                    all.vector("weight", weight, s[1], false),
                    all.vector("bias", bias, s[1], false),
                    all.vector("mean", mean, s[0], true),
                    all.vector("rstd", rstd, s[0], true),
                    s[1],
                    eps};
  all.run([&](const Run& run) { return run_layer_norm(run, n, s[0]); });
}

void layer_norm_backward(H x, H dy, H dx, H weight, H mean, H rstd, H dweight, H dbias) {
  const Operands all("x", x);
  const Shape s = matrix_shape("x", x);
  const LayerNormBackward n{all.matrix("x", x, s, false),
                            all.matrix("dy", dy, s, false),
                            all.matrix("dx", dx, s, true),
                            all.vector("weight", weight, s[1], false),
                            all.vector("mean", mean, s[0], false),
                            all.vector("rstd", rstd, s[0], false),
                            all.vector("dweight", dweight, s[1], true),
                            all.vector("dbias", dbias, s[1], true),
                            s[1]};
  all.run([&](const Run& run) { return run_layer_norm_backward(run, n, s[0]); });
}

void adamw(H p, H g, H m, H v, double scale, double b1, double b2, double rate, double root,
           double shrink, double eps) {
  const Operands all("p", p);
  const index_t n = index_t(array_of("p", p).size());
  const AdamW a{all.vector("p", p, n, true),
                all.vector("m", m, n, true),
                all.vector("v", v, n, true),
                all.vector("g", g, n, false),
                scale,
                b1,
                b2,
                rate,
                root,
                shrink,
                eps};
  all.run([&](const Run& run) { return run_adamw(run, a, n); });
}

double sum_of_squares(H x) {
  const Operands all("x", x);
  const index_t n = index_t(array_of("x", x).size());
  const void* data = all.vector("x", x, n, false);
  double sum = 0;
  all.run([&](const Run& run) { return run_sum_of_squares(run, data, n, sum); });
  return sum;
}

void log_sum_exp(H x, H lse) {
  const Operands all("x", x);
  const Shape s = matrix_shape("x", x);
  const Softmax task{all.matrix("x", x, s, false), all.vector("lse", lse, s[0], true), nullptr,
                     Matrix{nullptr, 0, 0}, s[1]};
  all.run([&](const Run& run) { return run_log_sum_exp(run, task, s[0]); });
}

void softmax_gradient(H x, H lse, H share, H dx) {
  const Operands all("x", x);
  const Shape s = matrix_shape("x", x);
  const Softmax task{all.matrix("x", x, s, false), all.vector("lse", lse, s[0], false),
                     all.vector("share", share, s[0], false), all.matrix("dx", dx, s, true), s[1]};
  all.run([&](const Run& run) { return run_softmax_gradient(run, task, s[0]); });
}

void gather_sum(const py::list& tables, const py::list& ids, H y) {
  const Operands all("y", y);
  const Shape s = matrix_shape("y", y);
  if (tables.empty() || tables.size() > TABLES || tables.size() != ids.size())
    wrong_value("tables", "one to three, with an array of ids for each",
                std::to_string(tables.size()) + " and " + std::to_string(ids.size()));
  Gather g{};
  g.width = s[1];
  g.y = all.matrix("y", y, s, true);
  for (std::size_t i = 0; i < tables.size(); i++) {
    const index_t rows = matrix_shape("tables", tables[i])[0];
    g.tables[i] = all.matrix("tables", tables[i], {rows, s[1]}, false);
    g.ids[i] = indices("ids", ids[i], s[0], rows);
  }
  all.run([&](const Run& run) { return run_gather(run, g, s[0]); });
}

void scatter_sum(H x, H order, H first, H rows, H y) {
  const Operands all("x", x);
  const Shape sx = matrix_shape("x", x), sy = matrix_shape("y", y);
  const index_t sums = index_t(array_of("rows", rows).size());
  const index_t count = index_t(array_of("order", order).size());
  Scatter s{};
  s.width = sx[1];
  s.x = all.matrix("x", x, sx, false);
  s.y = all.matrix("y", y, {sy[0], sx[1]}, true);
  s.order = indices("order", order, count, sx[0]);
  s.first = indices("first", first, sums + 1, count + 1);
  s.rows = indices("rows", rows, sums, sy[0]);
  all.run([&](const Run& run) { return run_scatter(run, s, sums); });
}

void drop_rows(H x, H added, H y, std::uint64_t seed, std::uint32_t threshold, double scale) {
  const Operands all("x", x);
  const Shape s = matrix_shape("x", x);
  const DropRows d{all.matrix("x", x, s, false),
                   all.optional("added", added, s, false),
                   all.matrix("y", y, s, true),
                   seed,
                   threshold,
                   scale,
                   s[1]};
  all.run([&](const Run& run) { return run_drop_rows(run, d, s[0]); });
}

}  // namespace

void bind_layers(py::module_& m) {
  using py::literals::operator""_a;
  m.def("product", &product,
        "c = then(added + bias + a b) with then 'nothing', 'relu', 'gelu', 'gelu_tanh' or 'tanh',\n"
        "whose slope goes to slope; or 'times' slope. The sums of a's rows go to row_sums.",
        "a"_a, "b"_a, "c"_a, "bias"_a, "added"_a, "slope"_a, "row_sums"_a, "then"_a);
  m.def("activate", &activate, "y = then(y) in place; its slope goes to slope.", "y"_a, "slope"_a,
        "then"_a);
  m.def("layer_norm", &layer_norm, "y = (x - mean) * rstd * weight + bias for each row.", "x"_a,
        "y"_a, "weight"_a, "bias"_a, "mean"_a, "rstd"_a, "eps"_a);
  m.def("layer_norm_backward", &layer_norm_backward, "Its gradients: dx, dweight, dbias.", "x"_a,
        "dy"_a, "dx"_a, "weight"_a, "mean"_a, "rstd"_a, "dweight"_a, "dbias"_a);
  m.def("adamw", &adamw,
        "One step in place. m += (1 - b1)(g - m) and v += (1 - b2)(g^2 - v), g being scaled;\n"
        "p = p * shrink - rate * m / (sqrt(v) * root + eps).",
        "p"_a, "g"_a, "m"_a, "v"_a, "scale"_a, "b1"_a, "b2"_a, "rate"_a, "root"_a, "shrink"_a,
        "eps"_a);
  m.def("sum_of_squares", &sum_of_squares,
        "The sum of the squares of x in float64, in an order that does not depend on the CPU.",
        "x"_a);
  m.def("log_sum_exp", &log_sum_exp, "lse = log(sum(exp(x))) for each row.", "x"_a, "lse"_a);
  m.def("softmax_gradient", &softmax_gradient, "dx = exp(x - lse) * share for each row.", "x"_a,
        "lse"_a, "share"_a, "dx"_a);
  m.def("gather_sum", &gather_sum, "y[t] = the sum of tables[i][ids[i][t]].", "tables"_a, "ids"_a,
        "y"_a);
  m.def("scatter_sum", &scatter_sum,
        "y[rows[s]] = the sum of x[order[i]], i from first[s] to first[s + 1].", "x"_a, "order"_a,
        "first"_a, "rows"_a, "y"_a);
  m.def("drop_rows", &drop_rows,
        "y = added + x * scale, x where its random word is below threshold, else 0.", "x"_a,
        "added"_a, "y"_a, "seed"_a, "threshold"_a, "scale"_a);
}

}  // namespace fusedattn
