#include "bindings/request.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "bindings/numbers.h"

namespace fusedattn {

namespace {

void same_dtype(const char* name, const py::array& a, const Request& r) {
  if (dtype_of(name, a) != r.call.dtype)
    wrong_type(name, "the dtype of q, " + text_of(r.dtype), dtype_name(a));
}

// Axis lengths; a missing head axis is one head.
index_t heads_of(const py::array& a, Axes x) {
  return x.head < 0 ? 1 : index_t(a.shape(x.head));
}

// q, k, v against each other. Packed (varlen) arrays are (T, H, D), else (..., H, S, D) or (..., S,
// H, D); with `pages`, k and v hold pages in place of samples.
void take_qkv(Request& r, py::handle q, py::handle k, py::handle v, bool bshd, bool pages = false) {
  r.q = array_of("q", q);
  r.k = array_of("k", k);
  r.v = array_of("v", v);
  Call& c = r.call;
  c.dtype = dtype_of("q", r.q);
  r.dtype = r.q.dtype();
  r.lse_dtype = c.dtype == DType::float64 ? py::dtype::of<double>() : py::dtype::of<float>();
  same_dtype("k", r.k, r);
  same_dtype("v", r.v, r);
  const int n = int(r.q.ndim());
  const std::string want = bshd ? "(..., S, H, D)" : "(..., H, S, D) or (S, D)";
  if (n < 2) wrong_value("q", "shape " + want, text_of(shape_of(r.q)));
  for (const auto& [name, a] : {std::pair<const char*, py::array*>{"k", &r.k}, {"v", &r.v}}) {
    if (a->ndim() != n)
      wrong_value(name, "as many dimensions as q, " + std::to_string(n),
                  "shape " + text_of(shape_of(*a)));
    for (int i = 0; i < n - 3 && !pages; i++)
      if (a->shape(i) != r.q.shape(i))
        wrong_value(
            name,
            "the leading dimensions of q, " + text_of(Shape(r.q.shape(), r.q.shape() + n - 3)),
            "shape " + text_of(shape_of(*a)));
  }
  const Axes x = axes_of(bshd, n);
  r.q_axes = r.k_axes = x;
  r.lead = n < 3 ? Shape{} : Shape(r.q.shape(), r.q.shape() + n - 3);
  c.batch = 1;
  for (const index_t l : r.lead)
    if ((c.batch *= l) > index_t(1) << 28)
      wrong_value("q", "at most 2**28 samples", "shape " + text_of(shape_of(r.q)));
  c.heads = heads_of(r.q, x);
  c.kv_heads = heads_of(r.k, x);
  c.d = index_t(r.q.shape(x.col));
  c.d_v = index_t(r.v.shape(x.col));
  if (c.d < 1)
    wrong_value("q", "a head dimension D of at least 1", "shape " + text_of(shape_of(r.q)));
  if (r.k.shape(x.col) != c.d)
    wrong_value("k", "the head dimension of q, D=" + std::to_string(c.d),
                "shape " + text_of(shape_of(r.k)));
  if (c.kv_heads == 0 ? c.heads != 0 : c.heads % c.kv_heads != 0)
    wrong_value("k",
                "a number of heads that divides the " + std::to_string(c.heads) + " heads of q",
                "shape " + text_of(shape_of(r.k)));
  if (heads_of(r.v, x) != c.kv_heads || r.v.shape(x.row) != r.k.shape(x.row))
    wrong_value("v", "the heads and length of k, shape " + text_of(shape_of(r.k)),
                "shape " + text_of(shape_of(r.v)));
  c.q = tensor_of(r.q, x);
  c.k = tensor_of(r.k, x);
  c.v = tensor_of(r.v, x);
  r.out_shape = shape_of(r.q);
  r.out_shape[std::size_t(x.col)] = c.d_v;
}

// How many rows of each sample count: `most` where nothing else is said.
std::vector<index_t> lengths_of(const char* name, py::handle object, const Request& r,
                                const std::vector<index_t>& most) {
  if (object.is_none()) return most;
  std::vector<index_t> lengths = integers_of(name, object, r.lead, r.call.batch);
  for (std::size_t b = 0; b < lengths.size(); b++)
    if (lengths[b] < 0 || lengths[b] > most[b])
      wrong_value(name, "values from 0 to the length " + std::to_string(most[b]),
                  std::to_string(lengths[b]));
  return lengths;
}

void take_dropout(Call& c, const RuleArguments& rules) {
  const py::object given = rules.get<"dropout_p">();
  const double p = finite_number("dropout_p", given);
  if (p < 0 || p > 1) wrong_value("dropout_p", "a probability from 0 to 1", text_of(given));
  const double parts = std::round(p * 0x1p16);  // 16 bits are drawn
  if (parts == 0) return;
  c.dropout.threshold = std::uint32_t(std::min(parts, 0x1p16 - 1)) << 16;
  c.dropout.scale = parts == 0x1p16 ? 0.0 : 0x1p16 / (0x1p16 - parts);
  c.dropout.seed = seed_of(rules.get<"seed">());
}

// Segment ids of queries and keys; sample b's rows of q and k start at q_first[b], k_first[b].
void take_segments(Request& r, const py::object& given, const std::vector<index_t>& q_first,
                   const std::vector<index_t>& k_first) {
  Call& c = r.call;
  const bool pair = py::isinstance<py::tuple>(given);
  if (pair && py::len(given) != 2)
    wrong_value("segment_ids", "an array, or a pair of arrays (of queries, of keys)",
                std::to_string(py::len(given)) + " of them");
  const py::object q_ids = pair ? py::object(given[py::int_(0)]) : given,
                   k_ids = pair ? py::object(given[py::int_(1)]) : given;
  const auto q = ids_of("segment_ids", q_ids, r.segment_rows[0]),
             k = ids_of("segment_ids", k_ids, r.segment_rows[1]);
  for (std::size_t b = 0; b < c.sq.size(); b++)
    c.segments.emplace_back(q.data() + q_first[b], c.sq[b], k.data() + k_first[b], c.sk[b]);
}

// Masks, biases and numbers by head, all of which broadcast; segments. r.scores, sq, sk and lead
// are known.
void take_arrays(Request& r, const RuleArguments& rules, const std::vector<index_t>& q_first,
                 const std::vector<index_t>& k_first) {
  Call& c = r.call;
  if (const py::object mask = rules.get<"mask">(); !mask.is_none()) {
    const py::array a = array_of("mask", mask);
    if (a.dtype().kind() != 'b') wrong_type("mask", "a boolean array", dtype_name(a));
    c.mask = broadcast_tensor("mask", a, r.scores);
    r.others.push_back(a);
  }
  if (const py::object bias = rules.get<"bias">(); !bias.is_none()) {
    const py::array a = array_of("bias", bias);
    same_dtype("bias", a, r);
    c.bias = broadcast_tensor("bias", a, r.scores);
    r.others.push_back(a);
  }
  if (const py::object slopes = rules.get<"alibi_slopes">(); !slopes.is_none()) {
    c.alibi_slopes =
        numbers_of("alibi_slopes", slopes, {{c.heads}, {c.batch, c.heads}, join(r.lead, c.heads)});
    const std::size_t given = c.alibi_slopes.size();
    for (index_t i = index_t(given); i < c.batch * c.heads; i++)
      c.alibi_slopes.push_back(c.alibi_slopes[std::size_t(i) % given]);
  }
  if (const py::object sinks = rules.get<"sinks">(); !sinks.is_none())
    c.sinks = numbers_of("sinks", sinks, {{c.heads}});
  if (const py::object ids = rules.get<"segment_ids">(); !ids.is_none())
    take_segments(r, ids, q_first, k_first);
}

// What does not depend on how samples are laid out; sq, sk and lead are known.
void take_rules(Request& r, const RuleArguments& rules, py::handle num_threads) {
  Call& c = r.call;
  const py::object scale = rules.get<"scale">(), softcap = rules.get<"softcap">();
  c.scale = scale.is_none() ? 1.0 / std::sqrt(double(c.d)) : finite_number("scale", scale);
  c.softcap = finite_number("softcap", softcap);
  if (c.softcap < 0) wrong_value("softcap", "0 or a positive number", text_of(softcap));
  if (c.softcap > 0x1p100) c.softcap = 0;  // bends nothing, but logits divided by it are lost
  window_of(rules.get<"window">(), c);
  if (truth_of("is_causal", rules.get<"is_causal">())) c.right = std::min<index_t>(c.right, 0);
  c.q_offset = integers_of("q_offset", rules.get<"q_offset">(), r.lead, c.batch);
  for (const index_t o : c.q_offset)
    if (o > index_t(1) << 60 || o < -(index_t(1) << 60))
      wrong_value("q_offset", "at most 2**60 in magnitude", std::to_string(o));
  c.q_length = lengths_of("q_lengths", rules.get<"q_lengths">(), r, c.sq);
  c.kv_length = lengths_of("kv_lengths", rules.get<"kv_lengths">(), r, c.sk);
  take_dropout(c, rules);
  c.threads = threads_of(num_threads);
}

// Every sample has sq queries and at most sk keys; q, k and v are taken.
void fill_rectangle(Request& r, index_t sq, index_t sk, const RuleArguments& rules,
                    py::handle num_threads) {
  Call& c = r.call;
  c.sq.assign(std::size_t(c.batch), sq);
  c.sk.assign(std::size_t(c.batch), sk);
  take_rules(r, rules, num_threads);
  r.lse_shape = r.lead;
  if (r.q_axes.head >= 0) r.lse_shape.push_back(c.heads);
  r.lse_shape.push_back(sq);
  r.scores = join(r.lse_shape, sk);
  std::vector<index_t> q_first, k_first;
  for (index_t b = 0; b < c.batch; b++) {
    q_first.push_back(b * sq);
    k_first.push_back(b * sk);
    c.lse_batch.push_back(b * c.heads * sq);
  }
  r.segment_rows[0] = {join(r.lead, sq), {c.batch, sq}};
  r.segment_rows[1] = {join(r.lead, sk), {c.batch, sk}};
  take_arrays(r, rules, q_first, k_first);
  c.lse_head = sq;
}

// Cumulative lengths: ascending from 0 to `total`.
std::vector<index_t> cumulative(const char* name, py::handle object, index_t total) {
  const py::array a = array_of(name, object);
  if (a.dtype().kind() != 'i' && a.dtype().kind() != 'u')
    wrong_type(name, "an array of integers", dtype_name(a));
  if (a.ndim() != 1 || a.size() < 1) wrong_value(name, "shape (N + 1,)", text_of(shape_of(a)));
  const auto values = py::array_t<index_t, py::array::c_style | py::array::forcecast>(a);
  std::vector<index_t> cu(values.data(), values.data() + values.size());
  if (cu[0] != 0) wrong_value(name, "0 as its first value", std::to_string(cu[0]));
  for (std::size_t i = 1; i < cu.size(); i++)
    if (cu[i] < cu[i - 1])
      wrong_value(name, "ascending values",
                  std::to_string(cu[i - 1]) + " before " + std::to_string(cu[i]) + " at position " +
                      std::to_string(i));
  if (cu.back() != total)
    wrong_value(name, "the packed length " + std::to_string(total) + " as its last value",
                std::to_string(cu.back()));
  return cu;
}

}  // namespace

Request rectangular(py::handle q, py::handle k, py::handle v, const RuleArguments& rules,
                    py::handle layout, py::handle num_threads) {
  Request r;
  take_qkv(r, q, k, v, is_bshd(layout));
  fill_rectangle(r, index_t(r.q.shape(r.q_axes.row)), index_t(r.k.shape(r.k_axes.row)), rules,
                 num_threads);
  return r;
}

Request packed(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens_q,
               py::handle cu_seqlens_k, const RuleArguments& rules, py::handle num_threads) {
  Request r;
  Call& c = r.call;
  take_qkv(r, q, k, v, true);
  if (r.q.ndim() != 3) wrong_value("q", "shape (T, H, D)", text_of(shape_of(r.q)));
  const index_t total_q = index_t(r.q.shape(0)), total_k = index_t(r.k.shape(0));
  const std::vector<index_t> cu_q = cumulative("cu_seqlens_q", cu_seqlens_q, total_q),
                             cu_k = cumulative("cu_seqlens_k", cu_seqlens_k, total_k);
  if (cu_q.size() != cu_k.size())
    wrong_value("cu_seqlens_k",
                "as many sequences as cu_seqlens_q, " + std::to_string(cu_q.size() - 1),
                std::to_string(cu_k.size() - 1));
  c.batch = index_t(cu_q.size()) - 1;
  r.lead = {c.batch};
  c.q.batch.clear();
  c.k.batch.clear();
  c.v.batch.clear();
  for (std::size_t b = 0; b + 1 < cu_q.size(); b++) {
    c.q.batch.push_back(cu_q[b] * c.q.row);
    c.k.batch.push_back(cu_k[b] * c.k.row);
    c.v.batch.push_back(cu_k[b] * c.v.row);
    c.sq.push_back(cu_q[b + 1] - cu_q[b]);
    c.sk.push_back(cu_k[b + 1] - cu_k[b]);
    c.lse_batch.push_back(cu_q[b]);
  }
  take_rules(r, rules, num_threads);
  c.lse_head = total_q;
  r.lse_shape = {c.heads, total_q};
  const auto longest = [](const std::vector<index_t>& n) {
    return n.empty() ? 0 : *std::max_element(n.begin(), n.end());
  };
  r.scores = {c.batch, c.heads, longest(c.sq), longest(c.sk)};
  r.segment_rows[0] = {Shape{total_q}};
  r.segment_rows[1] = {Shape{total_k}};
  take_arrays(r, rules, cu_q, cu_k);
  return r;
}

Request paged(py::handle q, py::handle k, py::handle v, py::handle block_table,
              const RuleArguments& rules, py::handle layout, py::handle num_threads) {
  Request r;
  Call& c = r.call;
  take_qkv(r, q, k, v, is_bshd(layout), true);
  if (r.q.ndim() != 4) wrong_value("q", "4 dimensions", "shape " + text_of(shape_of(r.q)));
  if (r.v.shape(0) != r.k.shape(0))
    wrong_value("v", "as many pages as k, " + std::to_string(r.k.shape(0)),
                "shape " + text_of(shape_of(r.v)));
  const py::array given = array_of("block_table", block_table);
  if (given.ndim() != 2 || given.shape(0) != c.batch)
    wrong_value("block_table", "shape (" + std::to_string(c.batch) + ", M)",
                "shape " + text_of(shape_of(given)));
  const std::vector<index_t> table = ids_of("block_table", given, {shape_of(given)});
  const auto table_array = py::array_t<index_t>(py::ssize_t(table.size()), table.data());
  r.others.push_back(table_array);
  const index_t rows = index_t(r.k.shape(r.k_axes.row)), columns = index_t(given.shape(1));
  c.pages = {table_array.data(), rows, index_t(r.k.strides(0)), index_t(r.v.strides(0))};
  c.page_columns = columns;
  c.k.batch.assign(std::size_t(c.batch), 0);
  c.v.batch.assign(std::size_t(c.batch), 0);
  c.sk.assign(std::size_t(c.batch), columns * rows);
  const std::vector<index_t> lengths = lengths_of("kv_lengths", rules.get<"kv_lengths">(), r, c.sk);
  for (index_t b = 0; b < c.batch; b++)
    for (index_t m = 0; m * rows < lengths[std::size_t(b)]; m++)
      if (const index_t page = table[std::size_t(b * columns + m)];
          page < 0 || page >= r.k.shape(0))
        wrong_value(
            "block_table", "pages from 0 to " + std::to_string(r.k.shape(0) - 1),
            std::to_string(page) + " at (" + std::to_string(b) + ", " + std::to_string(m) + ")");
  const index_t longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  c.sk.assign(std::size_t(c.batch), longest);
  fill_rectangle(r, index_t(r.q.shape(r.q_axes.row)), longest, rules, num_threads);
  return r;
}

}  // namespace fusedattn
