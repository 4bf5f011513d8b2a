// The module's table of contents. Every binding is the same four beats: convert, allocate, release
// the GIL, call.
#include "numpy_view.h"

#include "dispatch.h"

namespace fusedattn {
namespace {

// The shapes of one call, and the call with its inputs filled in.
struct Request {
  Call call;
  py::array q, k, v;  // kept alive
  std::vector<py::array> others;
  py::dtype dtype, lse_dtype;
  Shape lead, out_shape, lse_shape, scores;  // scores: what masks and biases broadcast to
  Axes q_axes, k_axes;
  Shape segment_rows[2];  // shapes of the segment ids of queries and of keys
};

// Axis lengths; a missing head axis is one head.
index_t heads_of(const py::array& a, Axes x) {
  return x.head < 0 ? 1 : index_t(a.shape(x.head));
}

void same_dtype(const char* name, const py::array& a, const Request& r) {
  if (dtype_of(name, a) != r.call.dtype)
    wrong_type(name, "the dtype of q, " + py::str(r.dtype).cast<std::string>(), dtype_name(a));
}

// q, k, v against each other. Packed (varlen) arrays are (T, H, D), else (..., H, S, D) or (..., S,
// H, D).
void take_qkv(Request& r, py::handle q, py::handle k, py::handle v, bool bshd) {
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
    for (int i = 0; i < n - 3; i++)
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

// The rules as _attention.py's _rules() lines them up.
struct RuleArguments {
  py::object mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks,
      q_lengths, kv_lengths, segment_ids, dropout_p, seed;

  explicit RuleArguments(const py::tuple& t) {
    py::object* const all[] = {&mask,       &bias,        &is_causal,    &q_offset, &window,
                               &scale,      &softcap,     &alibi_slopes, &sinks,    &q_lengths,
                               &kv_lengths, &segment_ids, &dropout_p,    &seed};
    for (std::size_t i = 0; i < std::size(all); i++) *all[i] = t[i];
  }
};

// How many rows of each sample count: `most` where nothing else is said.
std::vector<index_t> lengths_of(const char* name, const py::object& object, const Request& r,
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
  const double p = finite_number("dropout_p", rules.dropout_p);
  if (p < 0 || p > 1)
    wrong_value("dropout_p", "a probability from 0 to 1", py::str(rules.dropout_p));
  if (p == 0) return;
  c.dropout.threshold = std::uint32_t(std::min(std::round(p * 0x1p32), 0x1p32 - 1));
  c.dropout.scale = p == 1 ? 0.0 : 1.0 / (1.0 - p);
  c.dropout.seed = seed_of(rules.seed);
}

// Masks, biases and numbers by head, all of which broadcast; segments. r.scores, sq, sk and lead
// are known; sample b's rows of q and k start at q_first[b], k_first[b] of the segment ids.
void take_arrays(Request& r, const RuleArguments& rules, const std::vector<index_t>& q_first,
                 const std::vector<index_t>& k_first) {
  Call& c = r.call;
  if (!rules.mask.is_none()) {
    const py::array a = array_of("mask", rules.mask);
    if (a.dtype().kind() != 'b') wrong_type("mask", "a boolean array", dtype_name(a));
    c.mask = broadcast_tensor("mask", a, r.scores);
    r.others.push_back(a);
  }
  if (!rules.bias.is_none()) {
    const py::array a = array_of("bias", rules.bias);
    same_dtype("bias", a, r);
    c.bias = broadcast_tensor("bias", a, r.scores);
    r.others.push_back(a);
  }
  const index_t heads = c.heads, all = c.batch * heads;
  if (!rules.alibi_slopes.is_none()) {
    c.alibi_slopes = numbers_of("alibi_slopes", rules.alibi_slopes,
                                {{heads}, {c.batch, heads}, join(r.lead, heads)});
    const std::size_t given = c.alibi_slopes.size();
    for (index_t i = index_t(given); i < all; i++)
      c.alibi_slopes.push_back(c.alibi_slopes[std::size_t(i) % given]);
  }
  if (!rules.sinks.is_none()) c.sinks = numbers_of("sinks", rules.sinks, {{heads}});
  if (!rules.segment_ids.is_none()) {
    const bool pair = py::isinstance<py::tuple>(rules.segment_ids);
    if (pair && py::len(rules.segment_ids) != 2)
      wrong_value("segment_ids", "an array, or a pair of arrays (of queries, of keys)",
                  std::to_string(py::len(rules.segment_ids)) + " of them");
    const py::object q_ids = pair ? py::object(rules.segment_ids[py::int_(0)]) : rules.segment_ids,
                     k_ids = pair ? py::object(rules.segment_ids[py::int_(1)]) : rules.segment_ids;
    const auto q = ids_of("segment_ids", q_ids, r.segment_rows[0]),
               k = ids_of("segment_ids", k_ids, r.segment_rows[1]);
    for (std::size_t b = 0; b < c.sq.size(); b++)
      c.segments.emplace_back(q.data() + q_first[b], c.sq[b], k.data() + k_first[b], c.sk[b]);
  }
}

// What does not depend on how samples are laid out; sq, sk and lead are known.
void take_rules(Request& r, const RuleArguments& rules, py::handle num_threads) {
  Call& c = r.call;
  c.scale =
      rules.scale.is_none() ? 1.0 / std::sqrt(double(c.d)) : finite_number("scale", rules.scale);
  c.softcap = finite_number("softcap", rules.softcap);
  if (c.softcap < 0) wrong_value("softcap", "0 or a positive number", py::str(rules.softcap));
  window_of(rules.window, c);
  if (truth_of("is_causal", rules.is_causal)) c.right = std::min<index_t>(c.right, 0);
  c.q_offset = integers_of("q_offset", rules.q_offset, r.lead, c.batch);
  for (const index_t o : c.q_offset)
    if (o > index_t(1) << 60 || o < -(index_t(1) << 60))
      wrong_value("q_offset", "at most 2**60 in magnitude", std::to_string(o));
  c.q_length = lengths_of("q_lengths", rules.q_lengths, r, c.sq);
  c.kv_length = lengths_of("kv_lengths", rules.kv_lengths, r, c.sk);
  take_dropout(c, rules);
  c.threads = threads_of(num_threads);
}

// Rectangular calls: every sample has the same lengths.
Request rectangular(py::handle q, py::handle k, py::handle v, const RuleArguments& rules,
                    py::handle layout, py::handle num_threads) {
  Request r;
  Call& c = r.call;
  take_qkv(r, q, k, v, is_bshd(layout));
  const index_t sq = index_t(r.q.shape(r.q_axes.row)), sk = index_t(r.k.shape(r.k_axes.row));
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
  }
  r.segment_rows[0] = join(r.lead, sq);
  r.segment_rows[1] = join(r.lead, sk);
  take_arrays(r, rules, q_first, k_first);
  c.lse_head = sq;
  for (index_t b = 0; b < c.batch; b++) c.lse_batch.push_back(b * c.heads * sq);
  return r;
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

// Packed calls: sample b is rows [cu[b], cu[b + 1]) of (T, H, D).
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
  r.segment_rows[0] = {total_q};
  r.segment_rows[1] = {total_k};
  take_arrays(r, rules, cu_q, cu_k);
  return r;
}

// A result of the shape of q or k/v, seen as the input is.
Tensor like(const Request& r, const py::array& a, Axes axes, const Tensor& sample,
            index_t rows_of_sample_stride) {
  Tensor t = tensor_of(a, axes);
  if (r.lead.size() == 1 && a.ndim() == 3) {  // packed: samples lie along the rows
    t.batch = sample.batch;
    for (index_t& o : t.batch) o = rows_of_sample_stride ? o / rows_of_sample_stride * t.row : 0;
  }
  return t;
}

py::array take_out(const Request& r, py::handle out) {
  if (out.is_none()) return allocate("out", r.dtype, r.out_shape);
  if (!py::isinstance<py::array>(out)) wrong_type("out", "a NumPy array", type_name(out));
  auto a = py::reinterpret_borrow<py::array>(out);
  if (!a.dtype().is(r.dtype) && !a.dtype().equal(r.dtype))
    wrong_type("out", "the dtype of q, " + py::str(r.dtype).cast<std::string>(), dtype_name(a));
  if (shape_of(a) != r.out_shape)
    wrong_value("out", "shape " + text_of(r.out_shape), text_of(shape_of(a)));
  if (!a.writeable()) wrong_value("out", "a writeable array", "a read-only one");
  const auto shares = py::module_::import("numpy").attr("shares_memory");
  const auto overlaps = [&](const py::array& b) {
    return py::module_::import("numpy").attr("may_share_memory")(a, b).cast<bool>() &&
           shares(a, b).cast<bool>();
  };
  for (const auto& [name, b] :
       {std::pair<const char*, const py::array*>{"q", &r.q}, {"k", &r.k}, {"v", &r.v}})
    if (overlaps(*b))
      wrong_value("out", "memory of its own", std::string("an array that overlaps ") + name);
  for (const py::array& b : r.others)
    if (overlaps(b)) wrong_value("out", "memory of its own", "an array that overlaps mask or bias");
  if (overlaps_itself(a)) wrong_value("out", "distinct elements", "an array that overlaps itself");
  return a;
}

bool signals_pending() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <class F> void run_without_gil(F&& f) {
  Loop loop{signals_pending};
  bool done;
  {
    const py::gil_scoped_release release;
    done = f(loop);
  }
  if (!done) throw py::error_already_set();
}

py::object forward(Request& r, py::handle out, bool return_lse) {
  const py::array o = take_out(r, out);
  const py::array lse = allocate("lse", r.lse_dtype, r.lse_shape);
  r.call.out = like(r, o, r.q_axes, r.call.q, r.call.q.row);
  r.call.lse = static_cast<char*>(const_cast<void*>(lse.data()));
  kernel_table();
  run_without_gil([&](Loop& loop) { return attention_forward(r.call, loop); });
  if (return_lse) return py::make_tuple(o, lse);
  return o;
}

py::array input_like(const char* name, py::handle object, const py::dtype& dtype,
                     const Shape& shape) {
  py::array a = array_of(name, object);
  if (!a.dtype().equal(dtype)) wrong_type(name, py::str(dtype).cast<std::string>(), dtype_name(a));
  if (shape_of(a) != shape) wrong_value(name, "shape " + text_of(shape), text_of(shape_of(a)));
  return a;
}

struct Needs {
  bool q, k, v, bias, sinks;

