// Layer norm forward and backward, AdamW, softmax over a vocabulary.
#include "layer_case.h"

namespace fusedattn::test {
namespace {

constexpr double EPS = 0x1p-20;  // of layer norm; the same number in float32 and float64

std::size_t at(index_t row, index_t cols, index_t col) {
  return std::size_t(row * cols + col);
}

// --- layer norm

struct NormInputs {
  Numbers x, dy, weight, bias, mean, rstd;  // backward takes any mean and rstd
};
NormInputs norm_inputs(index_t rows, index_t width) {
  Draw random(std::uint64_t(rows * 1000 + width));
  NormInputs in{random.numbers(rows * width), random.numbers(rows * width),
                random.numbers(width),        random.numbers(width),
                random.numbers(rows, 0.125),  random.numbers(rows, 0.125)};
  for (double& r : in.rstd) r += 1;
  return in;
}

template <class T> Results layer_norm(const Run& run, index_t rows, index_t width) {
  const NormInputs in = norm_inputs(rows, width);
  Array<T> x(rows, width, in.x), y(rows, width);
  const auto weight = narrowed<T>(in.weight), bias = narrowed<T>(in.bias);
  std::vector<T> mean(std::size_t(rows), 0), rstd = mean;
  const LayerNorm n{x.matrix(),  y.matrix(),  weight.data(), bias.data(),
                    mean.data(), rstd.data(), width,         EPS};
  if (!run_layer_norm(run, n, rows)) return {};
  return {{"y", y.numbers()}, {"mean", widened(mean)}, {"rstd", widened(rstd)}};
}
Results layer_norm_expected(index_t rows, index_t width) {
  const NormInputs in = norm_inputs(rows, width);
  Results all{{"y", {}}, {"mean", {}}, {"rstd", {}}};
  for (index_t r = 0; r < rows; r++) {
    double mean = 0, variance = 0;
    for (index_t c = 0; c < width; c++) mean += in.x[at(r, width, c)] / double(width);
    for (index_t c = 0; c < width; c++)
      variance += std::pow(in.x[at(r, width, c)] - mean, 2) / double(width);
    const double rstd = 1 / std::sqrt(variance + EPS);
    all[1].values.push_back(mean);
    all[2].values.push_back(rstd);
    for (index_t c = 0; c < width; c++)
      all[0].values.push_back((in.x[at(r, width, c)] - mean) * rstd * in.weight[std::size_t(c)] +
                              in.bias[std::size_t(c)]);
  }
  return all;
}

template <class T> Results layer_norm_backward(const Run& run, index_t rows, index_t width) {
  const NormInputs in = norm_inputs(rows, width);
  Array<T> x(rows, width, in.x), dy(rows, width, in.dy), dx(rows, width);
  const auto weight = narrowed<T>(in.weight), mean = narrowed<T>(in.mean),
             rstd = narrowed<T>(in.rstd);
  std::vector<T> dweight(std::size_t(width), 0), dbias = dweight;
  const LayerNormBackward n{x.matrix(),  dy.matrix(),    dx.matrix(),  weight.data(), mean.data(),
                            rstd.data(), dweight.data(), dbias.data(), width};
  if (!run_layer_norm_backward(run, n, rows)) return {};
  return {{"dx", dx.numbers()}, {"dweight", widened(dweight)}, {"dbias", widened(dbias)}};
}
Results layer_norm_backward_expected(index_t rows, index_t width) {
  const NormInputs in = norm_inputs(rows, width);
  Results all{
      {"dx", {}}, {"dweight", Numbers(std::size_t(width))}, {"dbias", Numbers(std::size_t(width))}};
  for (index_t r = 0; r < rows; r++) {
    const double mean = in.mean[std::size_t(r)], rstd = in.rstd[std::size_t(r)];
    Numbers h, g;
    double mean_g = 0, mean_gh = 0;
    for (index_t c = 0; c < width; c++) {
      const double dy = in.dy[at(r, width, c)];
      h.push_back((in.x[at(r, width, c)] - mean) * rstd);
      g.push_back(dy * in.weight[std::size_t(c)]);
      mean_g += g.back() / double(width);
      mean_gh += g.back() * h.back() / double(width);
      all[1].values[std::size_t(c)] += dy * h.back();
      all[2].values[std::size_t(c)] += dy;
    }
    for (std::size_t c = 0; c < h.size(); c++)
      all[0].values.push_back(rstd * (g[c] - mean_g - h[c] * mean_gh));
  }
  return all;
}

// --- AdamW

struct AdamInputs {
  Numbers p, m, v, g;
};
AdamInputs adam_inputs(index_t n) {
  Draw random{std::uint64_t(n)};
  AdamInputs in{random.numbers(n), random.numbers(n), random.numbers(n), random.numbers(n)};
  for (double& v : in.v) v = std::fabs(v);
  return in;
}
constexpr AdamW ADAM{nullptr, nullptr, nullptr, nullptr,      0.75,   0.875,
                     0.96875, 0x1p-7,  1.25,    0.9990234375, 0x1p-20};

template <class T> Results adamw(const Run& run, index_t n) {
  const AdamInputs in = adam_inputs(n);
  auto p = narrowed<T>(in.p), m = narrowed<T>(in.m), v = narrowed<T>(in.v);
  const auto g = narrowed<T>(in.g);
  AdamW a = ADAM;
  a.p = p.data();
  a.m = m.data();
  a.v = v.data();
  a.g = g.data();
  double squares = 0;
  if (!run_adamw(run, a, n) || !run_sum_of_squares(run, g.data(), n, squares)) return {};
  return {{"p", widened(p)}, {"m", widened(m)}, {"v", widened(v)}, {"squares of g", {squares}}};
}
Results adamw_expected(index_t n) {
  const AdamInputs in = adam_inputs(n);
  Results all{{"p", in.p}, {"m", in.m}, {"v", in.v}, {"squares of g", {}}};
  long double squares = 0;
  for (std::size_t i = 0; i < in.p.size(); i++) {
    double &p = all[0].values[i], &m = all[1].values[i], &v = all[2].values[i];
    const double g = in.g[i] * ADAM.scale;
    squares += static_cast<long double>(in.g[i]) * in.g[i];
    m += (1 - ADAM.b1) * (g - m);
    v += (1 - ADAM.b2) * (g * g - v);
    p = p * ADAM.shrink - ADAM.rate * m / (std::sqrt(v) * ADAM.root + ADAM.eps);
  }
  all[3].values.push_back(double(squares));
  return all;
}

// --- softmax

struct SoftmaxInputs {
  Numbers x, lse, share;  // the gradient takes any lse
};
SoftmaxInputs softmax_inputs(index_t rows, index_t classes) {
  Draw random(std::uint64_t(rows * 1000 + classes));
  SoftmaxInputs in{random.numbers(rows * classes, 4), random.numbers(rows), random.numbers(rows)};
  for (double& l : in.lse) l += 8;
  return in;
}

template <class T> Results softmax(const Run& run, index_t rows, index_t classes) {
  const SoftmaxInputs in = softmax_inputs(rows, classes);
  Array<T> x(rows, classes, in.x), dx(rows, classes);
  auto given = narrowed<T>(in.lse);
  const auto share = narrowed<T>(in.share);
  std::vector<T> lse(std::size_t(rows), 0);
  Softmax s{x.matrix(), lse.data(), nullptr, {}, classes};
  if (!run_log_sum_exp(run, s, rows)) return {};
  s = {x.matrix(), given.data(), share.data(), dx.matrix(), classes};
  if (!run_softmax_gradient(run, s, rows)) return {};
  return {{"lse", widened(lse)}, {"dx", dx.numbers()}};
}
Results softmax_expected(index_t rows, index_t classes) {
  const SoftmaxInputs in = softmax_inputs(rows, classes);
  Results all{{"lse", {}}, {"dx", {}}};
  for (index_t r = 0; r < rows; r++) {
    double sum = 0;
    for (index_t c = 0; c < classes; c++) {
      const double x = in.x[at(r, classes, c)];
      sum += std::exp(x);
      all[1].values.push_back(in.share[std::size_t(r)] * std::exp(x - in.lse[std::size_t(r)]));
    }
    all[0].values.push_back(std::log(sum));
  }
  return all;
}

}  // namespace

std::vector<LayerCase> elementwise_cases() {
  std::vector<LayerCase> cases;
  for (const index_t width : LAYER_WIDTHS) {
    const index_t rows = rows_for(width);
    const std::string size = size_text(rows, width);
    cases.push_back(layer_case(
        "layer_norm_" + size,
        [=]<class T>(const Run& run) { return layer_norm<T>(run, rows, width); },
        [=] { return layer_norm_expected(rows, width); }));
    cases.push_back(layer_case(
        "layer_norm_backward_" + size,
        [=]<class T>(const Run& run) { return layer_norm_backward<T>(run, rows, width); },
        [=] { return layer_norm_backward_expected(rows, width); }));
    cases.push_back(layer_case(
        "adamw_" + size, [=]<class T>(const Run& run) { return adamw<T>(run, rows * width); },
        [=] { return adamw_expected(rows * width); }));
    cases.push_back(layer_case(
        "softmax_" + size, [=]<class T>(const Run& run) { return softmax<T>(run, rows, width); },
        [=] { return softmax_expected(rows, width); }));
  }
  return cases;
}

}  // namespace fusedattn::test
