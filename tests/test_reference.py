"""The oracle itself: values by hand, finite differences, PyTorch, and what masked slots may do."""

from typing import Any

import numpy as np
import pytest

from fusedattn import reference

INF = np.inf
B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 4, 5, 3, 2


def arrays(seed=0, *, heads=H, heads_kv=HKV, sq=SQ, sk=SK):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((B, heads, sq, D))
    k = rng.standard_normal((B, heads_kv, sk, D))
    v = rng.standard_normal((B, heads_kv, sk, DV))
    return q, k, v, rng


def rules_of(name) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    mask = rng.random((B, 1, SQ, SK)) < 0.6
    mask[0, 0, 1] = False
    bias = rng.standard_normal((H, 1, SK))
    bias[1, 0, 2] = -INF
    cases: dict[str, dict[str, Any]] = {
        "none": {},
        "scale": {"scale": -0.7},
        "scale 0": {"scale": 0.0},
        "causal": {"is_causal": True},
        "causal, q_offset": {"is_causal": True, "q_offset": np.array([-2, 1])},
        "window": {"window": (1, 0), "q_offset": 1},
        "window, right open": {"window": (0, -1)},
        "softcap": {"softcap": 0.8},
        "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 1.0]), "q_offset": 1},
        "alibi of each sample": {"alibi_slopes": rng.random((B, H))},
        "sinks": {"sinks": rng.standard_normal(H)},
        "bias": {"bias": bias},
        "bias of every pair": {"bias": rng.standard_normal((B, H, SQ, SK))},
        "mask": {"mask": mask},
        "lengths": {"q_lengths": np.array([3, 0]), "kv_lengths": np.array([2, 5])},
        "segments": {"segment_ids": (rng.integers(0, 2, (B, SQ)), rng.integers(0, 2, (B, SK)))},
        "dropout": {"dropout_p": 0.4, "seed": 7},
        "dropout of all": {"dropout_p": 1.0, "seed": 7},
        "all": {
            "mask": mask,
            "bias": bias,
            "is_causal": True,
            "q_offset": np.array([1, 2]),
            "window": (3, -1),
            "scale": 0.9,
            "softcap": 2.0,
            "alibi_slopes": rng.random(H),
            "sinks": rng.standard_normal(H),
            "kv_lengths": np.array([4, 5]),
            "q_lengths": np.array([4, 3]),
            "segment_ids": (np.array([[0, 0, 1, 1]] * B), np.array([[0, 0, 0, 1, 1]] * B)),
            "dropout_p": 0.25,
            "seed": 2**63 + 5,
        },
    }
    return cases[name]


RULES = [
    "none",
    "scale",
    "scale 0",
    "causal",
    "causal, q_offset",
    "window",
    "window, right open",
    "softcap",
    "alibi",
    "alibi of each sample",
    "sinks",
    "bias",
    "bias of every pair",
    "mask",
    "lengths",
    "segments",
    "dropout",
    "dropout of all",
    "all",
]


def finite_difference(f, x, step=1e-5):
    """df/dx by central differences, 0 where x is not finite."""
    grad = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        if np.isfinite(x[at]):
            up, down = x.copy(), x.copy()
            up[at] += step
            down[at] -= step
            grad[at] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_those_of_finite_differences(name):
    q, k, v, rng = arrays()
    rules = rules_of(name)
    dout, dlse = rng.standard_normal((B, H, SQ, DV)), rng.standard_normal((B, H, SQ))

    def loss(**changed):
        inputs = {"q": q, "k": k, "v": v} | rules | changed
        out, lse = reference.attention(**inputs, return_lse=True)
        return np.sum(dout * out) + np.sum(dlse * np.where(np.isneginf(lse), 0.0, lse))

    out, lse = reference.attention(q, k, v, return_lse=True, **rules)
    need = ("q", "k", "v", "bias", "sinks")
    grads: Any = reference.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, need=need, **rules
    )
    inputs = {"q": q, "k": k, "v": v} | {n: rules[n] for n in ("bias", "sinks") if n in rules}
    for argument, x in inputs.items():
        expected = finite_difference(lambda x, a=argument: loss(**{a: x}), x)
        got = getattr(grads, f"d{argument}")
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8, err_msg=argument)


