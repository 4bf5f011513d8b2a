"""Packed sequences are each sequence alone, bit for bit; wrong boundaries are refused."""

import numpy as np
import pytest

import fusedattn
from tests.accuracy import assert_same
from tests.strategies import DTYPES
from tests.test_threads import run

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


LENGTHS_Q, LENGTHS_K = np.array([5, 0, 33, 1, 70]), np.array([9, 4, 40, 0, 129])


def rules_of(name, dtype):
    """A rule for five sequences; arrays by pair reach to the longest."""
    rng = np.random.default_rng(0)
    n, h, sq, sk = 5, 4, 70, 129
    rules = {
        "mask": {"mask": rng.random((n, 1, sq, sk)) < 0.7},
        "mask of keys": {"mask": rng.random((n, 1, 1, sk)) < 0.7},
        "bias": {"bias": rng.standard_normal((n, h, sq, sk)).astype(dtype)},
        "bias of heads": {"bias": rng.standard_normal((h, 1, sk)).astype(dtype)},
        "causal": {"is_causal": True, "q_offset": LENGTHS_K - LENGTHS_Q},
        "window": {"window": (20, 3), "q_offset": rng.integers(0, 9, n)},
        "softcap": {"softcap": 2.0, "scale": 1.0},
        "alibi": {"alibi_slopes": rng.random((n, h)), "q_offset": 3},
        "sinks": {"sinks": rng.standard_normal(h)},
        "lengths": {"q_lengths": LENGTHS_Q // 2, "kv_lengths": LENGTHS_K - LENGTHS_K // 3},
        "segments": {
            "segment_ids": tuple(np.sort(rng.integers(0, 3, (n, m))) for m in (sq, sk)),
        },
        "dropout": {"dropout_p": 0.3, "seed": 2**40},
    }
    names = rules if name == "all" else [name]
    return {key: x for one in names for key, x in rules[one].items()}


NAMES = ["mask", "mask of keys", "bias", "bias of heads", "causal", "window", "softcap", "alibi"]
NAMES += ["sinks", "lengths", "segments", "dropout", "all"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_padded_bit_for_bit(isa, name, dtype):
    padded = rules_of(name, dtype)
    rows, keys = np.arange(70) < LENGTHS_Q[:, None], np.arange(129) < LENGTHS_K[:, None]
    packed = dict(padded)
    if "segment_ids" in padded:
        q_ids, k_ids = padded["segment_ids"]
        packed["segment_ids"] = q_ids[rows], k_ids[keys]
    padded.setdefault("q_lengths", LENGTHS_Q)
    padded.setdefault("kv_lengths", LENGTHS_K)
    rng = np.random.default_rng(1)
    shapes = (5, 70, 4, 16), (5, 129, 2, 16), (5, 129, 2, 9), (5, 70, 4, 9)
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    real = np.float64 if dtype == np.float64 else np.float32
    dlse = rng.standard_normal((5, 4, 70)).astype(real)
    cu = [np.concatenate([[0], np.cumsum(n)]) for n in (LENGTHS_Q, LENGTHS_K)]
    need = ("q", "k", "v", *(n for n in ("bias", "sinks") if n in padded))

    whole = {"layout": "bshd"} | padded
    out, lse = fusedattn.attention(q, k, v, return_lse=True, **whole)
    grads = fusedattn.attention_backward(dout, q, k, v, out, lse, dlse=dlse, need=need, **whole)
    tight = q[rows], k[keys], v[keys]
    got, got_lse = fusedattn.attention_varlen(*tight, *cu, return_lse=True, **packed)
    dlse_packed = dlse.transpose(1, 0, 2)[:, rows]
    got_grads = fusedattn.attention_varlen_backward(
        dout[rows], *tight, got, got_lse, *cu, dlse=dlse_packed, need=need, **packed
    )
    assert_same(got, out[rows], "out")
    assert_same(got_lse, lse.transpose(1, 0, 2)[:, rows], "lse")
    assert_same(got_grads.dq, grads.dq[rows], "dq")
    assert_same(got_grads.dk, grads.dk[keys], "dk")
    assert_same(got_grads.dv, grads.dv[keys], "dv")
    for each in ("dbias", "dsinks"):
        if getattr(grads, each) is not None:
            assert_same(getattr(got_grads, each), getattr(grads, each), each)


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


SHARED = """
import numpy as np
import fusedattn
from fusedattn import _core

lengths = np.array([3, 0, 70, 300, 1, 150, 64, 20])
cu = np.concatenate([[0], np.cumsum(lengths)])
rng = np.random.default_rng(0)
shapes = [(cu[-1], h, 32) for h in (4, 2, 2, 4)]
q, k, v, dout = (rng.standard_normal(shape, np.float32) for shape in shapes)
for isa in fusedattn.cpu_info()["isas"]:
    _core.set_isa(isa)
    for shape in (4, 300, 300), (300, 300), (8, 1, 300, 300), (1, 300), (300, 1), (8, 4, 1, 300):
        rules = {"bias": rng.standard_normal(shape, np.float32)}
        out, lse = fusedattn.attention_varlen(q, k, v, cu, cu, return_lse=True, **rules)
        first = None
        for threads in (1, 2, 3, 5):
            grads = fusedattn.attention_varlen_backward(
                dout, q, k, v, out, lse, cu, cu, need=("q", "bias"), num_threads=threads, **rules
            )
            first = first or grads
            assert (grads.dbias == first.dbias).all() and (grads.dq == first.dq).all()
"""


def test_threads_at_a_bias_that_sequences_of_different_lengths_share():
    """They add to its gradient in turns, of which short sequences have fewer."""
    run(SHARED)


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
