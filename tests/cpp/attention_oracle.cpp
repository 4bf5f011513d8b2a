// Attention and its gradients row by row in double precision: the formula of docs/rules.md, with
// nothing of the kernels in it.
#include <array>

#include "attention_case.h"

namespace fusedattn::test {
namespace {

bool is_allowed(const AttentionCase& c, const AttentionInputs& in, index_t i, index_t j) {
  const index_t position = i + c.offset;
  return i < c.sq - c.q_padding && j < c.sk - c.padding && j >= position - c.left &&
         j <= position + c.right && (!c.mask || in.mask[std::size_t(i * c.sk + j)]) &&
         (c.segments == c.one || in.q_segments[std::size_t(i)] == in.k_segments[std::size_t(j)]);
}

// Philox4x32-10 (Salmon et al., SC'11).
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> x, std::uint64_t seed) {
  auto k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const std::uint64_t a = std::uint64_t(x[0]) * 0xD2511F53u,
                        b = std::uint64_t(x[2]) * 0xCD9E8D57u;
    x = {std::uint32_t(b >> 32) ^ x[1] ^ k0, std::uint32_t(b), std::uint32_t(a >> 32) ^ x[3] ^ k1,
         std::uint32_t(a)};
  }
  return x;
}

// What dropout multiplies a probability by.
double kept(const AttentionCase& c, index_t b, index_t h, index_t i, index_t j) {
  if (c.dropout == 0) return 1;
  const auto words = philox(
      {std::uint32_t(j / 8), std::uint32_t(i), std::uint32_t(h), std::uint32_t(b)}, c.dropout_seed);
  const std::uint32_t half = words[std::size_t(j % 8 / 2)] >> (j % 2 ? 16 : 0) & 0xffff;
  return half >= c.dropout_threshold() >> 16 ? c.dropout_scale() : 0;
}

// Row r of an array that lies as the case says, `cols` wide.
double* row(const AttentionCase& c, Numbers& x, index_t b, index_t h, index_t r, index_t all,
            index_t rows, index_t cols) {
  return x.data() + c.at(b, h, r, all, rows, cols);
}
const double* row(const AttentionCase& c, const Numbers& x, index_t b, index_t h, index_t r,
                  index_t all, index_t rows, index_t cols) {
  return x.data() + c.at(b, h, r, all, rows, cols);
}
double dot(const double* a, const double* b, index_t n) {
  double sum = 0;
  for (index_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

struct Answer {
  Numbers out, lse, dq, dk, dv, dbias, dsinks;
};

// Query i of head h of sample b: P = softmax of the logits, dS = P (dP - rowsum(P dP) + dlse).
void add_query(const AttentionCase& c, const AttentionInputs& in, index_t b, index_t h, index_t i,
               Answer& a) {
  const index_t kv = h / c.heads_for_each(), n = c.sk;
  const double scale = c.logit_scale();
  const double *q = row(c, in.q, b, h, i, c.heads, c.sq, c.d),
               *dout = row(c, in.dout, b, h, i, c.heads, c.sq, c.d_v);
  const auto key = [&](index_t j) { return row(c, in.k, b, kv, j, c.kv_heads, n, c.d); };
  const auto value = [&](index_t j) { return row(c, in.v, b, kv, j, c.kv_heads, n, c.d_v); };
  const auto bias_at = [&](index_t j) {
    return std::size_t(c.bias == c.full ? (h * c.sq + i) * n + j : j);
  };
  Numbers p(std::size_t(n), -INFINITY), slope(std::size_t(n), 1.0), dp(std::size_t(n), 0.0);
  double top = -INFINITY, sum = 0;
  for (index_t j = 0; j < n; j++) {
    const auto at = std::size_t(j);
    if (!is_allowed(c, in, i, j)) continue;
    double s = scale * dot(q, key(j), c.d);
    if (c.softcap > 0) {
      const double t = std::tanh(s / c.softcap);
      s = c.softcap * t;
      slope[at] = 1 - t * t;
    }
    if (c.alibi) s -= in.slopes[std::size_t(b * c.heads + h)] * std::fabs(double(i + c.offset - j));
    if (c.bias != c.none) s += in.bias[bias_at(j)];
    p[at] = s;
    top = std::fmax(top, s);
  }
  if (std::isinf(top)) return;  // it sees no key
  const double sink = c.sinks ? in.sinks[std::size_t(h)] : -INFINITY;
  top = std::fmax(top, sink);
  for (double& x : p) sum += x = std::exp(x - top);
  sum += std::exp(sink - top);
  const std::size_t query = std::size_t((b * c.heads + h) * c.sq + i);
  a.lse[query] = top + std::log(sum);

  double* out = row(c, a.out, b, h, i, c.heads, c.sq, c.d_v);
  double delta = c.dlse ? -in.dlse[query] : 0;
  for (index_t j = 0; j < n; j++) {
    const auto at = std::size_t(j);
    p[at] /= sum;
    if (p[at] == 0) continue;
    const double keep = kept(c, b, h, i, j);
    double* dv = row(c, a.dv, b, kv, j, c.kv_heads, n, c.d_v);
    for (index_t x = 0; x < c.d_v; x++) {
      out[x] += p[at] * keep * value(j)[x];
      dv[x] += p[at] * keep * dout[x];
    }
    dp[at] = keep * dot(dout, value(j), c.d_v);
    delta += p[at] * dp[at];
  }
  if (c.sinks) a.dsinks[std::size_t(h)] -= std::exp(sink - a.lse[query]) * delta;
  double* dq = row(c, a.dq, b, h, i, c.heads, c.sq, c.d);
  for (index_t j = 0; j < n; j++) {
    const auto at = std::size_t(j);
    if (p[at] == 0) continue;
    const double ds = p[at] * (dp[at] - delta), along = ds * slope[at] * scale;
    if (c.bias != c.none) a.dbias[bias_at(j)] += ds;
    double* dk = row(c, a.dk, b, kv, j, c.kv_heads, n, c.d);
    for (index_t x = 0; x < c.d; x++) {
      dq[x] += along * key(j)[x];
      dk[x] += along * q[x];
    }
  }
}

}  // namespace

Results expected(const AttentionCase& c, const AttentionInputs& in) {
  Answer a{Numbers(in.dout.size()), Numbers(std::size_t(c.batch * c.heads * c.sq), -INFINITY),
           Numbers(in.q.size()),    Numbers(in.k.size()),
           Numbers(in.v.size()),    Numbers(in.bias.size()),
           Numbers(in.sinks.size())};
  for (index_t b = 0; b < c.batch; b++)
    for (index_t h = 0; h < c.heads; h++)
      for (index_t i = 0; i < c.sq; i++) add_query(c, in, b, h, i, a);
  Results all{{"out", a.out}, {"lse", a.lse}, {"dq", a.dq}, {"dk", a.dk}, {"dv", a.dv}};
  if (c.bias != c.none) all.push_back({"dbias", a.dbias});
  if (c.sinks) all.push_back({"dsinks", a.dsinks});
  return all;
}

}  // namespace fusedattn::test
