"""Every layer of fusedattn.nn, found by itself: gradients against finite differences, contract."""

import copy
import importlib
import itertools
import math
import pkgutil

import numpy as np
import pytest

from fusedattn import nn
from fusedattn.nn import flatten, unflatten

LAYERS = [m.name for m in pkgutil.iter_modules(nn.__path__) if not m.name.startswith("_")]


def load(name):
    module = importlib.import_module(f"fusedattn.nn.{name}")
    return getattr(module, name), module.example


def cast(params, dtype):
    return unflatten({name: p.astype(dtype) for name, p in flatten(params).items()})


def example_call(name, seed, dtype):
    """A function of (params, *inputs) with the same random numbers for every call, and its start.

    The inputs are the leading arguments of type float, or the first one if that is of integers.
    """
    layer, example = load(name)
    params, args, options = example(np.random.default_rng(seed))
    count = max(1, sum(a.dtype.kind == "f" for a in args))
    inputs = [a.astype(dtype) if a.dtype.kind == "f" else a for a in args[:count]]

    def call(params, *inputs):
        return layer(params, *inputs, *args[count:], **copy.deepcopy(options))

    return call, cast(params, dtype), inputs


def numerical_gradient(f, array, step=1e-5):
    """Central differences of f(), a number, in the elements of `array`, which f reads."""
    gradient = np.empty_like(array)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + step
        above = f()
        array[i] = kept - step
        below = f()
        array[i] = kept
        gradient[i] = (above - below) / (2 * step)
    return gradient


def test_layers_are_found():
    assert {"linear", "self_attention", "encoder_block"} <= set(LAYERS)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_match_finite_differences(name, seed):
    call, params, inputs = example_call(name, seed, np.float64)
    y, vjp = call(params, *inputs)
    dy = np.random.default_rng(7).standard_normal(y.shape)
    dparams, *dinputs = vjp(dy)

    def objective():
        return float(np.vdot(call(params, *inputs)[0], dy))

    assert set(flatten(dparams)) == set(flatten(params))
    for key, p in flatten(params).items():
        numerical = numerical_gradient(objective, p)
        np.testing.assert_allclose(
            flatten(dparams)[key], numerical, rtol=1e-6, atol=1e-8, err_msg=key
        )
    for x, dx in zip(inputs, dinputs, strict=True):
        numerical = numerical_gradient(objective, x) if x.dtype.kind == "f" else np.empty(0)
        np.testing.assert_allclose(dx, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_dtype_of_the_input_is_kept(name, dtype):
    call, params, inputs = example_call(name, 0, dtype)
    y, vjp = call(params, *inputs)
    dparams, *dinputs = vjp(np.ones_like(y))
    assert y.dtype == dtype
    assert {dx.dtype for dx in dinputs} == {np.dtype(dtype)}
    assert {g.dtype for g in flatten(dparams).values()} <= {np.dtype(dtype)}


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_given_is_changed_and_vjp_can_be_called_again(name):
    call, params, inputs = example_call(name, 0, np.float32)
    before = copy.deepcopy((params, inputs))
    y, vjp = call(params, *inputs)
    y_before = y.copy()
    dy = np.random.default_rng(7).standard_normal(y.shape).astype(np.float32)
    dy_before = dy.copy()
    first, second = vjp(dy), vjp(dy)
    np.testing.assert_array_equal(y, y_before)
    np.testing.assert_array_equal(dy, dy_before)
    np.testing.assert_equal((params, inputs), before)
    np.testing.assert_equal(first, second)


@pytest.mark.parametrize("norm_first", [False, True])
def test_both_kinds_of_block(norm_first):
    rng = np.random.default_rng(3)
    params = cast(nn.init_encoder_block(rng, 4, 6, std=0.5), np.float64)
    x, cu_seqlens = rng.standard_normal((5, 4)), np.array([0, 2, 5])

    def call():
        return nn.encoder_block(params, x, cu_seqlens, 2, norm_first=norm_first, eps=1e-5)

    y, vjp = call()
    dy = rng.standard_normal(y.shape)
    dx = numerical_gradient(lambda: float(np.vdot(call()[0], dy)), x)
    np.testing.assert_allclose(vjp(dy)[1], dx, rtol=1e-6, atol=1e-8)


def test_post_norm_output_is_normalised_and_pre_norm_keeps_the_residual():
    rng = np.random.default_rng(3)
    params = nn.init_encoder_block(rng, 8, 6, std=0.0)
    x = rng.standard_normal((5, 8), dtype=np.float32)
    post, _ = nn.encoder_block(params, x, np.array([0, 5]), 2)
    pre, _ = nn.encoder_block(params, x, np.array([0, 5]), 2, norm_first=True)
    np.testing.assert_allclose(post.std(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(pre, x)


def test_float32_gelu_against_the_error_function():
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0]]).astype(np.float32)[:, None]
    y, vjp = nn.gelu({}, x)
    wide = x.astype(np.float64)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in wide[:, 0]])[:, None]
    slope = cdf + wide * np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    assert np.abs(y - wide * cdf).max() <= 1e-6
    assert np.abs(vjp(np.ones_like(x))[1] - slope).max() <= 1e-6


