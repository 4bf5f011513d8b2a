"""The ONNX operator Attention: the onnx package's own cases, and what they leave out."""

import importlib
import warnings

import numpy as np
import pytest

import fusedattn
from fusedattn.integrations.onnx import attention, new_ops

onnx = pytest.importorskip("onnx", reason="runs the cases of the onnx package")


def own_cases():
    """Cases of the onnx package whose model is a single node, Attention; one import runs them."""
    node = importlib.import_module("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("onnx.backend.test.case.node.attention")
    return {
        case.name: case
        for case in node._NodeTestCases
        if [n.op_type for n in case.model.graph.node] == ["Attention"]
    }


CASES = own_cases()


def test_as_many_cases_as_there_are():
    assert len(CASES) >= 93
    versions = {case.model.opset_import[0].version for case in CASES.values()}
    assert {23, 24, 25} <= versions


@pytest.mark.parametrize("name", CASES)
def test_case_of_the_onnx_package(name):
    case = CASES[name]
    session = onnx.reference.ReferenceEvaluator(case.model, new_ops=new_ops())
    runner = onnx.backend.test.runner.Runner
    for inputs, expected in case.data_sets:
        names = [x.name for x in case.model.graph.input]
        got = session.run(None, dict(zip(names, inputs, strict=True)))
        runner.assert_similar_outputs(expected, got, case.rtol, case.atol)


def arrays(b=2, h=4, hkv=2, sq=3, sk=6, d=8, dv=5, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def run(inputs, outputs=1, **attributes):
    """One node through the evaluator, ours and onnx's own."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    node = onnx.helper.make_node("Attention", names, results, **attributes)
    kind = onnx.helper.np_dtype_to_tensor_dtype
    infos = [
        onnx.helper.make_tensor_value_info(name, kind(x.dtype), x.shape)
        for name, x in zip(names, inputs, strict=True)
        if name
    ]
    ends = [onnx.helper.make_tensor_value_info(y, kind(inputs[0].dtype), None) for y in results]
    graph = onnx.helper.make_graph([node], "one", infos, ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 25)])
    feeds = {name: x for name, x in zip(names, inputs, strict=True) if name}
    sessions = (onnx.reference.ReferenceEvaluator(model, new_ops=ops) for ops in (new_ops(), None))
    return [session.run(None, feeds) for session in sessions]


MASK = np.random.default_rng(1).random((2, 1, 3, 6)) < 0.6
MASK[0, 0, 1] = False
BIAS = np.random.default_rng(2).standard_normal((4, 3, 6)).astype(np.float32)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("mask", [None, MASK, BIAS, MASK[..., :4], BIAS[0], BIAS[..., :5]])
@pytest.mark.parametrize("how", ["plain", "past", "padded", "flat"])
def test_every_output_in_every_mode(how, mask, mode):
    q, k, v = arrays()
    inputs = [q, k, v, mask]
    attributes = {"is_causal": 1, "qk_matmul_output_mode": mode, "scale": 0.4}
    if mode > 0:  # at 0 onnx's own evaluator has the softcap in it, against the specification
        attributes["softcap"] = 1.5
    if how == "past":
        inputs = [q, k[:, :, 4:], v[:, :, 4:], mask, k[:, :, :4], v[:, :, :4]]
        attributes["left_window_size"] = 2
    elif how == "padded":
        inputs += [None, None, np.array([4, 2])]
    elif how == "flat":
        inputs[:3] = (x.swapaxes(1, 2).reshape(2, x.shape[2], -1) for x in (q, k, v))
        attributes |= {"q_num_heads": 4, "kv_num_heads": 2}
    ours, theirs = run(inputs, 4, **attributes)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_mode_0_is_before_the_softcap():
    q, k, v = arrays(hkv=4)
    got = attention(q, k, v, scale=0.4, softcap=1.5, with_scores=True)[3]
    np.testing.assert_allclose(got, 0.4 * q @ k.swapaxes(-1, -2), rtol=1e-5, atol=1e-6)


def test_double_precision_of_the_softmax():
    q, k, v = arrays()
    got = attention(q, k, v, softmax_precision=11)[0]
    assert got.dtype == np.float32
    wide = (x.astype(np.float64) for x in (q, k, v))
    np.testing.assert_array_equal(got, fusedattn.attention(*wide).astype(np.float32))


def test_no_scores_unless_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(fusedattn.reference, "logits", None)  # all that forms a matrix
    q, k, v = arrays()
    for outputs in (1, 2, 3):
        ours, _ = run([q, k, v], outputs, qk_matmul_output_mode=3)
        assert len(ours) == outputs
    with pytest.raises(TypeError, match="NoneType"):
        attention(q, k, v, with_scores=True)


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ([np.ones((2, 3, 8))] * 3, {"kv_num_heads": 2}, "q_num_heads: expected a divisor of 8.*No"),
        (
            [np.ones((2, 3, 8))] * 3,
            {"q_num_heads": 3, "kv_num_heads": 2},
            "q_num_heads: .*8, got 3",
        ),
        (arrays(), {"q_num_heads": 5}, "q_num_heads: expected 4 .*, got 5"),
        ([*arrays(), None, arrays()[1]], {}, "past_value: expected past_key and past_value"),
        ([*arrays(), None, *arrays()[1:], np.array([1, 2])], {}, "nonpad_kv_seqlen: expected None"),
        (arrays(), {"left_window_size": -2}, "window"),
        (arrays(), {"qk_matmul_output_mode": 4, "with_scores": True}, "_mode: .*got 4"),
    ],
)
def test_errors(inputs, attributes, message):
    with pytest.raises(ValueError, match=message):
        attention(*inputs, **attributes)
