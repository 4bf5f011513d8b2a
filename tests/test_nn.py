"""Every layer of fusedattn.nn, as `tests.layer_cases` lists them: gradients, contracts."""

import copy
import dataclasses
import inspect
import math
import pkgutil

import numpy as np
import pytest

from fusedattn import nn
from fusedattn.nn import flatten, unflatten
from tests.layer_cases import CASES, LARGE, TABLE

FILES = {m.name for m in pkgutil.iter_modules(nn.__path__) if not m.name.startswith("_")}
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_layer = pytest.mark.parametrize("layer", TABLE)


def wide(params):
    return unflatten({name: p.astype(np.float64) for name, p in flatten(params).items()})


def cases_of(layer):
    return [case for case in CASES if case.layer == layer and case.batch == "packed"]


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


def results(case, call, dy=None, **options):
    """y and every gradient, under their names."""
    y, vjp = case.run(call, **options)
    if dy is None:
        dy = np.random.default_rng(7).standard_normal(y.shape).astype(y.dtype)
    dparams, *dinputs = vjp(dy)
    assert set(flatten(dparams)) == set(flatten(call.params))
    inputs = {f"input {i}": dx for i, dx in enumerate(dinputs)}
    return {"y": y, **flatten(dparams), **inputs}


def test_every_layer_has_rows():
    public = [f for f in (getattr(nn, name) for name in nn.__all__) if inspect.isfunction(f)]
    of_files = {f.__name__ for f in public if f.__module__.rpartition(".")[2] in FILES}
    beside = {f"init_{name}" for name in FILES} | {f"{name}_shapes" for name in FILES}
    assert of_files - beside == FILES
    assert set(TABLE) == FILES
    assert {f.__name__ for f in [*nn.ACTIVATIONS.values(), *nn.POOLINGS.values()]} <= FILES


@every_layer
def test_every_option_of_a_layer_takes_two_values(layer):
    """`rng` comes with `p`; `added` and, in test_frozen, `learn_weight` have tests of their own."""
    taken = {}
    for case in cases_of(layer):
        given = case.options | case.call().named
        for name, parameter in inspect.signature(getattr(nn, layer)).parameters.items():
            if parameter.default is not parameter.empty or name in ("p", "num_heads"):
                taken.setdefault(name, set()).add(str(given.get(name, parameter.default)))
    few = {name for name, values in taken.items() if len(values) < 2}
    assert few <= {"rng", "added", "learn_weight"}


@every_case
def test_gradients_match_finite_differences(case):
    call = case.call()
    y, _ = case.run(call)
    dy = np.random.default_rng(7).standard_normal(y.shape)
    found = results(case, call, dy)

    def objective():
        return float(np.vdot(case.run(call)[0], dy))

    arrays = flatten(call.params) | {f"input {i}": x for i, x in enumerate(call.inputs)}
    for name, array in arrays.items():
        # Of ids the gradient is an empty array.
        numerical = numerical_gradient(objective, array) if array.dtype.kind == "f" else np.empty(0)
        np.testing.assert_allclose(found[name], numerical, rtol=1e-6, atol=1e-8, err_msg=name)


@every_case
def test_float32_is_close_to_float64_and_each_keeps_its_dtype(case):
    narrow = results(case, case.call(dtype=np.float32))
    for name, array in results(case, case.call()).items():
        assert (narrow[name].dtype, array.dtype) == (np.float32, np.float64)
        scale = np.abs(array).max(initial=1.0)
        np.testing.assert_allclose(narrow[name] / scale, array / scale, rtol=0, atol=1e-5)


@every_layer
def test_nothing_given_is_changed_and_vjp_can_be_called_again(layer):
    for case in cases_of(layer):
        call = case.call(dtype=np.float32)
        before = copy.deepcopy(call)
        y, vjp = case.run(call)
        y_before = y.copy()
        dy = np.random.default_rng(7).standard_normal(y.shape).astype(np.float32)
        dy_before = dy.copy()
        first, second = vjp(dy), vjp(dy)
        np.testing.assert_array_equal(y, y_before)
        np.testing.assert_array_equal(dy, dy_before)
        np.testing.assert_equal(dataclasses.asdict(call), dataclasses.asdict(before))
        np.testing.assert_equal(first, second)


def taking(argument):
    """The layers that do."""
    return [name for name in TABLE if argument in inspect.signature(getattr(nn, name)).parameters]


@pytest.mark.parametrize("layer", taking("added"))
def test_a_residual_is_the_same_as_adding_afterwards(layer):
    for case in cases_of(layer):
        call = case.call()
        y, vjp = case.run(call)
        rng = np.random.default_rng(7)
        added, dy, dx_added = (
            rng.standard_normal(s) for s in (y.shape, y.shape, call.inputs[0].shape)
        )
        joined, joined_vjp = case.run(call, added=added)
        np.testing.assert_allclose(joined, y + added, rtol=1e-13, atol=1e-13)
        np.testing.assert_equal(joined_vjp(dy), vjp(dy))
        if layer != "dropout":  # the others' vjp adds what went around the layer, too
            dparams, dx = vjp(dy)
            own, sum_of_both = vjp(dy, dx_added)
            np.testing.assert_equal(own, dparams)
            np.testing.assert_allclose(sum_of_both, dx + dx_added, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layer", taking("rng"))
def test_nothing_is_dropped_without_a_generator(layer):
    for case in cases_of(layer):
        off = {name: 0.0 for name in ("p", "attention_p") if name in case.options}
        call = case.call(dtype=np.float32)
        without = results(case, call, drop=False)
        np.testing.assert_equal(without, results(case, call, **off))
        assert case.drops != np.array_equal(without["y"], results(case, call)["y"])


@every_layer
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(layer):
    """Of layers that know no sequences: so have some rows among others."""
    for case in cases_of(layer):
        call = case.call(LARGE, width=48, dtype=np.float32)
        if "rows" in call.named:
            continue  # a choice among the rows of a batch; test_masked_lm_head_of_chosen_rows...
        y, vjp = case.run(call, drop=False)
        dy = np.random.default_rng(7).standard_normal(y.shape).astype(np.float32)
        gradients = vjp(dy)[1:]
        cut = call.cuts[0]
        for n in range(len(LARGE)):
            rows = slice(cut[n], cut[n + 1]) if len(y) == cut[-1] else slice(n, n + 1)
            own_y, own_vjp = case.run(call.of_sequence(n), drop=False)
            np.testing.assert_array_equal(own_y, y[rows])
            for dx, whole, c in zip(own_vjp(dy[rows])[1:], gradients, call.cuts, strict=True):
                if c is not None and whole.size:
                    np.testing.assert_array_equal(dx, whole[c[n] : c[n + 1]])


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


def test_self_attention_against_the_oracle():
    from fusedattn import reference

    rng = np.random.default_rng(0)
    params = wide(nn.init_self_attention(rng, 6, std=0.5))
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
    params = wide(nn.init_self_attention(rng, 6, std=0.5))
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