def test_gelu_tanh_is_close_to_gelu():
    x = np.linspace(-5, 5, 101, dtype=np.float32)[:, None]
    difference = np.abs(nn.gelu({}, x)[0] - nn.gelu_tanh({}, x)[0])
    assert 1e-5 < difference.max() < 1e-3


def test_dropout_keeps_the_mean_and_the_share():
    x = np.ones((1000, 100), np.float32)
    y, vjp = nn.dropout({}, x, 0.25, np.random.default_rng(0))
    assert set(np.unique(y)) == {np.float32(0), np.float32(4 / 3)}
    assert abs(np.mean(y == 0) - 0.25) < 0.01
    np.testing.assert_array_equal(vjp(x)[1], y)


def test_dropout_off():
    x = np.ones((2, 3), np.float32)
    assert nn.dropout({}, x, 0.5, None)[0] is x
    assert nn.dropout({}, x, 0.0, np.random.default_rng(0))[0] is x
    with pytest.raises(ValueError, match=r"^p: expected a probability in \[0, 1\), got 1.0"):
        nn.dropout({}, x, 1.0, None)


def test_self_attention_stays_inside_its_sequence():
    rng = np.random.default_rng(0)
    params = nn.init_self_attention(rng, 8, std=0.5)
    x = rng.standard_normal((7, 8), dtype=np.float32)
    y, _ = nn.self_attention(params, x, np.array([0, 3, 7]), 2)
    x[3:] = rng.standard_normal((4, 8), dtype=np.float32)
    changed, _ = nn.self_attention(params, x, np.array([0, 3, 7]), 2)
    np.testing.assert_array_equal(y[:3], changed[:3])
    assert np.abs(y[3:] - changed[3:]).min() > 0


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(norm_first):
    rng = np.random.default_rng(0)
    params = nn.init_encoder_block(rng, 48, 80, std=0.3)
    lengths = [5, 130, 1, 300, 17]
    cu_seqlens = np.cumsum([0, *lengths])
    x = rng.standard_normal((cu_seqlens[-1], 48), dtype=np.float32)
    together, _ = nn.encoder_block(params, x, cu_seqlens, 4, norm_first=norm_first)
    for begin, end in itertools.pairwise(cu_seqlens):
        own = np.array([0, end - begin])
        alone, _ = nn.encoder_block(params, x[begin:end], own, 4, norm_first=norm_first)
        np.testing.assert_array_equal(alone, together[begin:end])


def test_self_attention_against_the_oracle():
    from fusedattn import reference

    rng = np.random.default_rng(0)
    params = cast(nn.init_self_attention(rng, 6, std=0.5), np.float64)
    x = rng.standard_normal((5, 6))
    qkv = x @ params["qkv"]["weight"].T + params["qkv"]["bias"]
    q, k, v = (a.reshape(5, 3, 2).transpose(1, 0, 2) for a in np.split(qkv, 3, axis=1))
    o = np.asarray(reference.attention(q, k, v)).transpose(1, 0, 2).reshape(5, 6)
    expected = o @ params["out"]["weight"].T + params["out"]["bias"]
    y, _ = nn.self_attention(params, x, np.array([0, 5]), 3)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pooling", nn.POOLINGS)
