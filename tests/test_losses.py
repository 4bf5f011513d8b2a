"""The loss functions, against their formulas and finite differences."""

import math

import numpy as np
import pytest

from fusedattn.losses import binary_cross_entropy, cross_entropy
from tests.test_nn import numerical_gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_against_its_formula(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((5, 4)), np.array([0, 3, 1, 1, 2])
    loss, vjp = cross_entropy(logits, labels, smoothing)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    assert math.isclose(loss, -(target * np.log(p)).sum() / 5, rel_tol=1e-12)
    np.testing.assert_allclose(vjp(2.0), 2 * (p - target) / 5, rtol=1e-12, atol=1e-15)


def test_cross_entropy_of_huge_logits_is_finite():
    loss, vjp = cross_entropy(np.array([[1e4, -1e4]], np.float32), np.array([1]))
    assert loss == 2e4
    np.testing.assert_array_equal(vjp(1.0), [[1, -1]])


@pytest.mark.parametrize(
    ("labels", "smoothing", "message"),
    [
        ([0], 0.0, r"^labels: expected shape \(2,\), got \(1,\)"),
        ([0, 3], 0.0, r"^labels: expected values in \[0, 3\), got 0 to 3"),
        ([0, 1], 1.0, r"^label_smoothing: expected a value in \[0, 1\), got 1.0"),
    ],
)
def test_cross_entropy_errors(labels, smoothing, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(np.zeros((2, 3)), np.array(labels), smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_and_ignored_rows_against_pytorch(smoothing):
    torch = pytest.importorskip("torch", reason="the peer is PyTorch")
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 4)), np.array([0, 3, -100, 1, 1, -100])
    weights = np.array([0.5, 2.0, 1.0, 0.0])
    z = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        z, torch.tensor(labels), torch.tensor(weights), label_smoothing=smoothing
    )
    expected.backward()
    loss, vjp = cross_entropy(logits, labels, smoothing, weights)
    assert math.isclose(loss, expected.item(), rel_tol=1e-12)
    np.testing.assert_allclose(vjp(1.0), z.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 0.25]])
def test_gradient_of_cross_entropy(smoothing, weights):
    logits = np.random.default_rng(0).standard_normal((5, 4))
    labels = np.array([0, 7, 3, 1, 1])

    def loss():
        return cross_entropy(logits, labels, smoothing, weights, ignore_index=7)

    expected = numerical_gradient(lambda: loss()[0], logits)
    np.testing.assert_allclose(loss()[1](1.0), expected, rtol=1e-6, atol=1e-9)


def test_without_rows_that_count_the_loss_is_zero():
    logits = np.ones((2, 3), np.float32)
    for rows in (2, 0):
        loss, vjp = cross_entropy(logits[:rows], np.full(rows, -100))
        assert loss == 0.0
        np.testing.assert_array_equal(vjp(1.0), np.zeros((rows, 3)))
    assert binary_cross_entropy(logits[:0], np.zeros((0, 3)))[0] == 0.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"^class_weights: expected shape \(3,\), got \(1,\)"),
        ([1.0, -2.0, 1.0], r"^class_weights: expected values of at least 0, got -2.0"),
    ],
)
def test_class_weight_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(np.zeros((2, 3)), np.array([0, 1]), class_weights=weights)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3)])
def test_binary_cross_entropy_against_its_formula(shape):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal(shape), rng.random(shape)
    p = 1 / (1 + np.exp(-logits))
    loss, vjp = binary_cross_entropy(logits, labels)
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
    assert math.isclose(loss, expected, rel_tol=1e-12)
    numerical = numerical_gradient(lambda: binary_cross_entropy(logits, labels)[0], logits)
    np.testing.assert_allclose(vjp(1.0), numerical, rtol=1e-6, atol=1e-9)
    if shape[1:] == (1,):
        assert binary_cross_entropy(logits, labels[:, 0])[0] == loss


def test_binary_cross_entropy_of_huge_logits_is_finite():
    logits, labels = np.array([1e4, -1e4], np.float32), np.array([0, 0])
    loss, vjp = binary_cross_entropy(logits, labels)
    assert loss == 5e3
    np.testing.assert_array_equal(vjp(1.0), [0.5, 0])
    assert vjp(1.0).dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0], r"^labels: expected shape \(2,\), got \(1,\)"),
        ([0.0, 2.0], r"^labels: expected values in \[0, 1\], got 0.0 to 2.0"),
    ],
)
def test_binary_cross_entropy_errors(labels, message):
    with pytest.raises(ValueError, match=message):
        binary_cross_entropy(np.zeros(2), np.array(labels))