def test_values_by_hand():
    # Two keys with logits log 1 and log 3: weights 1/4 and 3/4.
    q, k, v = [[1.0]], [[0.0], [np.log(3)]], [[8.0, 4.0], [0.0, 4.0]]
    out, lse = reference.attention(q, k, v, scale=1, return_lse=True)
    np.testing.assert_allclose(out, [[2.0, 4.0]], rtol=1e-15)
    np.testing.assert_allclose(lse, [np.log(4)], rtol=1e-15)
    # A sink with logit log 4 takes half of it.
    out, lse = reference.attention([q], [k], [v], scale=1, sinks=[np.log(4)], return_lse=True)
    np.testing.assert_allclose(out, [[[1.0, 2.0]]], rtol=1e-15)
    np.testing.assert_allclose(lse, [[np.log(8)]], rtol=1e-15)
    # The default scale is 1 / sqrt(D).
    lse = reference.attention([[2.0] * 4], [[1.0] * 4], [[1.0]], return_lse=True)[1]
    np.testing.assert_allclose(lse, [4.0], rtol=1e-15)


@pytest.mark.parametrize(
    ("rules", "seen"),
    [
        ({"is_causal": True}, ["1000", "1100", "1110"]),
        ({"is_causal": True, "q_offset": 1}, ["1100", "1110", "1111"]),
        ({"is_causal": True, "q_offset": -1}, ["0000", "1000", "1100"]),
        ({"window": (1, 1)}, ["1100", "1110", "0111"]),
        ({"window": (0, -1)}, ["1111", "0111", "0011"]),
        ({"window": (1, 0), "q_offset": 3}, ["0011", "0001", "0000"]),
        ({"q_lengths": 2}, ["1111", "1111", "0000"]),
        ({"kv_lengths": 3}, ["1110", "1110", "1110"]),
        ({"segment_ids": ([[0, 1, 2]], [[0, 0, 1, 1]])}, ["1100", "0011", "0000"]),
        ({"mask": [[True, False, True, False]]}, ["1010", "1010", "1010"]),
        ({"bias": [[-INF, 0, -INF, 0]]}, ["0101", "0101", "0101"]),
    ],
)
def test_who_sees_whom(rules, seen):
    # With equal logits and the identity as values, out is the row of weights.
    seen = np.array([[int(c) for c in row] for row in seen])
    out, lse = reference.attention(
        np.zeros((1, 1, 3, 2)),
        np.ones((1, 1, 4, 2)),
        np.eye(4)[None, None],
        return_lse=True,
        **rules,
    )
    count = seen.sum(axis=1)
    np.testing.assert_allclose(out[0, 0], seen / np.maximum(count, 1)[:, None])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse[0, 0], np.log(count))


def test_alibi_falls_with_the_distance_on_either_side():
    q, k, v = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 3, 1)), np.eye(3)[None, None]
    out = reference.attention(q, k, v, alibi_slopes=[2.0], q_offset=1)
    np.testing.assert_allclose(out[0, 0, 0], np.exp([-2, 0, -2]) / (1 + 2 * np.exp(-2)))


def test_layouts_and_leading_dimensions_agree():
    q, k, v, _ = arrays()
    out, lse = reference.attention(q, k, v, is_causal=True, return_lse=True)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    out_s, lse_s = reference.attention(*swapped, is_causal=True, layout="bshd", return_lse=True)
    np.testing.assert_array_equal(out_s.swapaxes(1, 2), out)
    np.testing.assert_array_equal(lse_s, lse)
    deep = [x.reshape(1, B, *x.shape[1:]) for x in (q, k, v)]
    np.testing.assert_array_equal(reference.attention(*deep, is_causal=True)[0], out)
    np.testing.assert_array_equal(reference.attention(q[0], k[0], v[0], is_causal=True), out[0])
    one, one_lse = reference.attention(q[0, 3], k[0, 1], v[0, 1], is_causal=True, return_lse=True)
    np.testing.assert_allclose(one, out[0, 3], rtol=1e-14)
    assert one_lse.shape == (SQ,)
    grads: Any = reference.attention_vjp(q[0, 3], k[0, 1], v[0, 1])[1](np.ones((SQ, DV)))
    assert [g.shape for g in grads[:3]] == [(SQ, D), (SK, D), (SK, DV)]