def test_pooled_empty_sequence_is_zero(pooling):
    y, vjp = nn.POOLINGS[pooling]({}, np.ones((2, 3), np.float32), np.array([0, 0, 2, 2]))
    np.testing.assert_array_equal(y, [[0, 0, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(vjp(np.ones_like(y))[1].sum(axis=0), [1, 1, 1])


def test_poolings():
    x = np.array([[1.0, 5.0], [3.0, 2.0], [7.0, np.nan], [8.0, 0.0]])
    cu_seqlens = np.array([0, 2, 4])
    np.testing.assert_array_equal(nn.mean_pool({}, x, cu_seqlens)[0], [[2, 3.5], [7.5, np.nan]])
    np.testing.assert_array_equal(nn.cls_pool({}, x, cu_seqlens)[0], [[1, 5], [7, np.nan]])
    np.testing.assert_array_equal(nn.max_pool({}, x, cu_seqlens)[0], [[3, 5], [8, np.nan]])


def test_cross_attention_of_a_batch_with_itself_is_self_attention():
    rng = np.random.default_rng(0)
    params = cast(nn.init_self_attention(rng, 6, std=0.5), np.float64)
    halves = {name: np.split(a, [6]) for name, a in params["qkv"].items()}
    q, kv = ({name: parts[i] for name, parts in halves.items()} for i in (0, 1))
    x, cu_seqlens = rng.standard_normal((7, 6)), np.array([0, 3, 7])
    expected, _ = nn.self_attention(params, x, cu_seqlens, 2)
    crossing = {"q": q, "kv": kv, "out": params["out"]}
    y, _ = nn.cross_attention(crossing, x, x, cu_seqlens, cu_seqlens, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)


def test_masked_lm_head_of_chosen_rows_is_that_of_all():
    rng = np.random.default_rng(0)
    params = nn.init_masked_lm_head(rng, 8, 11, std=0.5)
    params["bias"] = rng.standard_normal(11).astype(np.float32)
    x, weight = (rng.standard_normal((n, 8), dtype=np.float32) for n in (6, 11))
    rows = np.array([4, 1])
    every, every_vjp = nn.masked_lm_head(params, x, weight)
    some, some_vjp = nn.masked_lm_head(params, x, weight, rows)
    np.testing.assert_allclose(some, every[rows], rtol=1e-5, atol=1e-6)
    dy = np.zeros_like(every)
    dy[rows] = rng.standard_normal((2, 11))
    for ours, whole in zip(some_vjp(dy[rows])[1:], every_vjp(dy)[1:], strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-6)


def test_token_embedding_counts_positions_in_each_sequence():
    rng = np.random.default_rng(0)
    params = nn.init_token_embedding(rng, 9, 6, 2, 4, std=1.0)
    ids, cu_seqlens, types = np.array([3, 8, 3, 1]), np.array([0, 3, 3, 4]), np.array([0, 1, 1, 0])
    y, _ = nn.token_embedding(params, ids, cu_seqlens, types=types, first_position=2)
    rows = zip(ids, [2, 3, 4, 2], types, strict=True)
    tables = [params[name]["weight"] for name in ("word", "position", "type")]
    total = np.array([sum(t[i] for t, i in zip(tables, row, strict=True)) for row in rows])
    np.testing.assert_allclose(y, nn.layer_norm(params["norm"], total)[0], rtol=1e-5, atol=1e-6)


def test_unknown_activation():
    params = nn.init_feed_forward(np.random.default_rng(0), 2, 3)
    with pytest.raises(ValueError, match=r"^activation: expected one of .*'gelu'.*, got 'swish'"):
        nn.feed_forward(params, np.ones((1, 2), np.float32), "swish")


def test_flatten_and_unflatten():
    nested = {"a": {"b": np.ones(2), "c": {"d": np.zeros(3)}}, "e": np.ones(1)}
    flat = flatten(nested)
    assert list(flat) == ["a.b", "a.c.d", "e"]
    assert flat["a.b"] is nested["a"]["b"]
    np.testing.assert_equal(unflatten(flat), nested)
