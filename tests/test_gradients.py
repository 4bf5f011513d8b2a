"""The kernel's own gradients, in float64, against finite differences of its own forward pass."""

from typing import Any

import numpy as np
import pytest

import fusedattn

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 3, 5, 3, 2
STEP = 1e-5

RNG = np.random.default_rng(1)
MASK = RNG.random((B, 1, SQ, SK)) < 0.7
MASK[0, 0, 1] = False
BIAS = RNG.standard_normal((H, 1, SK))
BIAS[1, 0, 2] = -np.inf
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": -0.7},
    "causal": {"is_causal": True, "q_offset": np.array([-1, 2])},
    "window": {"window": (1, 0), "q_offset": 1},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": RNG.random((B, H)), "q_offset": 1},
    "sinks": {"sinks": RNG.standard_normal(H)},
    "mask": {"mask": MASK},
    "bias": {"bias": BIAS},
    "bias of every pair": {"bias": RNG.standard_normal((B, H, SQ, SK))},
    "lengths": {"q_lengths": np.array([2, 0]), "kv_lengths": np.array([2, 5])},
    "segments": {"segment_ids": (RNG.integers(0, 2, (B, SQ)), RNG.integers(0, 2, (B, SK)))},
    "dropout": {"dropout_p": 0.4, "seed": 7},
}
RULES["all"] = {key: x for rules in RULES.values() for key, x in rules.items()}
RULES["all"] |= {"is_causal": False, "window": (3, 1), "q_offset": np.array([1, 2])}
RULES["all"]["q_lengths"] = np.array([3, 2])
RULES["all"]["segment_ids"] = (np.array([[0, 0, 1]] * B), np.array([[0, 1, 0, 1, 0]] * B))


def arrays(sq=SQ, sk=SK):
    rng = np.random.default_rng(0)
    shapes = (B, H, sq, D), (B, HKV, sk, D), (B, HKV, sk, DV), (B, H, sq, DV), (B, H, sq)
    return [rng.standard_normal(shape) for shape in shapes]


def differences(f, x):
    """df/dx, 0 where x is not finite."""
    grad = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        if np.isfinite(x[at]):
            up, down = x.copy(), x.copy()
            up[at] += STEP
            down[at] -= STEP
            grad[at] = (f(up) - f(down)) / (2 * STEP)
    return grad


def value(dout, dlse, out, lse):
    """The scalar whose gradients by out and lse are dout and dlse."""
    return np.sum(dout * out) + np.sum(dlse * np.where(np.isneginf(lse), 0.0, lse))


@pytest.mark.parametrize("name", RULES)
def test_gradients(isa, name):
    q, k, v, dout, dlse = arrays()
    inputs = {"q": q, "k": k, "v": v} | RULES[name]
    out, lse = fusedattn.attention(**inputs, return_lse=True)
    wanted = [n for n in ("q", "k", "v", "bias", "sinks") if n in inputs]
    grads = fusedattn.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, need=wanted, **RULES[name]
    )
    for argument in wanted:

        def loss(x, argument=argument):
            changed = fusedattn.attention(**(inputs | {argument: x}), return_lse=True)
            return value(dout, dlse, *changed)

        expected = differences(loss, inputs[argument])
        got = getattr(grads, f"d{argument}")
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8, err_msg=argument)


CU_Q, CU_K = np.array([0, 3, 3, 5]), np.array([0, 2, 4, 9])


def test_packed_gradients(isa):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((5, H, D), (9, HKV, D), (9, HKV, DV)))
    dout, dlse = rng.standard_normal((5, H, DV)), rng.standard_normal((H, 5))
    rules: dict[str, Any] = {
        "bias": rng.standard_normal((3, 1, 3, 5)),
        "sinks": rng.standard_normal(H),
        "mask": rng.random((3, 5)) < 0.8,
        "softcap": 2.0,
        "alibi_slopes": rng.random((3, H)),
        "window": (3, -1),
        "q_offset": np.array([0, 1, 2]),
        "kv_lengths": np.array([2, 1, 4]),
        "segment_ids": (np.zeros(5, int), (np.arange(9) == 5).astype(int)),
        "dropout_p": 0.3,
        "seed": 4,
    }
    inputs = {"q": q, "k": k, "v": v} | rules
    cu = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    out, lse = fusedattn.attention_varlen(**inputs, **cu, return_lse=True)
    wanted = ["q", "k", "v", "bias", "sinks"]
    grads = fusedattn.attention_varlen_backward(
        dout, q, k, v, out, lse, **cu, dlse=dlse, need=wanted, **rules
    )
    for argument in wanted:

        def loss(x, argument=argument):
            changed = fusedattn.attention_varlen(**(inputs | {argument: x}), **cu, return_lse=True)
            return value(dout, dlse, *changed)

        expected = differences(loss, inputs[argument])
        got = getattr(grads, f"d{argument}")
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8, err_msg=argument)
