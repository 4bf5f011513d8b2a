"""scaled_dot_product_attention: PyTorch's signature, meaning and errors."""

import numpy as np
import pytest

import fusedattn
from tests.accuracy import error, fused, oracle
from tests.strategies import make
from tests.yardstick import rounding


def arrays(hkv=4, dtype=np.float32, lead=(2,)):
    rng = np.random.default_rng(0)
    shapes = (*lead, 4, 5, 8), (*lead, hkv, 7, 8), (*lead, hkv, 7, 6)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def masks():
    rng = np.random.default_rng(1)
    mask = rng.random((5, 7)) < 0.6
    mask[1] = False
    return {
        "none": None,
        "bool": mask,
        "bool of each sample": rng.random((2, 1, 1, 7)) < 0.6,
        "bool of each head": rng.random((4, 5, 1)) < 0.6,
        "float": rng.standard_normal((5, 7)).astype(np.float32),
        "float with -inf": np.where(mask, 0, -np.inf).astype(np.float32),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("hkv", [4, 2, 1])
def test_agrees_with_pytorch(name, scale, hkv):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    query, key, value = arrays(hkv)
    mask = masks()[name]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(x) for x in (query, key, value)),
        attn_mask=None if mask is None else torch.tensor(mask),
        scale=scale,
        enable_gqa=hkv == 2,
    )
    got = fusedattn.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=hkv == 2
    )
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6)])
def test_causal_starts_top_left_as_in_pytorch(lengths):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((2, 3, n, 8)).astype(np.float32) for n in lengths)
    expected = torch.nn.functional.scaled_dot_product_attention(
        torch.tensor(query), torch.tensor(key), torch.tensor(key), is_causal=True
    )
    got = fusedattn.scaled_dot_product_attention(query, key, key, is_causal=True)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hkv", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("name", [*masks(), "causal"])
def test_gradients_agree_with_pytorch(name, scale, hkv, dtype):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays(hkv, dtype)]
    mask, rule = masks().get(name), {"is_causal": name == "causal", "scale": scale}
    bias, attn_mask = None, None
    if mask is not None:
        mask = mask if mask.dtype == bool else mask.astype(dtype)
        attn_mask = torch.tensor(mask)
        if attn_mask.is_floating_point():
            bias = attn_mask.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=attn_mask, **rule, enable_gqa=hkv == 2
    )
    dout = np.random.default_rng(2).standard_normal(out.shape).astype(dtype)
    out.backward(torch.tensor(dout))
    if mask is not None:
        rule["mask" if mask.dtype == bool else "bias"] = mask
    need = ("q", "k", "v") if bias is None else ("q", "k", "v", "bias")
    _, vjp = fusedattn.attention_vjp(*arrays(hkv, dtype), need=need, **rule)
    eps = np.finfo(dtype).eps
    for got, leaf in zip(vjp(dout), (*leaves, bias), strict=False):
        if leaf is not None:
            expected = leaf.grad.numpy()
            if leaf is bias:  # a row that sees nothing has NaN there
                expected = np.where(np.isneginf(mask).all(axis=-1, keepdims=True), 0, expected)
            np.testing.assert_allclose(got, expected, rtol=200 * eps, atol=50 * eps)


