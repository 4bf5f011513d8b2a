// Products with everything that is done to a finished tile, and activations alone.
#include <numbers>

#include "layer_case.h"

namespace fusedattn::test {
namespace {

struct Shape {
  index_t m, n, k;
};
struct Options {
  bool a_transposed, b_transposed, bias, added, slope;  // a transposed: row sums are made too
  Then then;
};

const char* name_of_then(Then then) {
  switch (then) {
    case Then::relu:
      return "relu";
    case Then::gelu:
      return "gelu";
    case Then::gelu_tanh:
      return "gelu_tanh";
    case Then::tanh:
      return "tanh";
    case Then::times:
      return "times";
    case Then::nothing:
      break;
  }
  return "nothing";
}

struct Point {
  double y, slope;
};
Point activated(Then then, double x) {
  constexpr double inv_sqrt_pi = std::numbers::inv_sqrtpi, sqrt2 = std::numbers::sqrt2;
  if (then == Then::relu) return {std::fmax(x, 0), x > 0 ? 1.0 : 0.0};
  if (then == Then::gelu) {
    const double cdf = std::erfc(-x / sqrt2) / 2;
    return {x * cdf, cdf + x * std::exp(-x * x / 2) * inv_sqrt_pi / sqrt2};
  }
  if (then == Then::gelu_tanh) {
    const double c = sqrt2 * inv_sqrt_pi, t = std::tanh(c * (x + 0.044715 * x * x * x));
    return {x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * x * x)};
  }
  if (then == Then::tanh) return {std::tanh(x), 1 - std::tanh(x) * std::tanh(x)};
  return {x, 1};
}

struct Inputs {
  Numbers a, b, bias, added, slope;
};
Inputs draw(Shape s, std::uint64_t seed) {
  Draw random(seed);
  const double factor = std::ldexp(1.0, -std::ilogb(double(s.k + 1)) / 2);  // c is about 1
  return {random.numbers(s.m * s.k, factor), random.numbers(s.k * s.n), random.numbers(s.n),
          random.numbers(s.m * s.n), random.numbers(s.m * s.n)};
}

Numbers transposed(const Numbers& x, index_t rows, index_t cols) {
  Numbers y;
  for (index_t c = 0; c < cols; c++)
    for (index_t r = 0; r < rows; r++) y.push_back(x[std::size_t(r * cols + c)]);
  return y;
}

template <class T> Results product(const Run& run, Shape s, Options o, const Inputs& in) {
  Array<T> a = o.a_transposed ? Array<T>(s.k, s.m, transposed(in.a, s.m, s.k))
                              : Array<T>(s.m, s.k, in.a),
           b = o.b_transposed ? Array<T>(s.n, s.k, transposed(in.b, s.k, s.n))
                              : Array<T>(s.k, s.n, in.b),
           added(s.m, s.n, in.added), slope(s.m, s.n, in.slope), c(s.m, s.n);
  std::vector<T> bias = narrowed<T>(in.bias), row_sums(std::size_t(s.m));
  Product p{};
  p.a = o.a_transposed ? a.transposed() : a.matrix();
  p.b = o.b_transposed ? b.transposed() : b.matrix();
  p.c = c.matrix();
  if (o.added) p.added = added.matrix();
  if (o.slope) p.slope = slope.matrix();
  if (o.bias) p.bias = bias.data();
  if (o.a_transposed) p.row_sums = row_sums.data();
  p.then = o.then;
  p.m = s.m;
  p.n = s.n;
  p.k = s.k;
  if (!run_product(run, p)) return {};
  Results all{{"c", c.numbers()}};
  if (o.slope && o.then != Then::times) all.push_back({"slope", slope.numbers()});
  if (o.a_transposed) all.push_back({"row_sums", widened(row_sums)});
  return all;
}

Results product_expected(Shape s, Options o, const Inputs& in) {
  Numbers c, slope, row_sums;
  for (index_t i = 0; i < s.m; i++) {
    double sum = 0;
    for (index_t p = 0; p < s.k; p++) sum += in.a[std::size_t(i * s.k + p)];
    row_sums.push_back(sum);
    for (index_t j = 0; j < s.n; j++) {
      const auto at = std::size_t(i * s.n + j);
      double x = (o.bias ? in.bias[std::size_t(j)] : 0) + (o.added ? in.added[at] : 0);
      for (index_t p = 0; p < s.k; p++)
        x += in.a[std::size_t(i * s.k + p)] * in.b[std::size_t(p * s.n + j)];
      const Point point = activated(o.then, x);
      c.push_back(o.then == Then::times ? x * in.slope[at] : point.y);
      slope.push_back(point.slope);
    }
  }
  Results all{{"c", c}};
  if (o.slope && o.then != Then::times) all.push_back({"slope", slope});
  if (o.a_transposed) all.push_back({"row_sums", row_sums});
  return all;
}

std::string name_of_product(Shape s, Options o) {
  std::string name = "product_" + size_text(s.m, s.n);
  name.append("x").append(std::to_string(s.k)).append("_").append(name_of_then(o.then));
  if (o.a_transposed) name += "_at";
  if (o.b_transposed) name += "_bt";
  if (o.bias) name += "_bias";
  if (o.added) name += "_added";
  if (o.slope) name += "_slope";
  return name;
}

// Numbers from -8 to 8, and some for which an exponential is subnormal or 0.
constexpr double FAR[] = {10.5, 13.5, 20, 100, 1e4, 1e15};
Numbers points() {
  Numbers x;
  for (int i = -256; i <= 256; i++) x.push_back(i / 32.0);
  for (const double far : FAR) x.insert(x.end(), {far, -far});
  return x;
}
template <class T> Results activate(const Run& run, Then then) {
  const Numbers x = points();
  const auto n = index_t(x.size());
  Array<T> y(1, n, x), slope(1, n);
  Product p{};
  p.c = y.matrix();
  p.slope = slope.matrix();
  p.then = then;
  p.m = 1;
  p.n = n;
  if (!run_activate(run, p)) return {};
  // Large values would hide the small ones.
  Numbers small = y.numbers(), large(small.end() - 2 * std::ssize(FAR), small.end());
  small.resize(small.size() - large.size());
  return {{"y", small}, {"far y", large}, {"slope", slope.numbers()}};
}
Results activate_expected(Then then) {
  const Numbers x = points();
  Results all{{"y", {}}, {"far y", {}}, {"slope", {}}};
  for (std::size_t i = 0; i < x.size(); i++) {
    const Point p = activated(then, x[i]);
    all[i + 2 * std::size(FAR) < x.size() ? 0 : 1].values.push_back(p.y);
    // The formula of gelu_tanh's slope is 0 times infinity far out.
    const bool near = std::fabs(x[i]) < 20 || then == Then::tanh;
    all[2].values.push_back(near ? p.slope : x[i] > 0);
  }
  return all;
}

}  // namespace