def packed_rules(rng, n, sq, sk, max_sq, max_sk):
    """Every rule for N packed sequences, and rules of sequence n alone as a batch of one."""
    rules: dict[str, Any] = {
        "mask": rng.random((n, 1, max_sq, max_sk)) < 0.8,
        "bias": rng.standard_normal((n, H, 1, max_sk)),
        "is_causal": True,
        "q_offset": rng.integers(0, 3, n),
        "window": (4, 1),
        "scale": 0.8,
        "softcap": 3.0,
        "alibi_slopes": rng.random((n, H)),
        "sinks": rng.standard_normal(H),
        "q_lengths": np.maximum(sq - 1, 0),
        "kv_lengths": np.maximum(sk - 1, 0),
        "segment_ids": (rng.integers(0, 2, sq.sum()), rng.integers(0, 2, sk.sum())),
        "dropout_p": 0.3,
        "seed": 11,
    }

    def alone(m, i, j):
        q_ids, k_ids = rules["segment_ids"]
        own = {name: rules[name][m] for name in ("q_offset", "q_lengths", "kv_lengths")}
        own["mask"] = rules["mask"][m][:, : sq[m], : sk[m]]
        own["bias"] = rules["bias"][m][:, :, : sk[m]]
        own["alibi_slopes"] = rules["alibi_slopes"][m]
        own["segment_ids"] = q_ids[i], k_ids[j]
        own["first_sample"] = m
        return rules | own | {"layout": "bshd"}

    return rules, alone


def test_varlen_is_each_sequence_alone():
    rng = np.random.default_rng(2)
    cu_q, cu_k = np.array([0, 3, 3, 8, 9]), np.array([0, 2, 6, 12, 12])
    q, k = rng.standard_normal((9, H, D)), rng.standard_normal((12, HKV, D))
    v = rng.standard_normal((12, HKV, DV))
    dout, dlse = rng.standard_normal((9, H, DV)), rng.standard_normal((H, 9))
    rules, rules_alone = packed_rules(rng, 4, np.diff(cu_q), np.diff(cu_k), 5, 6)
    need = ("k", "v", "bias", "sinks")
    out, lse = reference.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **rules)
    grads: Any = reference.attention_varlen_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, dlse=dlse, need=need, **rules
    )
    assert grads.dq is None
    assert np.isfinite(lse).sum() > 9
    dbias, dsinks = np.zeros(rules["bias"].shape), np.zeros(H)
    for n in range(4):
        i, j = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = rules_alone(n, i, j)
        out_n, lse_n = reference.attention(q[i], k[j], v[j], return_lse=True, **alone)
        np.testing.assert_array_equal(out[i], out_n)
        np.testing.assert_array_equal(lse[:, i], lse_n)
        grads_n: Any = reference.attention_backward(
            dout[i], q[i], k[j], v[j], out_n, lse_n, dlse=dlse[:, i], need=need, **alone
        )
        np.testing.assert_array_equal(grads.dk[j], grads_n.dk)
        np.testing.assert_array_equal(grads.dv[j], grads_n.dv)
        dbias[n, :, :, : j.stop - j.start] += grads_n.dbias
        dsinks += grads_n.dsinks
    np.testing.assert_array_equal(grads.dbias, dbias)
    np.testing.assert_array_equal(grads.dsinks, dsinks)


