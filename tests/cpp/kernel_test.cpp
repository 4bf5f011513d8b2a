// The kernels of every instruction set that this CPU (or the emulator) runs, against plain loops in
// double precision, without Python: for cross builds, sanitizers and clang-tidy. The Python tests
// cover far more; this one travels.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "attention/call.h"
#include "isa/dispatch.h"

using namespace fusedattn;

namespace {

struct Shape {
  index_t batch, heads, kv_heads, sq, sk, d, d_v;
  bool causal;
  index_t offset, padding;  // keys at the end that are padding
  bool dense;               // a mask and a bias over (sq, sk)
};

struct Answer {
  std::vector<double> out, lse, dq, dk, dv;
};

struct Inputs {
  std::vector<double> q, k, v, dout, bias;
  std::vector<char> mask;
};

bool allowed(const Shape& s, const Inputs& in, index_t i, index_t j) {
  return j < s.sk - s.padding && (!s.causal || j <= i + s.offset) &&
         (!s.dense || in.mask[std::size_t(i * s.sk + j)]);
}

// The formula, row by row: P = softmax(scale q k^T + bias), dS = P (dP - rowsum(P dP)).
Answer expected(const Shape& s, const Inputs& in) {
  Answer a;
  a.out.assign(std::size_t(s.batch * s.heads * s.sq * s.d_v), 0.0);
  a.lse.assign(std::size_t(s.batch * s.heads * s.sq), -INFINITY);
  a.dq.assign(in.q.size(), 0.0);
  a.dk.assign(in.k.size(), 0.0);
  a.dv.assign(in.v.size(), 0.0);
  const double scale = 1.0 / std::sqrt(double(s.d));
  std::vector<double> p(std::size_t(s.sk)), dp(std::size_t(s.sk));
  for (index_t bh = 0; bh < s.batch * s.heads; bh++) {
    const index_t kv = bh / s.heads * s.kv_heads + bh % s.heads / (s.heads / s.kv_heads);
    for (index_t i = 0; i < s.sq; i++) {
      const double *q = &in.q[std::size_t((bh * s.sq + i) * s.d)],
                   *dout = &in.dout[std::size_t((bh * s.sq + i) * s.d_v)];
      double *out = &a.out[std::size_t((bh * s.sq + i) * s.d_v)],
             *dq = &a.dq[std::size_t((bh * s.sq + i) * s.d)];
      double top = -INFINITY, sum = 0, weighted = 0;
      for (index_t j = 0; j < s.sk; j++) {
        double dot = s.dense ? in.bias[std::size_t(i * s.sk + j)] : 0;
        for (index_t c = 0; c < s.d; c++)
          dot += scale * q[c] * in.k[std::size_t((kv * s.sk + j) * s.d + c)];
        p[std::size_t(j)] = allowed(s, in, i, j) ? dot : -INFINITY;
        top = std::fmax(top, p[std::size_t(j)]);
      }
      if (std::isinf(top)) continue;
      for (double& x : p) sum += x = std::exp(x - top);
      a.lse[std::size_t(bh * s.sq + i)] = top + std::log(sum);
      for (index_t j = 0; j < s.sk; j++) {
        const double* v = &in.v[std::size_t((kv * s.sk + j) * s.d_v)];
        double* dv = &a.dv[std::size_t((kv * s.sk + j) * s.d_v)];
        double& x = p[std::size_t(j)];
        x /= sum;
        dp[std::size_t(j)] = 0;
        for (index_t c = 0; c < s.d_v; c++) {
          out[c] += x * v[c];
          dv[c] += x * dout[c];
          dp[std::size_t(j)] += dout[c] * v[c];
        }
        weighted += x * dp[std::size_t(j)];
      }
      for (index_t j = 0; j < s.sk; j++) {
        const double ds = scale * p[std::size_t(j)] * (dp[std::size_t(j)] - weighted);
        for (index_t c = 0; c < s.d; c++) {
          dq[c] += ds * in.k[std::size_t((kv * s.sk + j) * s.d + c)];
          a.dk[std::size_t((kv * s.sk + j) * s.d + c)] += ds * q[c];
        }
      }
    }
  }
  return a;
}

template <class T>
Tensor tensor(std::vector<T>& data, const Shape& s, index_t heads, index_t rows, index_t cols) {
  Tensor t;
  const index_t size = sizeof(T);
  t.data = reinterpret_cast<char*>(data.data());
  for (index_t b = 0; b < s.batch; b++) t.batch.push_back(b * heads * rows * cols * size);
  t.head = rows * cols * size;
  t.row = cols * size;
  t.col = size;
  return t;
}

// bfloat16: the upper half of a float32.
struct BFloat {
  std::uint16_t bits = 0;
  BFloat() = default;
  explicit BFloat(double x) {  // to nearest even; no NaN comes here
    const auto w = std::bit_cast<std::uint32_t>(float(x));
    bits = std::uint16_t((w + 0x7fff + ((w >> 16) & 1)) >> 16);
  }
  explicit operator double() const {
    return double(std::bit_cast<float>(std::uint32_t(bits) << 16));
  }
};
template <class T> using Compute = std::conditional_t<std::is_same_v<T, BFloat>, float, T>;

template <class T> std::vector<T> narrowed(const std::vector<double>& x) {
  std::vector<T> y;
  for (const double e : x) y.push_back(T(e));
  return y;
}
template <class T> std::vector<double> widened(const std::vector<T>& x) {
  std::vector<double> y;
  for (const T& e : x) y.push_back(double(e));
  return y;
}

template <class T> Answer computed(const Shape& s, const Inputs& in, int threads) {
  auto q = narrowed<T>(in.q), k = narrowed<T>(in.k), v = narrowed<T>(in.v),
       dout = narrowed<T>(in.dout), bias = narrowed<T>(in.bias);
  std::vector<char> mask = in.mask;
  std::vector<T> out(dout.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<Compute<T>> lse(std::size_t(s.batch * s.heads * s.sq));
  Call c;
  c.dtype = sizeof(T) == 2 ? DType::bfloat16 : sizeof(T) == 4 ? DType::float32 : DType::float64;
  c.batch = s.batch;
  c.heads = s.heads;
  c.kv_heads = s.kv_heads;
  c.d = s.d;
  c.d_v = s.d_v;
  c.sq.assign(std::size_t(s.batch), s.sq);
  c.sk.assign(std::size_t(s.batch), s.sk);
  c.q_offset.assign(std::size_t(s.batch), s.offset);
  c.q_length = c.sq;
  c.kv_length.assign(std::size_t(s.batch), s.sk - s.padding);
  c.q = tensor(q, s, s.heads, s.sq, s.d);
  c.k = tensor(k, s, s.kv_heads, s.sk, s.d);
  c.v = tensor(v, s, s.kv_heads, s.sk, s.d_v);
  c.out = tensor(out, s, s.heads, s.sq, s.d_v);
  c.dout = tensor(dout, s, s.heads, s.sq, s.d_v);
  c.dq = tensor(dq, s, s.heads, s.sq, s.d);
  c.dk = tensor(dk, s, s.kv_heads, s.sk, s.d);
  c.dv = tensor(dv, s, s.kv_heads, s.sk, s.d_v);
  if (s.dense) {  // one (sq, sk) for all heads and samples: stride 0
    c.mask = {mask.data(), std::vector<index_t>(std::size_t(s.batch), 0), 0, s.sk, 1};
    c.bias = {reinterpret_cast<char*>(bias.data()), std::vector<index_t>(std::size_t(s.batch), 0),
              0, s.sk * index_t(sizeof(T)), sizeof(T)};
  }
  c.lse = reinterpret_cast<char*>(lse.data());
  for (index_t b = 0; b < s.batch; b++) c.lse_batch.push_back(b * s.heads * s.sq);
  c.lse_head = s.sq;
  c.scale = 1.0 / std::sqrt(double(s.d));
  if (s.causal) c.right = 0;
  c.threads = threads;
  Loop forward{}, backward{};
  if (!attention_forward(c, forward) || !attention_backward(c, backward)) return {};
  return {widened(out), widened(lse), widened(dq), widened(dk), widened(dv)};
}

// Largest difference in units of eps times the largest expected value; infinite for a NaN or a
// wrong infinity.
double error(const std::vector<double>& got, const std::vector<double>& want, double eps) {
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

int failures = 0;

void check(const std::string& isa, const char* dtype, const Shape& s, const char* what, double got,
           double limit) {
  if (got <= limit) return;
  failures++;
  std::printf(
      "FAILED %s %s %s: error %.1f eps, at most %.0f (B%d H%d/%d Sq%d Sk%d D%d/%d causal %d dense "
      "%d)\n",
      isa.c_str(), dtype, what, got, limit, int(s.batch), int(s.heads), int(s.kv_heads), int(s.sq),
      int(s.sk), int(s.d), int(s.d_v), int(s.causal), int(s.dense));
}

template <class T>
void test(const std::string& isa, const Shape& s, const Inputs& in, const Answer& want,
          const char* dtype) {
  const bool narrow = sizeof(T) == 2;
  const double sums = std::numeric_limits<Compute<T>>::epsilon(), eps = narrow ? 0x1p-8 : sums;
  const double forward = narrow ? 1 : 20, backward = narrow ? 4 : 40;
  const Answer got = computed<T>(s, in, 1), again = computed<T>(s, in, 3);
  check(isa, dtype, s, "out", error(got.out, want.out, eps), forward);
  check(isa, dtype, s, "lse", error(got.lse, want.lse, sums), 20);
  check(isa, dtype, s, "dq", error(got.dq, want.dq, eps), backward);
  check(isa, dtype, s, "dk", error(got.dk, want.dk, eps), backward);
  check(isa, dtype, s, "dv", error(got.dv, want.dv, eps), backward);
  const bool same = got.out == again.out && got.lse == again.lse && got.dq == again.dq &&
                    got.dk == again.dk && got.dv == again.dv;
  check(isa, dtype, s, "same bits with three threads", same ? 0 : INFINITY, 0);
}

Inputs draw(const Shape& s, unsigned seed) {
  std::mt19937 bits(seed);
  // float values, so that both precisions see the same numbers
  const auto fill = [&](index_t n) {
    std::normal_distribution<float> normal;
    std::vector<double> x(static_cast<std::size_t>(n));
    for (double& e : x) e = double(normal(bits));
    return x;
  };
  Inputs in{fill(s.batch * s.heads * s.sq * s.d),
            fill(s.batch * s.kv_heads * s.sk * s.d),
            fill(s.batch * s.kv_heads * s.sk * s.d_v),
            fill(s.batch * s.heads * s.sq * s.d_v),
            fill(s.sq * s.sk),
            {}};
  for (index_t i = 0; i < s.sq * s.sk; i++) in.mask.push_back(bits() % 3 != 0);
  return in;
}

}  // namespace

int main() {
  std::vector<Shape> shapes = {
      {1, 1, 1, 1, 1, 1, 1, false, 0, 0, false},
      {2, 3, 3, 5, 7, 3, 2, false, 0, 0, false},
      {1, 2, 1, 33, 65, 17, 33, false, 0, 0, false},
      {1, 4, 2, 64, 128, 64, 64, false, 0, 0, false},
      {1, 2, 2, 129, 257, 40, 24, true, 0, 0, false},
      {2, 2, 1, 70, 70, 32, 32, true, 0, 0, false},
      {1, 2, 2, 40, 200, 16, 16, true, 160, 0, false},
      {1, 1, 1, 20, 20, 8, 8, true, -5, 0, false},
      {2, 2, 2, 31, 130, 16, 48, false, 0, 17, false},
      {1, 2, 1, 37, 150, 20, 20, false, 0, 3, true},
      {1, 2, 2, 100, 100, 64, 64, true, 0, 0, true},
      {1, 1, 1, 300, 300, 96, 80, false, 0, 0, false},
  };
  for (index_t n : {2, 3, 4, 8, 9, 15, 16, 17, 31, 32})
    shapes.push_back({1, 2, 2, n, n + 1, n, n, n % 2 == 0, 0, 0, false});
  unsigned seed = 0;
  for (const Shape& s : shapes) {
    const Inputs in = draw(s, seed++);
    const Answer want = expected(s, in);
    Inputs low = in;  // what bfloat16 can hold
    for (auto* x : {&low.q, &low.k, &low.v, &low.dout, &low.bias})
      *x = widened(narrowed<BFloat>(*x));
    const Answer low_want = expected(s, low);
    for (const std::string& isa : supported_isas()) {
      set_isa(isa);
      test<float>(isa, s, in, want, "float32");
      test<double>(isa, s, in, want, "float64");
      test<BFloat>(isa, s, low, low_want, "bfloat16");
    }
  }
  std::string names;
  for (const std::string& isa : supported_isas()) names += " " + isa;
  std::printf("%d shapes, instruction sets:%s: %d failures\n", int(shapes.size()), names.c_str(),
              failures);
  return failures != 0;
}