std::vector<LayerCase> product_cases() {
  constexpr Then all[] = {Then::nothing,   Then::relu, Then::gelu,
                          Then::gelu_tanh, Then::tanh, Then::times};
  std::vector<LayerCase> cases;
  const auto add = [&](Shape s, Options o) {
    const auto in = [=] { return draw(s, std::uint64_t(s.m * 1000 + s.n + s.k)); };
    cases.push_back(layer_case(
        name_of_product(s, o), [=]<class T>(const Run& run) { return product<T>(run, s, o, in()); },
        [=] { return product_expected(s, o, in()); }));
  };
  // Every option of one shape that has a last tile in each direction.
  for (const Then then : all)
    for (int bits = 0; bits < 32; bits++) {
      const Options o{bits % 2 != 0,     bits / 2 % 2 != 0, bits / 4 % 2 != 0,
                      bits / 8 % 2 != 0, bits / 16 != 0,    then};
      if (o.slope ? then == Then::nothing : then == Then::times) continue;
      add({15, 35, 9}, o);
    }
  // Edges of tiles and panels, and k in several pieces.
  for (const Shape s : {Shape{1, 1, 1}, Shape{5, 7, 3}, Shape{33, 65, 17}, Shape{64, 128, 300},
                        Shape{6, 64, 256}, Shape{131, 70, 530}, Shape{3, 5, 0}})
    for (const bool transposed : {false, true}) {
      add(s, {transposed, false, true, false, true, Then::times});
      add(s, {false, transposed, false, true, false, Then::nothing});
    }
  for (const Then then : {Then::relu, Then::gelu, Then::gelu_tanh, Then::tanh})
    cases.push_back(layer_case(
        std::string("activate_") + name_of_then(then),
        [=]<class T>(const Run& run) { return activate<T>(run, then); },
        [=] { return activate_expected(then); }));
  return cases;
}

}  // namespace fusedattn::test