  explicit Needs(const py::tuple& t)
      : q(t[0].cast<bool>()),
        k(t[1].cast<bool>()),
        v(t[2].cast<bool>()),
        bias(t[3].cast<bool>()),
        sinks(t[4].cast<bool>()) {}
};

// An array of the shape of lse, where it is.
Tensor rows_of(const Request& r, const py::array& a) {
  const int n = int(a.ndim());
  Tensor t;
  t.data = static_cast<char*>(const_cast<void*>(a.data()));
  t.row = index_t(a.strides(n - 1));
  t.head = r.q_axes.head < 0 ? 0 : index_t(a.strides(n - 2));
  if (r.lse_shape.size() == r.lead.size() + 2 || r.q_axes.head < 0)
    t.batch = batch_offsets(r.lead, std::vector<index_t>(a.strides(), a.strides() + r.lead.size()));
  else  // packed: samples lie along the queries
    for (const index_t first : r.call.lse_batch) t.batch.push_back(first * t.row);
  return t;
}

py::tuple backward(Request& r, py::handle dout, py::handle out, py::handle lse, py::handle dlse,
                   Needs need, const RuleArguments& rules) {
  Call& c = r.call;
  const py::array d = input_like("dout", dout, r.dtype, r.out_shape),
                  o = input_like("out", out, r.dtype, r.out_shape);
  const py::array l = py::module_::import("numpy").attr("ascontiguousarray")(
      input_like("lse", lse, r.lse_dtype, r.lse_shape));
  c.dout = like(r, d, r.q_axes, c.q, c.q.row);
  c.out = like(r, o, r.q_axes, c.q, c.q.row);
  c.lse = static_cast<char*>(const_cast<void*>(l.data()));
  py::array dl;
  if (!dlse.is_none()) {
    dl = input_like("dlse", dlse, r.lse_dtype, r.lse_shape);
    c.dlse = rows_of(r, dl);
  }
  py::object dq = py::none(), dk = py::none(), dv = py::none(), dbias = py::none(),
             dsinks = py::none();
  const auto gradient = [&](const char* name, const py::array& a, Axes axes, Tensor& t,
                            const Tensor& input) -> py::object {
    py::array g = allocate(name, r.dtype, shape_of(a));
    t = like(r, g, axes, input, input.row);
    return g;
  };
  if (need.q) dq = gradient("dq", r.q, r.q_axes, c.dq, c.q);
  if (need.k) dk = gradient("dk", r.k, r.k_axes, c.dk, c.k);
  if (need.v) dv = gradient("dv", r.v, r.k_axes, c.dv, c.v);
  if (need.bias) {
    if (rules.bias.is_none()) wrong_value("need", "'bias' only where a bias is given", "bias=None");
    const py::array b = array_of("bias", rules.bias);
    py::array g = py::module_::import("numpy").attr("zeros")(
        py::cast(shape_of(b)), r.lse_dtype);  // summed in the compute type
    c.dbias = broadcast_tensor("bias", g, r.scores);
    dbias = g;
  }
  if (need.sinks) {
    if (rules.sinks.is_none())
      wrong_value("need", "'sinks' only where sinks are given", "sinks=None");
    c.dsinks.assign(std::size_t(c.heads), 0.0);
  }
  kernel_table();
  run_without_gil([&](Loop& loop) { return attention_backward(c, loop); });
  if (need.bias && !r.dtype.equal(r.lse_dtype)) dbias = dbias.attr("astype")(r.dtype);
  if (need.sinks)
    dsinks = py::array_t<double>(py::ssize_t(c.heads), c.dsinks.data())
                 .attr("astype")(array_of("sinks", rules.sinks).dtype());
  return py::make_tuple(dq, dk, dv, dbias, dsinks);
}

py::dict cpu_info() {
  py::dict d;
  d["isa"] = kernel_table().name;
  d["isas"] = supported_isas();
  d["isas_built"] = built_isas();
  d["num_threads"] = get_num_threads();
  d["parallel"] = parallel_backend();
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["build_type"] = FUSEDATTN_BUILD_TYPE;
  return d;
}

}  // namespace
}  // namespace fusedattn

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace fusedattn;
  m.doc() = "The C++ core of fusedattn; the public functions are in the package.";
  m.attr("__version__") = FUSEDATTN_VERSION;

  using H = py::handle;
  m.def("attention",
        [](H q, H k, H v, const py::tuple& rules, H layout, H out, H num_threads, bool return_lse) {
          Request r = rectangular(q, k, v, RuleArguments(rules), layout, num_threads);
          return forward(r, out, return_lse);
        });
  m.def("attention_backward",
        [](H dout, H q, H k, H v, H out, H lse, H dlse, const py::tuple& rules, H layout,
           H num_threads, const py::tuple& need) {
          const RuleArguments arguments(rules);
          Request r = rectangular(q, k, v, arguments, layout, num_threads);
          return backward(r, dout, out, lse, dlse, Needs(need), arguments);
        });
  m.def("attention_varlen", [](H q, H k, H v, H cu_q, H cu_k, const py::tuple& rules, H out,
                               H num_threads, bool return_lse) {
    Request r = packed(q, k, v, cu_q, cu_k, RuleArguments(rules), num_threads);
    return forward(r, out, return_lse);
  });
  m.def("attention_varlen_backward",
        [](H dout, H q, H k, H v, H out, H lse, H dlse, H cu_q, H cu_k, const py::tuple& rules,
           H num_threads, const py::tuple& need) {
          const RuleArguments arguments(rules);
          Request r = packed(q, k, v, cu_q, cu_k, arguments, num_threads);
          return backward(r, dout, out, lse, dlse, Needs(need), arguments);
        });

  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", [](H n) { set_num_threads(n.is_none() ? 0 : threads_of(n)); });
  m.def("cpu_info", &fusedattn::cpu_info);
  m.def("set_isa", &set_isa);
  m.def("measure_peak", [](const std::string& dtype, int threads) {
    const py::gil_scoped_release release;
    return measure_peak(dtype == "float64" ? DType::float64 : DType::float32, threads);
  });
  m.def("measure_bandwidth", [](int threads) {
    const py::gil_scoped_release release;
    return measure_bandwidth(threads);
  });
}