@pytest.mark.parametrize(
    ("sq", "sk", "d"), [(512, 512, 64), (64, 4096, 64), (1, 4096, 128), (200, 200, 8)]
)
def test_is_no_less_accurate_than_pytorch(isa, sq, sk, d):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    sizes = {"lead": (1,), "h": 2, "hkv": 2, "sq": sq, "sk": sk, "d": d, "dv": d}
    p = make(sizes)
    leaves = [torch.tensor(x, requires_grad=True) for x in (p.q, p.k, p.v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves)
    out.backward(torch.tensor(p.dout))
    theirs = dict(zip(("out", "dq", "dk", "dv"), (out, *(x.grad for x in leaves)), strict=True))
    ours, exact, size = fused(p), oracle(p), rounding(p)
    for name, x in theirs.items():
        # One eps of the size of a chance rounding: the largest of many errors is a matter of luck.
        luck = np.finfo(np.float32).eps * size[name]
        wrong = error(ours[name], exact[name], name)
        allowed = error(x.detach().numpy(), exact[name], name) + luck
        assert wrong <= allowed, f"{name}: error {wrong:.3g}, PyTorch's and luck {allowed:.3g}"


def test_is_attention():
    query, key, value = arrays()
    for name, mask in masks().items():
        rule = {} if mask is None else {"mask" if name.startswith("bool") else "bias": mask}
        np.testing.assert_array_equal(
            fusedattn.scaled_dot_product_attention(query, key, value, attn_mask=mask),
            fusedattn.attention(query, key, value, **rule),
        )


def test_any_leading_dimensions():
    for lead in ((), (3,), (2, 3)):
        query, key, value = arrays(lead=lead)
        assert fusedattn.scaled_dot_product_attention(query, key, value).shape == (*lead, 4, 5, 6)
    one = fusedattn.scaled_dot_product_attention(query[0, 0, 0], key[0, 0, 0], value[0, 0, 0])
    assert one.shape == (5, 6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"attn_mask": np.ones((5, 7), bool), "is_causal": True}, ValueError, "attn_mask.*None"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p.*-0.1"),
        ({"dropout_p": 0.1, "seed": -1}, ValueError, "seed.*-1"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p.*1.5"),
        ({"attn_mask": np.ones((5, 7), int)}, TypeError, "(mask|bias).*int64"),
        ({"attn_mask": np.ones((5, 8), bool)}, ValueError, r"mask.*\(5, 8\)"),
        ({"key": np.zeros((2, 2, 7, 8), np.float32)}, ValueError, "key.*4 heads.*enable_gqa.*2"),
        ({"key": np.zeros((2, 4, 7, 9), np.float32)}, ValueError, "k.*9"),
        ({"key": np.zeros((2, 4, 7, 8))}, TypeError, "k.*float64"),
    ],
)
def test_errors(changed, error, message):
    query, key, value = arrays()
    with pytest.raises(error, match=message):
        fusedattn.scaled_dot_product_attention(
            **({"query": query, "key": key, "value": value} | changed)
        )


WRONG = {
    "a mask and is_causal": {"attn_mask": np.ones((5, 7), bool), "is_causal": True},
    "a probability above 1": {"dropout_p": 1.5},
    "a mask of integers": {"attn_mask": np.ones((5, 7), np.int64)},
    "a mask of another precision": {"attn_mask": np.ones((5, 7))},
    "a mask that does not broadcast": {"attn_mask": np.ones((5, 6), bool)},
    "another head dimension": {"key": np.zeros((2, 4, 7, 9), np.float32)},
    "another precision": {"key": np.zeros((2, 4, 7, 8))},
    "another length of values": {"value": np.zeros((2, 4, 6, 6), np.float32)},
    "fewer heads": {"key": np.zeros((2, 2, 7, 8), np.float32)},
    "heads that do not divide": {"key": np.zeros((2, 3, 7, 8), np.float32), "enable_gqa": True},
    "one dimension": {"query": np.zeros(8, np.float32)},
    "no array": {"query": "query"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_pytorch_refuses_is_refused(name):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    arguments = dict(zip(("query", "key", "value"), arrays(), strict=True)) | WRONG[name]
    tensors = {n: torch.tensor(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        pytest.raises((RuntimeError, ValueError, TypeError)),
    ):
        torch.nn.functional.scaled_dot_product_attention(**tensors)
    with pytest.raises((TypeError, ValueError)):
        fusedattn.scaled_dot_product_attention(**arguments)


def test_dropout():
    query, key, value = arrays()
    expected = fusedattn.attention(query, key, value, dropout_p=0.4, seed=8)
    got = fusedattn.scaled_dot_product_attention(query, key, value, None, 0.4, seed=8)
    np.testing.assert_array_equal(got, expected)
    fresh = [fusedattn.scaled_dot_product_attention(query, key, value, None, 0.4) for _ in "ab"]
    assert not np.array_equal(*fresh)
    assert not fusedattn.scaled_dot_product_attention(query, key, value, None, 1.0).any()


def test_scale_and_enable_gqa_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        fusedattn.scaled_dot_product_attention(*arrays(), None, 0.0, False, 0.5)
