"""Packed sequences are each sequence alone, bit for bit; wrong boundaries are refused."""

import numpy as np
import pytest

import fusedattn
from tests.strategies import DTYPES

CU = [
    ([0, 5, 5, 12, 13], [0, 9, 12, 12, 30]),
    ([0, 40], [0, 40]),
    ([0], [0]),
    ([0, 0, 0], [0, 0, 3]),
    ([0, 64, 128, 200], [0, 1, 130, 257]),
]


def arrays(cu_q, cu_k, dtype=np.float32, h=4, hkv=2, d=16, dv=9):
    rng = np.random.default_rng(0)
    shapes = (cu_q[-1], h, d), (cu_k[-1], hkv, d), (cu_k[-1], hkv, dv), (cu_q[-1], h, dv)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", [{}, {"is_causal": True}, {"scale": 0.3}])
@pytest.mark.parametrize(("cu_q", "cu_k"), CU)
def test_each_sequence_alone(isa, cu_q, cu_k, rules, dtype):
    q, k, v, dout = arrays(cu_q, cu_k, dtype)
    cu = np.array(cu_q, np.int32), np.array(cu_k, np.int64)
    out, lse = fusedattn.attention_varlen(q, k, v, *cu, return_lse=True, **rules)
    grads = fusedattn.attention_varlen_backward(dout, q, k, v, out, lse, *cu, **rules)
    assert out.shape == dout.shape
    assert lse.shape == dout.shape[1::-1]
    for n in range(len(cu_q) - 1):
        i, j = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = (x[None] for x in (dout[i], q[i], k[j], v[j]))
        options = rules | {"layout": "bshd"}
        dout_n, *qkv = alone
        out_n, lse_n = fusedattn.attention(*qkv, return_lse=True, **options)
        np.testing.assert_array_equal(out[i], out_n[0])
        np.testing.assert_array_equal(lse[:, i], lse_n[0])
        grads_n = fusedattn.attention_backward(dout_n, *qkv, out_n, lse_n, **options)
        np.testing.assert_array_equal(grads.dq[i], grads_n.dq[0])
        np.testing.assert_array_equal(grads.dk[j], grads_n.dk[0])
        np.testing.assert_array_equal(grads.dv[j], grads_n.dv[0])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads(isa, num_threads):
    cu = np.array([0, 100, 101, 400, 410])
    q, k, v, dout = arrays(cu, cu)
    out, lse = fusedattn.attention_varlen(q, k, v, cu, cu, return_lse=True)
    got = fusedattn.attention_varlen(q, k, v, cu, cu, num_threads=num_threads)
    np.testing.assert_array_equal(got, out)
    expected = fusedattn.attention_varlen_backward(dout, q, k, v, out, lse, cu, cu)
    grads = fusedattn.attention_varlen_backward(
        dout, q, k, v, out, lse, cu, cu, num_threads=num_threads
    )
    for x, y in zip(grads[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_only_what_is_needed(isa):
    q, k, v, dout = arrays([0, 7], [0, 7])
    cu = np.array([0, 7])
    out, lse = fusedattn.attention_varlen(q, k, v, cu, cu, return_lse=True)
    grads = fusedattn.attention_varlen_backward(dout, q, k, v, out, lse, cu, cu, need=("k",))
    assert grads.dq is None
    assert grads.dv is None
    assert grads.dk.shape == k.shape


@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    ("cu", "error", "came"),
    [
        ([1, 7], ValueError, "1"),
        ([0, 5, 4, 7], ValueError, "4"),
        ([0, 6], ValueError, "6"),
        ([0, 8], ValueError, "8"),
        (np.zeros(0, int), ValueError, r"\(0,\)"),
        ([[0, 7]], ValueError, r"\(1, 2\)"),
        ([0.0, 7.0], TypeError, "float64"),
    ],
)
def test_wrong_boundaries(argument, cu, error, came):
    q, k, v, _ = arrays([0, 7], [0, 7])
    good = np.array([0, 3, 7])
    arguments = {"cu_seqlens_q": good, "cu_seqlens_k": good, argument: np.array(cu)}
    with pytest.raises(error, match=rf"^{argument}: expected .*, got .*{came}"):
        fusedattn.attention_varlen(q, k, v, **arguments)


def test_as_many_sequences_of_keys_as_of_queries():
    q, k, v, _ = arrays([0, 7], [0, 7])
    with pytest.raises(ValueError, match=r"^cu_seqlens_k: expected .*, 3, got 1"):
        fusedattn.attention_varlen(q, k, v, np.array([0, 2, 4, 7]), np.array([0, 7]))