def test_packed_is_padded():
    # The other way to say the same: a batch whose lengths are those of the sequences.
    rng = np.random.default_rng(3)
    lengths, kv_lengths = np.array([2, 0, 4]), np.array([5, 3, 4])
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]) for x in (lengths, kv_lengths))
    q, k = rng.standard_normal((3, 4, H, D)), rng.standard_normal((3, 5, HKV, D))
    v = rng.standard_normal((3, 5, HKV, DV))
    rows, keys = np.arange(4) < lengths[:, None], np.arange(5) < kv_lengths[:, None]
    rules: dict[str, Any] = {
        "mask": rng.random((3, 1, 4, 5)) < 0.9,
        "bias": rng.standard_normal((1, 5)),
        "alibi_slopes": rng.random((3, H)),
        "q_offset": np.array([1, 2, 0]),
        "dropout_p": 0.3,
        "seed": 3,
    }
    packed = reference.attention_varlen(q[rows], k[keys], v[keys], cu_q, cu_k, **rules)
    padded = reference.attention(
        q, k, v, q_lengths=lengths, kv_lengths=kv_lengths, layout="bshd", **rules
    )
    np.testing.assert_allclose(packed, padded[rows], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_masked_slots_reach_nothing(name):
    q, k, v, rng = arrays()
    rules = rules_of(name)
    dout = rng.standard_normal((B, H, SQ, DV))
    need = ("q", "k", "v", "bias")
    out, lse = reference.attention(q, k, v, return_lse=True, **rules)
    grads: Any = reference.attention_backward(dout, q, k, v, out, lse, need=need, **rules)
    # The weights themselves, by the identity as values, say which pairs are allowed.
    eye = np.broadcast_to(np.eye(SK), (B, HKV, SK, SK))
    weights = reference.attention(q, k, eye, **(rules | {"dropout_p": 0.0}))
    unseen_keys = ~(weights.reshape(B, HKV, -1, SK) > 0).any(axis=2)
    blind = np.isneginf(lse)
    for junk in (np.nan, INF):
        q_, k_, v_, dout_ = (x.copy() for x in (q, k, v, dout))
        q_[blind] = dout_[blind] = k_[unseen_keys] = v_[unseen_keys] = junk
        dirty_out, dirty_lse = reference.attention(q_, k_, v_, return_lse=True, **rules)
        np.testing.assert_array_equal(dirty_out, out)
        np.testing.assert_array_equal(dirty_lse, lse)
        assert np.all(dirty_out[blind] == 0)
        dirty_grads: Any = reference.attention_backward(
            dout_, q_, k_, v_, out, lse, need=need, **rules
        )
        for got, expected in zip(dirty_grads, grads, strict=True):
            if expected is not None:
                np.testing.assert_array_equal(got, expected)


def test_an_allowed_nan_reaches_what_it_should():
    q, k, v, _ = arrays(heads=2, heads_kv=1)
    v[0, 0, 3, 1] = np.nan
    out = reference.attention(q, k, v, is_causal=True, q_offset=1)
    expected = np.zeros(out.shape, bool)
    expected[0, :, 2:, 1] = True  # queries 2 and on see key 3
    np.testing.assert_array_equal(np.isnan(out), expected)
    q, k, v, _ = arrays(heads=2, heads_kv=1)
    k[1, 0, 2, 0] = np.nan
    out, lse = reference.attention(q, k, v, is_causal=True, q_offset=1, return_lse=True)
    expected = np.zeros(lse.shape, bool)
    expected[1, :, 1:] = True
    np.testing.assert_array_equal(np.isnan(lse), expected)
    np.testing.assert_array_equal(np.isnan(out).all(axis=-1), expected)
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), expected)


def test_nothing_to_see():
    q, k, v, _ = arrays(sk=0)
    out, lse = reference.attention(q, k, v, return_lse=True)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))
    grads: Any = reference.attention_backward(np.ones_like(out), q, k, v, out, lse)
    assert np.all(grads.dq == 0)
    assert grads.dk.shape == k.shape


@pytest.mark.parametrize("name", ["none", "scale", "causal", "mask", "bias", "bias of every pair"])
def test_agrees_with_pytorch(name):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    q, k, v, rng = arrays()
    rules = rules_of(name)
    dout = rng.standard_normal((B, H, SQ, DV))
    tq, tk, tv = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    options: dict[str, Any] = {n: rules[n] for n in ("is_causal", "scale") if n in rules}
    bias = None
    if "mask" in rules:
        options["attn_mask"] = torch.tensor(rules["mask"])
    if "bias" in rules:
        bias = options["attn_mask"] = torch.tensor(rules["bias"], requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            tq, tk, tv, enable_gqa=True, **options
        )
        out.backward(torch.tensor(dout))
    ours, vjp = reference.attention_vjp(q, k, v, need=("q", "k", "v", "bias"), **rules)
    grads: Any = vjp(dout)
    np.testing.assert_allclose(ours, out.detach().numpy(), rtol=1e-12, atol=1e-13)
    for got, leaf in zip(grads, (tq, tk, tv, bias), strict=False):
        if leaf is not None:
            np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-12, atol=1e-13)
