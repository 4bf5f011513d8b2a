"""The optimizer, clipping and the schedules."""

import math

import numpy as np
import pytest

import fusedattn
from fusedattn.nn import flatten
from fusedattn.optim import SCHEDULES, AdamW, clip_scale, global_norm


def test_adamw_against_its_formula():
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((300, 200)), "n": {"b": rng.standard_normal(3)}}
    params = {"w": start["w"].copy(), "n": {"b": start["n"]["b"].copy()}}
    optimizer = AdamW(params, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    expected = flatten(start)
    m = dict.fromkeys(expected, 0.0)
    v = dict.fromkeys(expected, 0.0)
    for t in range(1, 4):
        grads = {"w": rng.standard_normal((300, 200)), "n": {"b": rng.standard_normal(3)}}
        optimizer.step(grads, 0.01, scale=0.5)
        for name, g in flatten(grads).items():
            m[name] = 0.8 * m[name] + 0.2 * 0.5 * g
            v[name] = 0.9 * v[name] + 0.1 * (0.5 * g) ** 2
            step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-6)
            decay = 0.1 if name == "w" else 0.0  # matrices alone decay
            expected[name] = expected[name] - 0.01 * (decay * expected[name] + step)
    assert optimizer.steps == 3
    for name, p in flatten(params).items():
        np.testing.assert_allclose(p, expected[name], rtol=1e-12, atol=1e-14)


def test_adamw_updates_in_place_and_wants_whole_arrays():
    w = np.ones((4, 3), np.float32)
    AdamW({"w": w}).step({"w": np.ones((4, 3), np.float32)}, 0.1)
    assert (w < 1).all()
    with pytest.raises(ValueError, match=r"^params: expected C-contiguous arrays, w is not"):
        AdamW({"w": w.T})


def test_clipping():
    grads = {"a": np.array([[3.0, 0.0]]), "b": {"c": np.array([4.0])}}
    assert global_norm(grads) == 5.0
    assert clip_scale(5.0, 1.0) == 0.2
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(5.0, None) == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_norm_of_many_gradients_is_near_and_the_same_on_any_number_of_threads(dtype):
    g = np.random.default_rng(0).standard_normal((1000, 333)).astype(dtype)
    grads = {"a": g, "b": g[:3, :7], "c": g[0, :0]}
    exact = math.sqrt(sum(math.fsum(x.astype(np.float64).reshape(-1) ** 2) for x in grads.values()))
    norms = []
    before = fusedattn.get_num_threads()
    for threads in (1, 2, 5):
        fusedattn.set_num_threads(threads)
        norms.append(global_norm(grads))
    fusedattn.set_num_threads(before)
    assert math.isclose(norms[0], exact, rel_tol=8 * np.finfo(dtype).eps)
    assert norms[1:] == norms[:1] * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_and_fall(name):
    schedule = SCHEDULES[name]
    factors = [schedule(x, 0.2) for x in np.linspace(0, 1, 101)]
    assert factors[0] == 0
    assert math.isclose(factors[10], 0.5)
    assert math.isclose(max(factors), 1)
    assert math.isclose(factors[60], 0.5)
    assert math.isclose(factors[100], 0, abs_tol=1e-12)
    assert np.argmax(factors) == 20
    assert schedule(0.0, 0.0) == 1


def test_rates_multiply_the_learning_rate_and_freeze():
    rng = np.random.default_rng(0)
    start = {n: rng.standard_normal((5, 3)) for n in "abc"}
    grads = {n: rng.standard_normal((5, 3)) for n in "abc"}
    slow, plain = ({n: p.copy() for n, p in start.items()} for _ in range(2))
    optimizer = AdamW(slow, rates={"a": 1.0, "b": 0.25, "c": 0.0}.__getitem__)
    half = AdamW(plain)
    optimizer.step({"a": grads["a"], "b": grads["b"]}, 0.1)  # what is frozen needs no gradient
    half.step(grads, 0.1)
    np.testing.assert_array_equal(slow["a"], plain["a"])
    np.testing.assert_allclose(slow["b"] - start["b"], 0.25 * (plain["b"] - start["b"]), rtol=1e-10)
    np.testing.assert_array_equal(slow["c"], start["c"])
    assert set(optimizer.m) == set(optimizer.v) == {"a", "b"}


def test_a_copy_of_the_state_goes_on_with_the_same_bits():
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((7, 5)).astype(np.float32)}
    grads = [{"w": rng.standard_normal((7, 5)).astype(np.float32)} for _ in range(4)]
    first = AdamW(params)
    for g in grads[:2]:
        first.step(g, 0.1)
    resumed = {"w": params["w"].copy()}
    second = AdamW(resumed)
    second.steps = first.steps
    for kept, moments in ((first.m, second.m), (first.v, second.v)):
        for name, array in kept.items():
            moments[name][...] = array
    for g in grads[2:]:
        first.step(g, 0.1)
        second.step(g, 0.1)
    np.testing.assert_array_equal(resumed["w"], params["w"])
