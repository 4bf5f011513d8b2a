// The list of calls, their inputs, and how one becomes a Call of the kernels.
#include "attention_case.h"

namespace fusedattn::test {

const std::vector<AttentionCase>& attention_cases() {
  using C = AttentionCase;
  static const std::vector<C> cases = {
      {.name = "plain", .sq = 129, .sk = 257, .d = 40, .d_v = 24},
      {.name = "grouped", .heads = 4, .kv_heads = 2, .sq = 64, .sk = 128, .d = 64, .d_v = 64},
      {.name = "large", .heads = 1, .kv_heads = 1, .sq = 300, .sk = 300, .d = 96, .d_v = 80},
      {.name = "batch", .batch = 2, .heads = 3, .kv_heads = 3, .sq = 31, .sk = 70, .d = 80},
      {.name = "bshd", .batch = 2, .sq = 70, .sk = 70, .d = 32, .d_v = 32, .bshd = true},
      {.name = "causal", .batch = 2, .kv_heads = 1, .sq = 129, .sk = 129, .d = 48, .right = 0},
      {.name = "causal_later", .sk = 200, .offset = 160, .right = 0},
      {.name = "causal_some_see_nothing", .sq = 20, .sk = 20, .offset = -5, .right = 0},
      {.name = "window", .sq = 140, .sk = 140, .left = 20, .right = 7},
      {.name = "window_causal", .sq = 140, .sk = 140, .left = 33, .right = 0},
      {.name = "padding",
       .batch = 2,
       .sq = 31,
       .sk = 130,
       .d_v = 48,
       .q_padding = 4,
       .padding = 17},
      {.name = "segments", .sq = 150, .sk = 150, .segments = C::in_runs},
      {.name = "segments_scattered", .sq = 90, .sk = 150, .segments = C::scattered},
      {.name = "mask", .batch = 2, .sq = 37, .sk = 150, .d = 20, .mask = true},
      {.name = "mask_causal", .sq = 100, .sk = 100, .d = 64, .d_v = 64, .right = 0, .mask = true},
      {.name = "bias", .batch = 2, .sq = 37, .sk = 150, .d = 20, .d_v = 20, .bias = C::full},
      {.name = "bias_per_key", .batch = 2, .sq = 70, .sk = 150, .bias = C::per_key},
      {.name = "bias_mask", .sq = 64, .sk = 128, .mask = true, .bias = C::full},
      {.name = "softcap", .sq = 70, .sk = 150, .softcap = 2},
      {.name = "alibi", .batch = 2, .sq = 70, .sk = 150, .offset = 30, .alibi = true},
      {.name = "sinks", .batch = 2, .sinks = true},
      {.name = "dropout", .batch = 2, .sq = 70, .sk = 150, .dropout = 0.25},
      {.name = "dlse", .dlse = true},
      {.name = "pages", .batch = 2, .kv_heads = 1, .sq = 33, .sk = 150, .page_rows = 16},
      {.name = "scale", .scale = 0x1p-22, .q_factor = 0x1p20, .fits_float16 = false},
      {.name = "peaked", .sq = 33, .d = 32, .q_factor = 4},
      {.name = "few", .heads = 4, .sq = 2, .sk = 300, .d = 32, .d_v = 40},
      {.name = "few_rules",
       .heads = 4,
       .kv_heads = 1,
       .sq = 2,
       .sk = 300,
       .offset = 290,
       .right = 0,
       .mask = true,
       .bias = C::full,
       .softcap = 3,
       .alibi = true,
       .sinks = true},
      {.name = "few_pages", .heads = 3, .kv_heads = 1, .sq = 1, .sk = 150, .page_rows = 16},
      {.name = "everything",
       .batch = 2,
       .heads = 4,
       .sq = 90,
       .sk = 150,
       .d = 24,
       .d_v = 40,
       .offset = 20,
       .left = 70,
       .right = 40,
       .q_padding = 3,
       .padding = 9,
       .segments = C::scattered,
       .mask = true,
       .bias = C::full,
       .softcap = 4,
       .dropout = 0.125,
       .alibi = true,
       .sinks = true,
       .dlse = true,
       .bshd = true},
  };
  return cases;
}

std::vector<AttentionCase> attention_sizes() {
  std::vector<AttentionCase> cases = {
      {.name = "one", .heads = 1, .kv_heads = 1, .sq = 1, .sk = 1, .d = 1, .d_v = 1},
      {.name = "odd", .batch = 2, .heads = 3, .kv_heads = 3, .sq = 5, .sk = 7, .d = 3, .d_v = 2},
      {.name = "odd", .kv_heads = 1, .sq = 33, .sk = 65, .d = 17, .d_v = 33}};
  for (index_t n : {2, 3, 4, 8, 9, 15, 16, 17, 31, 32})
    cases.push_back({.name = "size",
                     .batch = 2,
                     .heads = 4,
                     .sq = n,
                     .sk = n + 1,
                     .d = n,
                     .d_v = n,
                     .right = n % 8 == 0 ? 0 : UNBOUNDED});
  return cases;
}

AttentionInputs draw(const AttentionCase& c, std::uint64_t seed) {
  Draw random(seed);
  AttentionInputs in;
  in.q = random.numbers(c.batch * c.heads * c.sq * c.d, c.q_factor);
  in.k = random.numbers(c.batch * c.kv_heads * c.sk * c.d);
  in.v = random.numbers(c.batch * c.kv_heads * c.sk * c.d_v);
  in.dout = random.numbers(c.batch * c.heads * c.sq * c.d_v);
  if (c.bias != c.none) in.bias = random.numbers(c.bias == c.full ? c.heads * c.sq * c.sk : c.sk);
  if (c.dlse) in.dlse = random.numbers(c.batch * c.heads * c.sq);
  for (index_t i = 0; i < c.sq * c.sk && c.mask; i++) in.mask.push_back(random.below(3) != 0);
  for (index_t h = 0; h < c.batch * c.heads && c.alibi; h++)
    in.slopes.push_back(std::ldexp(1.0, int(-2 - h % c.heads)));
  for (index_t h = 0; h < c.heads && c.sinks; h++) in.sinks.push_back(0.5 * double(h) - 0.25);
  const auto segments = [&](index_t n) {
    std::vector<index_t> of;
    for (index_t i = 0; i < n; i++)
      of.push_back(c.segments == c.in_runs ? i * 4 / n : random.below(3));
    return of;
  };
  in.q_segments = segments(c.sq);
  in.k_segments = segments(c.sk);
  return in;
}

namespace {

// (heads, rows, cols) of each sample, as the case lies in memory.
template <class T>
Tensor tensor(std::vector<T>& data, const AttentionCase& c, index_t heads, index_t rows,
              index_t cols) {
  const index_t size = sizeof(T);
  Tensor t{reinterpret_cast<char*>(data.data()), {}, 0, 0, size};
  t.head = index_t(c.at(0, 1, 0, heads, rows, cols)) * size;
  t.row = index_t(c.at(0, 0, 1, heads, rows, cols)) * size;
  for (index_t b = 0; b < c.batch; b++)
    t.batch.push_back(index_t(c.at(b, 0, 0, heads, rows, cols)) * size);
  return t;
}
// What all samples share: strides in elements.
template <class T>
Tensor shared(std::vector<T>& data, const AttentionCase& c, index_t head, index_t row) {
  const index_t size = sizeof(T);
  return {reinterpret_cast<char*>(data.data()), std::vector<index_t>(std::size_t(c.batch), 0),
          head * size, row * size, size};
}

// The rows of keys or values in pages (kv_heads, page_rows, cols), the last page first.
template <class T> struct Paged {
  std::vector<T> data;
  std::vector<index_t> table;

  Paged(const std::vector<T>& rows, const AttentionCase& c, index_t cols) {
    const index_t each = (c.sk + c.page_rows - 1) / c.page_rows, pages = c.batch * each,
                  page = c.kv_heads * c.page_rows * cols;
    data.resize(std::size_t(pages * page));
    for (index_t p = 0; p < pages; p++) table.push_back(pages - 1 - p);
    for (index_t b = 0; b < c.batch; b++)
      for (index_t h = 0; h < c.kv_heads; h++)
        for (index_t j = 0; j < c.sk; j++) {
          const index_t p = table[std::size_t(b * each + j / c.page_rows)];
          std::copy_n(rows.begin() + index_t(c.at(b, h, j, c.kv_heads, c.sk, cols)), cols,
                      data.begin() + p * page + (h * c.page_rows + j % c.page_rows) * cols);
        }
  }
  Tensor tensor(const AttentionCase& c, index_t cols) {
    return shared(data, c, c.page_rows * cols, cols);
  }
};

bool run_forward(Call call, const AttentionCase& c, auto& k, auto& v) {
  Loop loop{};
  if (c.page_rows == 0) return attention_forward(call, loop);
  Paged k_pages(k, c, c.d), v_pages(v, c, c.d_v);
  call.k = k_pages.tensor(c, c.d);
  call.v = v_pages.tensor(c, c.d_v);
  const index_t page = c.kv_heads * c.page_rows * index_t(sizeof(k[0]));
  call.pages = {k_pages.table.data(), c.page_rows, page * c.d, page * c.d_v};
  call.page_columns = (c.sk + c.page_rows - 1) / c.page_rows;
  return attention_forward(call, loop);
}

}  // namespace

template <class T>
Results computed(const AttentionCase& c, const AttentionInputs& in, int threads) {
  auto q = narrowed<T>(in.q), k = narrowed<T>(in.k), v = narrowed<T>(in.v),
       dout = narrowed<T>(in.dout), bias = narrowed<T>(in.bias);
  auto dlse = narrowed<Compute<T>>(in.dlse);
  std::vector<char> mask = in.mask;
  std::vector<T> out(dout.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<Compute<T>> lse(std::size_t(c.batch * c.heads * c.sq)), dbias(bias.size());
  const auto samples = std::size_t(c.batch);
  Call call;
  call.dtype = dtype_of<T>;
  call.batch = c.batch;
  call.heads = c.heads;
  call.kv_heads = c.kv_heads;
  call.d = c.d;
  call.d_v = c.d_v;
  call.sq.assign(samples, c.sq);
  call.sk.assign(samples, c.sk);
  call.q_offset.assign(samples, c.offset);
  call.q_length.assign(samples, c.sq - c.q_padding);
  call.kv_length.assign(samples, c.sk - c.padding);
  call.left = c.left;
  call.right = c.right;
  call.q = tensor(q, c, c.heads, c.sq, c.d);
  call.k = tensor(k, c, c.kv_heads, c.sk, c.d);
  call.v = tensor(v, c, c.kv_heads, c.sk, c.d_v);
  call.out = tensor(out, c, c.heads, c.sq, c.d_v);
  call.dout = tensor(dout, c, c.heads, c.sq, c.d_v);
  call.dq = tensor(dq, c, c.heads, c.sq, c.d);
  call.dk = tensor(dk, c, c.kv_heads, c.sk, c.d);
  call.dv = tensor(dv, c, c.kv_heads, c.sk, c.d_v);
  if (c.mask) call.mask = shared(mask, c, 0, c.sk);
  if (c.bias != c.none) {
    const bool full = c.bias == c.full;
    call.bias = shared(bias, c, full ? c.sq * c.sk : 0, full ? c.sk : 0);
    call.dbias = shared(dbias, c, full ? c.sq * c.sk : 0, full ? c.sk : 0);
  }
  if (c.segments != c.one)
    for (index_t b = 0; b < c.batch; b++)
      call.segments.emplace_back(in.q_segments.data(), c.sq, in.k_segments.data(), c.sk);
  call.alibi_slopes = in.slopes;
  call.sinks = in.sinks;
  call.dsinks.assign(in.sinks.size(), 0.0);
  if (c.dropout > 0)
    call.dropout = {c.dropout_threshold(), 0, 0, c.dropout_seed, c.dropout_scale()};
  if (c.dlse) {
    call.dlse = {reinterpret_cast<char*>(dlse.data()),
                 {},
                 c.sq * index_t(sizeof(dlse[0])),
                 sizeof(dlse[0]),
                 0};
    for (index_t b = 0; b < c.batch; b++) call.dlse.batch.push_back(b * c.heads * call.dlse.head);
  }
  call.lse = reinterpret_cast<char*>(lse.data());
  for (index_t b = 0; b < c.batch; b++) call.lse_batch.push_back(b * c.heads * c.sq);
  call.lse_head = c.sq;
  call.scale = c.logit_scale();
  call.softcap = c.softcap;
  call.threads = threads;
  Loop loop{};
  if (!run_forward(call, c, k, v) || !attention_backward(call, loop)) return {};
  Results all{{"out", widened(out)},
              {"lse", widened(lse)},
              {"dq", widened(dq)},
              {"dk", widened(dk)},
              {"dv", widened(dv)}};
  if (c.bias != c.none) all.push_back({"dbias", widened(dbias)});
  if (c.sinks) all.push_back({"dsinks", call.dsinks});
  return all;
}
template Results computed<float>(const AttentionCase&, const AttentionInputs&, int);
template Results computed<double>(const AttentionCase&, const AttentionInputs&, int);
template Results computed<Half>(const AttentionCase&, const AttentionInputs&, int);
template Results computed<BFloat>(const AttentionCase&, const AttentionInputs&, int);

}  // namespace fusedattn::test
