"""Promise 6: wrong input is refused by an error that says which, what it should be, what came."""

import numpy as np
import pytest

import fusedattn
from tests.strategies import make

SIZES = {"lead": (2,), "h": 4, "hkv": 2, "sq": 5, "sk": 6, "d": 8, "dv": 3}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def huge(*shape):
    """An array of any shape that takes four bytes."""
    return np.broadcast_to(np.float32(0), shape)


# argument, what is wrong with it, error, what the message must say came
WRONG = [
    ("q", zeros(8), ValueError, r"\(8,\)"),
    ("q", np.float32(1), ValueError, r"\(\)"),
    ("q", zeros(2, 4, 5, 0), ValueError, r"\(2, 4, 5, 0\)"),
    ("q", zeros(2, 4, 5, 8, dtype=np.int32), TypeError, "int32"),
    ("q", zeros(2, 4, 5, 8, dtype=np.complex64), TypeError, "complex64"),
    ("q", zeros(2, 4, 5, 8, dtype=object), TypeError, "object"),
    ("q", zeros(2, 4, 5, 8, dtype=">f4"), TypeError, ">f4|big"),
    ("q", zeros(2, 4, 5, 8).tolist(), TypeError, "list"),
    ("q", "query", TypeError, "str"),
    ("q", None, TypeError, "None"),
    ("k", zeros(2, 2, 6, 7), ValueError, "7"),
    ("k", zeros(2, 3, 6, 8), ValueError, "3"),
    ("k", zeros(3, 2, 6, 8), ValueError, "3"),
    ("k", zeros(2, 0, 6, 8), ValueError, "0"),
    ("k", zeros(2, 2, 6, 8, dtype=np.float64), TypeError, "float64"),
    ("k", zeros(6, 8), ValueError, r"\(6, 8\)|2"),
    ("v", zeros(2, 2, 7, 3), ValueError, "7"),
    ("v", zeros(2, 4, 6, 3), ValueError, "4"),
    ("v", zeros(2, 2, 6, 3, dtype=np.float64), TypeError, "float64"),
    ("v", zeros(1, 2, 6, 3), ValueError, "1"),
    ("mask", zeros(5, 6), TypeError, "float32"),
    ("mask", zeros(5, 6, dtype=np.uint8), TypeError, "uint8"),
    ("mask", zeros(5, 7, dtype=bool), ValueError, r"\(5, 7\)"),
    ("mask", zeros(1, 2, 4, 5, 6, dtype=bool), ValueError, r"\(1, 2, 4, 5, 6\)"),
    ("mask", [[True]], TypeError, "list"),
    ("bias", zeros(5, 6, dtype=bool), TypeError, "bool"),
    ("bias", zeros(5, 6, dtype=np.float64), TypeError, "float64"),
    ("bias", zeros(2, 6), ValueError, r"\(2, 6\)"),
    ("is_causal", "yes", TypeError, "str|yes"),
    ("is_causal", np.ones(2, bool), TypeError, "ndarray|array"),
    ("q_offset", 1.5, TypeError, "float|1.5"),
    ("q_offset", np.zeros(2, np.float32), TypeError, "float32"),
    ("q_offset", np.zeros(3, int), ValueError, r"\(3,\)"),
    ("scale", np.nan, ValueError, "nan"),
    ("scale", np.inf, ValueError, "inf"),
    ("scale", "large", TypeError, "str|large"),
    ("kv_lengths", np.uint64(2**63), ValueError, "9223372036854775808"),
    ("q_offset", 2**70, ValueError, "1180591620717411303424"),
    ("kv_lengths", np.array([-1, 2]), ValueError, "-1"),
    ("kv_lengths", np.array([1, 7]), ValueError, "7"),
    ("kv_lengths", np.array([1, 2, 3]), ValueError, r"\(3,\)"),
    ("kv_lengths", np.array([1.0, 2.0]), TypeError, "float64"),
    ("softcap", -1.0, ValueError, "-1"),
    ("softcap", np.nan, ValueError, "nan"),
    ("alibi_slopes", zeros(3), ValueError, r"\(3,\)"),
    ("alibi_slopes", zeros(2, 3), ValueError, r"\(2, 3\)"),
    ("alibi_slopes", np.ones(4, int), TypeError, "int64"),
    ("sinks", zeros(2), ValueError, r"\(2,\)"),
    ("sinks", [1.0] * 4, TypeError, "list"),
    ("segment_ids", np.zeros((2, 5), int), ValueError, r"\(2, 5\)"),
    ("segment_ids", (np.zeros((2, 5), int),), ValueError, "1"),
    ("segment_ids", (np.zeros((2, 5), int), np.zeros((2, 5), int)), ValueError, r"\(2, 5\)"),
    ("segment_ids", (zeros(2, 5), np.zeros((2, 6), int)), TypeError, "float32"),
    ("dropout_p", -0.1, ValueError, "-0.1"),
    ("dropout_p", 1.5, ValueError, "1.5"),
    ("dropout_p", "half", TypeError, "str"),
    ("layout", "sbhd", ValueError, "sbhd"),
    ("num_threads", 0, ValueError, "0"),
    ("num_threads", -2, ValueError, "-2"),
    ("num_threads", 1.5, TypeError, "float|1.5"),
    ("out", zeros(2, 4, 5, 4), ValueError, r"\(2, 4, 5, 4\)|4"),
    ("out", zeros(2, 4, 5, 3, dtype=np.float64), TypeError, "float64"),
    ("out", np.broadcast_to(zeros(3), (2, 4, 5, 3)), ValueError, "read-only|writeable|writable"),
    ("out", [0.0], TypeError, "list"),
]


