#include "bindings/attention.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "attention/call.h"
#include "bindings/request.h"
#include "bindings/without_gil.h"
#include "isa/dispatch.h"

namespace fusedattn {
namespace {

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
    wrong_type("out", "the dtype of q, " + text_of(r.dtype), dtype_name(a));
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
  if (!a.dtype().equal(dtype)) wrong_type(name, text_of(dtype), dtype_name(a));
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

// An array of the caller's that a gradient is written to.
py::array written_like(const char* name, py::handle object, const py::dtype& dtype,
                       const Shape& shape) {
  py::array a = input_like(name, object, dtype, shape);
  if (!a.writeable()) wrong_value(name, "a writeable array", "a read-only one");
  if (overlaps_itself(a)) wrong_value(name, "distinct elements", "an array that overlaps itself");
  return a;
}

py::tuple backward(Request& r, py::handle dout, py::handle out, py::handle lse, py::handle dlse,
                   Needs need, const RuleArguments& rules, py::handle into) {
  Call& c = r.call;
  const py::array d = input_like("dout", dout, r.dtype, r.out_shape),
                  o = input_like("out", out, r.dtype, r.out_shape);
  py::array l = input_like("lse", lse, r.lse_dtype, r.lse_shape);
  if (!(l.flags() & py::array::c_style))
    l = py::module_::import("numpy").attr("ascontiguousarray")(l);
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
                            const Tensor& input, int place) -> py::object {
    py::array g = into.is_none() ? allocate(name, r.dtype, shape_of(a))
                                 : written_like(name, into.cast<py::tuple>()[std::size_t(place)],
                                                r.dtype, shape_of(a));
    t = like(r, g, axes, input, input.row);
    return g;
  };
  if (need.q) dq = gradient("dq", r.q, r.q_axes, c.dq, c.q, 0);
  if (need.k) dk = gradient("dk", r.k, r.k_axes, c.dk, c.k, 1);
  if (need.v) dv = gradient("dv", r.v, r.k_axes, c.dv, c.v, 2);
  if (need.bias) {
    const py::object bias = rules.get<"bias">();
    if (bias.is_none()) wrong_value("need", "'bias' only where a bias is given", "bias=None");
    const py::array b = array_of("bias", bias);
    py::array g = allocate("dbias", r.lse_dtype, shape_of(b));  // summed in the compute type
    std::memset(g.mutable_data(), 0, std::size_t(g.nbytes()));
    c.dbias = broadcast_tensor("bias", g, r.scores);
    dbias = g;
  }
  const py::object sinks = rules.get<"sinks">();
  if (need.sinks) {
    if (sinks.is_none()) wrong_value("need", "'sinks' only where sinks are given", "sinks=None");
    c.dsinks.assign(std::size_t(c.heads), 0.0);
  }
  kernel_table();
  run_without_gil([&](Loop& loop) { return attention_backward(c, loop); });
  if (need.bias && !r.dtype.equal(r.lse_dtype)) dbias = dbias.attr("astype")(r.dtype);
  if (need.sinks)
    dsinks = py::array_t<double>(py::ssize_t(c.heads), c.dsinks.data())
                 .attr("astype")(array_of("sinks", sinks).dtype());
  return py::make_tuple(dq, dk, dv, dbias, dsinks);
}

}  // namespace

void bind_attention(py::module_& m) {
  using H = py::handle;
  using py::literals::operator""_a;
  const py::none none;
  m.def(
      "attention",
      [](H q, H k, H v, H rules, H layout, H out, H num_threads, bool return_lse) {
        Request r = rectangular(q, k, v, RuleArguments(rules), layout, num_threads);
        return forward(r, out, return_lse);
      },
      "Attention of (..., H, S, D) or (..., S, H, D) arrays: out, or (out, lse).", "q"_a, "k"_a,
      "v"_a, "rules"_a, "layout"_a = "bhsd", "out"_a = none, "num_threads"_a = none,
      "return_lse"_a = false);
  m.def(
      "attention_paged",
      [](H q, H k, H v, H block_table, H rules, H layout, H out, H num_threads, bool return_lse) {
        Request r = paged(q, k, v, block_table, RuleArguments(rules), layout, num_threads);
        return forward(r, out, return_lse);
      },
      "The same, keys and values in pages: row t of sample b is row t % page_size of page\n"
      "block_table[b, t // page_size] of k and v.",
      "q"_a, "k"_a, "v"_a, "block_table"_a, "rules"_a, "layout"_a = "bhsd", "out"_a = none,
      "num_threads"_a = none, "return_lse"_a = false);
  m.def(
      "attention_backward",
      [](H dout, H q, H k, H v, H out, H lse, H dlse, H rules, H layout, H num_threads,
         const py::tuple& need) {
        const RuleArguments arguments(rules);
        Request r = rectangular(q, k, v, arguments, layout, num_threads);
        return backward(r, dout, out, lse, dlse, Needs(need), arguments, py::none());
      },
      "(dq, dk, dv, dbias, dsinks), None where need, one truth for each, does not ask for it.",
      "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dlse"_a, "rules"_a, "layout"_a,
      "num_threads"_a, "need"_a);
  m.def(
      "attention_varlen",
      [](H q, H k, H v, H cu_seqlens_q, H cu_seqlens_k, H rules, H out, H num_threads,
         bool return_lse) {
        Request r = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, RuleArguments(rules), num_threads);
        return forward(r, out, return_lse);
      },
      "Attention of packed (T, H, D) arrays, sequence n being rows cu_seqlens[n] to\n"
      "cu_seqlens[n + 1]: out, or (out, lse).",
      "q"_a, "k"_a, "v"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "rules"_a, "out"_a = none,
      "num_threads"_a = none, "return_lse"_a = false);
  m.def(
      "attention_varlen_backward",
      [](H dout, H q, H k, H v, H out, H lse, H dlse, H cu_seqlens_q, H cu_seqlens_k, H rules,
         H num_threads, const py::tuple& need, H into) {
        const RuleArguments arguments(rules);
        Request r = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, arguments, num_threads);
        return backward(r, dout, out, lse, dlse, Needs(need), arguments, into);
      },
      "As attention_backward, of packed arrays; dq, dk and dv are written to into unless it is\n"
      "None.",
      "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dlse"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a,
      "rules"_a, "num_threads"_a, "need"_a, "into"_a);
}

}  // namespace fusedattn
