"""dot_product_attention: JAX's signature and meaning, Keras's argument names."""

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedattn
from fusedattn import dot_product_attention

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


def arrays(dtype=np.float32, s=S, k=K, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, H), "key": (B, s, k, H), "value": (B, s, k, H)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def cases():
    """Arguments by name: what JAX documents, one by one and together."""
    rng = np.random.default_rng(1)
    mask = rng.random((B, 1, T, S)) < 0.6
    mask[0, 0, 1] = False
    lengths = {
        "query_seq_lengths": np.array([3, 5], np.int32),
        "key_value_seq_lengths": np.array([6, 2], np.int32),
    }
    every_bias = {
        f"bias {shape}": {"bias": rng.standard_normal(shape).astype(np.float32)}
        for shape in ((B, N, T, S), (1, N, 1, S), (B, 1, T, 1), (1, 1, T, S), (1, N, T, S))
    }
    rules = {
        "plain": {},
        "scale": {"scale": 0.3},
        "causal": {"is_causal": True},
        "mask": {"mask": mask},
        "mask of each head": {"mask": rng.random((1, N, 1, S)) < 0.5},
        "nothing to see": {"mask": np.zeros((1, 1, T, 1), bool)},
        "window": {"local_window_size": 1},
        "window of two": {"local_window_size": (3, 0)},
        "window that blinds": {
            "local_window_size": (0, 1),
            "mask": np.tri(T, S, -1, dtype=bool)[None, None],
        },
        "lengths": lengths,
        "query lengths": {"query_seq_lengths": lengths["query_seq_lengths"]},
        "no keys": {"key_value_seq_lengths": np.array([0, 4], np.int32)},
        **every_bias,
        "all": {
            "mask": mask,
            "bias": every_bias[f"bias {(1, N, T, S)}"]["bias"],
            "is_causal": True,
            "local_window_size": (2, 4),
            "scale": 0.7,
            **lengths,
        },
    }
    cases = {name: arrays() | rule for name, rule in rules.items()}
    cases["as many heads"] = arrays(k=N) | {"is_causal": True}
    cases["one head for all"] = arrays(k=1) | {"is_causal": True}
    one = {name: x[0] for name, x in arrays().items()}
    cases["no batch"] = one | {"is_causal": True, "mask": mask[0]}
    cases["more queries than keys"] = arrays(s=3) | {"is_causal": True}
    return cases