def call(changed, out):
    p = make(SIZES)
    arguments = {"q": p.q, "k": p.k, "v": p.v, "out": out} | changed
    return fusedattn.attention(**arguments)


def ids(case):
    return case if isinstance(case, str) else None


@pytest.mark.parametrize(("argument", "wrong", "error", "came"), WRONG, ids=ids)
def test_wrong_argument(argument, wrong, error, came):
    out = np.full((2, 4, 5, 3), 7, np.float32)
    with pytest.raises(error, match=rf"^{argument}: expected .*, got .*({came})") as caught:
        call({argument: wrong}, out)
    assert "\n" not in str(caught.value)
    assert np.all(out == 7)


def test_unknown_argument():
    with pytest.raises(TypeError, match="causal"):
        call({"causal": True}, None)


@pytest.mark.parametrize("kind", ["q", "v", "mask", "itself", "itself, stride 0"])
def test_out_that_overlaps(kind):
    p = make(SIZES | {"sk": 5, "h": 2, "dv": 8})
    memory = np.zeros(200, np.float32)
    mask = np.ones((2, 2, 5, 5), bool)
    rows = np.lib.stride_tricks.as_strided(memory, p.q.shape, (160, 80, 16, 4))
    heads = np.lib.stride_tricks.as_strided(memory, p.q.shape, (160, 0, 32, 4))
    over_mask = np.frombuffer(memory, bool, 100, 3).reshape(mask.shape)
    out = {
        "q": p.q,
        "v": p.v[..., ::-1, :],
        "mask": memory[:160].reshape(p.q.shape),
        "itself": rows,
        "itself, stride 0": heads,
    }[kind]
    before = out.copy()
    with pytest.raises(ValueError, match=r"^out: expected .*, got .*overlaps"):
        fusedattn.attention(p.q, p.k, p.v, mask=over_mask if kind == "mask" else mask, out=out)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1, 2**50, 8), (1, 1, 4, 8), (1, 1, 4, 8)],  # out is huge
        [(1, 1, 2**58, 1), (1, 1, 4, 1), (1, 1, 4, 1)],  # its bytes overflow 64 bits
        [(2**50, 1, 1, 1)] * 3,  # so many samples
    ],
)
def test_huge_sizes_are_refused(shapes):
    with pytest.raises((MemoryError, ValueError)):
        fusedattn.attention(*(huge(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("argument", "wrong", "error", "came"),
    [
        ("dout", zeros(2, 4, 5, 4), ValueError, "4"),
        ("dout", zeros(2, 4, 5, 3, dtype=np.float64), TypeError, "float64"),
        ("out", zeros(2, 4, 6, 3), ValueError, "6"),
        ("out", zeros(2, 4, 5, 3).tolist(), TypeError, "list"),
        ("lse", zeros(2, 5, 4), ValueError, r"\(2, 5, 4\)"),
        ("lse", zeros(2, 4, 5, dtype=np.float64), TypeError, "float64"),
        ("dlse", zeros(2, 5, 4), ValueError, r"\(2, 5, 4\)"),
        ("dlse", zeros(2, 4, 5, dtype=np.float64), TypeError, "float64"),
        ("need", ("q", "sinks"), ValueError, "sinks=None"),
        ("need", ("q", "bias"), ValueError, "bias=None"),
        ("need", ("q", "queries"), ValueError, "queries"),
        ("need", "qkw", (TypeError, ValueError), "qkw|w"),
        ("k", zeros(2, 3, 6, 8), ValueError, "3"),
        ("mask", zeros(5, 7, dtype=bool), ValueError, r"\(5, 7\)"),
        ("kv_lengths", np.array([1, 7]), ValueError, "7"),
        ("scale", np.nan, ValueError, "nan"),
    ],
    ids=ids,
)
def test_wrong_argument_of_backward(argument, wrong, error, came):
    p = make(SIZES)
    out, lse = fusedattn.attention(p.q, p.k, p.v, return_lse=True)
    arguments = {"dout": p.dout, "q": p.q, "k": p.k, "v": p.v, "out": out, "lse": lse}
    with pytest.raises(error, match=rf"^{argument}: expected .*, got .*({came})"):
        fusedattn.attention_backward(**(arguments | {argument: wrong}))


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**64, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_wrong_seed(seed, error):
    with pytest.raises(error, match=r"^seed: expected .*, got "):
        call({"dropout_p": 0.5, "seed": seed}, None)


def test_backward_of_dropout_wants_the_seed():
    p = make(SIZES)
    out, lse = fusedattn.attention(p.q, p.k, p.v, dropout_p=0.5, return_lse=True)
    with pytest.raises(TypeError, match=r"^seed: expected"):
        fusedattn.attention_backward(p.dout, p.q, p.k, p.v, out, lse, dropout_p=0.5)


@pytest.mark.parametrize("n", [0, -1])
def test_set_num_threads_refuses(n):
    before = fusedattn.get_num_threads()
    with pytest.raises(ValueError, match=rf"expected.*got.*{n}"):
        fusedattn.set_num_threads(n)
    assert fusedattn.get_num_threads() == before