@pytest.fixture(scope="module")
def answers():
    """What JAX says to all cases, by name."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("compares with JAX, which is not installed")
    process = subprocess.run(
        [sys.executable, "-m", "tests.jax_peer"],
        input=pickle.dumps(list(cases().values())),
        capture_output=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    return dict(zip(cases(), pickle.loads(process.stdout), strict=True))


def close(got, expected, what):
    assert got.dtype == expected.dtype, what
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=5e-6, err_msg=what)


@pytest.mark.parametrize("name", cases())
def test_agrees_with_jax(isa, answers, name):
    out, residual, _ = answers[name]
    arguments = cases()[name]
    got, got_residual = dot_product_attention(**arguments, return_residual=True)
    close(got, out, "out")
    close(got_residual, residual, "residual")
    np.testing.assert_array_equal(dot_product_attention(**arguments), got)


@pytest.mark.parametrize("name", cases())
def test_gradients_agree_with_jax(isa, answers, name):
    """By attention_vjp; where nothing is to be seen, JAX has those of its mean of all values."""
    arguments = cases()[name]
    out, _, expected = answers[name]
    window = arguments.get("local_window_size")
    rules = {
        "bias": arguments.get("bias"),
        "mask": arguments.get("mask"),
        "is_causal": arguments.get("is_causal", False),
        "scale": arguments.get("scale"),
        "window": (window, window) if isinstance(window, int) else window,
        "q_lengths": arguments.get("query_seq_lengths"),
        "kv_lengths": arguments.get("key_value_seq_lengths"),
    }
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    lse = fusedattn.attention(q, k, v, layout="bshd", return_lse=True, **rules)[1]
    dout = np.cos(np.arange(out.size)).astype(np.float32).reshape(out.shape)
    blind = np.isneginf(np.swapaxes(lse, -1, -2))
    if arguments.get("query_seq_lengths") is not None:
        padded = np.arange(T)[:, None] >= arguments["query_seq_lengths"].reshape(-1, 1, 1)
        blind = blind & ~padded
    need = ("q", "k", "v") + (("bias",) if "bias" in arguments else ())
    _, vjp = fusedattn.attention_vjp(q, k, v, layout="bshd", need=need, **rules)
    grads = vjp(dout)
    close(grads.dq, expected["query"], "query")
    close(grads.dk, expected["key"], "key")
    # The mean's gradient, of blind rows, goes to all values alike.
    share = np.where(blind[..., None], dout, 0).sum(axis=-3, keepdims=True) / k.shape[-3]
    groups = share.reshape(*share.shape[:-2], k.shape[-2], -1, H).sum(axis=-2)
    close(grads.dv + groups.astype(np.float32), expected["value"], "value")
    if "bias" in arguments:
        close(grads.dbias, expected["bias"], "bias")


def test_a_query_that_sees_nothing_gets_the_mean_of_all_values():
    x = arrays()
    mask = np.ones((B, N, T, S), bool)
    mask[1, 2, 3] = False
    out, residual = dot_product_attention(**x, mask=mask, return_residual=True)
    whole, lse = fusedattn.attention(*x.values(), mask=mask, layout="bshd", return_lse=True)
    seen = np.ones((B, T, N), bool)
    seen[1, 3, 2] = False
    np.testing.assert_array_equal(out[seen], whole[seen])
    np.testing.assert_array_equal(residual[seen], lse.swapaxes(1, 2)[seen])
    np.testing.assert_allclose(out[1, 3, 2], x["value"][1, :, 1].mean(axis=0), rtol=1e-6)
    # Padded queries are 0 all the same, and so is what a bias of -inf alone hides.
    out = dot_product_attention(**x, mask=mask, query_seq_lengths=np.array([5, 3]))
    assert np.all(out[1, 3:] == 0)
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    assert np.all(dot_product_attention(**x, bias=bias)[1, 3, 2] == 0)


def test_what_is_masked_reaches_nothing():
    clean, dirty = arrays(), arrays()
    dirty["key"][1, 4:] = dirty["value"][1, 4:] = np.nan
    lengths = {"key_value_seq_lengths": np.array([7, 4])}
    np.testing.assert_array_equal(
        dot_product_attention(**dirty, **lengths), dot_product_attention(**clean, **lengths)
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_dtypes(dtype):
    out, residual = dot_product_attention(**arrays(dtype), return_residual=True)
    assert out.dtype == residual.dtype == dtype


def test_keras_names():
    x = arrays()
    got = dot_product_attention(**x, flash_attention=True, attn_logits_soft_cap=2.0)
    expected = fusedattn.attention(*x.values(), softcap=2.0, layout="bshd")
    np.testing.assert_array_equal(got, expected)
    assert not np.allclose(got, dot_product_attention(**x))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"implementation": "cudnn"}, ValueError, "implementation: expected .*'cudnn'"),
        ({"local_window_size": -1}, ValueError, "local_window_size: .*-1"),
        ({"local_window_size": (1, -1)}, ValueError, r"local_window_size: .*\(1, -1\)"),
        ({"mask": np.ones((T, S))}, TypeError, "mask: .*float64"),
        ({"bias": np.ones((T, S + 1), np.float32)}, ValueError, r"bias: .*\(5, 8\)"),
        ({"key": np.zeros((B, S, 3, H), np.float32)}, ValueError, "k: .*3"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        dot_product_attention(**(arrays() | changed))
