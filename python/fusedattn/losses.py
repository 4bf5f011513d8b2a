"""Loss functions: ``loss, vjp = loss_function(logits, labels)`` and ``dlogits = vjp(1.0)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fusedattn import _core
from fusedattn.nn import Array
from fusedattn.nn._core_ops import empty


def cross_entropy(
    logits: Array,
    labels: Array,
    label_smoothing: float = 0.0,
    class_weights: Array | Sequence[float] | None = None,
    ignore_index: int = -100,
) -> tuple[float, Callable[[float], Array]]:
    """Weighted mean over the rows of -sum_c w_c t_c log softmax(logits)_c, in nats.

    The target t is one at the label, or with label smoothing s (arXiv:1512.00567) (1 - s) at the
    label plus s / C everywhere. The sum over the rows is divided by the sum of the weights of their
    labels, as PyTorch does.

    Parameters
    ----------
    logits : array (N, C)
    labels : int array (N,)
        Each in [0, C), or `ignore_index`.
    label_smoothing : float, default 0
        In [0, 1).
    class_weights : array (C,), optional
        Not negative; by default all 1.
    ignore_index : int, default -100
        Rows with this label count for nothing.

    Returns
    -------
    loss : float
        0 if no row counts.
    vjp : callable
        The loss's own gradient, a float -> dlogits (N, C).

    Raises
    ------
    ValueError
        For labels of another shape or outside [0, C), weights of another shape or below 0, or a
        smoothing outside [0, 1).
    """
    count, classes = logits.shape
    if labels.shape != (count,):
        raise ValueError(f"labels: expected shape ({count},), got {labels.shape}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected a value in [0, 1), got {label_smoothing}")
    rows = np.flatnonzero(labels != ignore_index)
    chosen = labels[rows]
    if len(rows) and not (chosen.min() >= 0 and chosen.max() < classes):
        raise ValueError(
            f"labels: expected values in [0, {classes}), got {chosen.min()} to {chosen.max()}"
        )
    weights = _checked(class_weights, classes, logits.dtype)
    logits = np.ascontiguousarray(logits)
    lse = np.empty(count, logits.dtype)
    _core.log_sum_exp(logits, lse)

    # The loss is the sum over the rows of a log_p[label] + b sum_c w_c log_p_c, where
    # log_p = logits - lse.
    total = float(weights[chosen].sum(dtype=np.float64))
    scale = 1.0 / total if total else 0.0
    a = (label_smoothing - 1.0) * scale
    b = -label_smoothing / max(1, classes) * scale
    picked = (logits[rows, chosen] - lse[rows]) * weights[chosen]
    loss = a * float(picked.sum(dtype=np.float64))
    if label_smoothing:
        smooth = (logits[rows] * weights).sum(axis=1) - lse[rows] * weights.sum()
        loss += b * float(smooth.sum(dtype=np.float64))

    def vjp(dloss: float) -> Array:
        # d log_p_c / d logits = onehot_c - softmax
        share = np.zeros(count, logits.dtype)
        share[rows] = -a * dloss * weights[chosen]
        if label_smoothing:
            share[rows] -= b * dloss * weights.sum()
        d = empty(logits.shape, logits.dtype)
        _core.softmax_gradient(logits, lse, share, d)
        if label_smoothing:
            d[rows] += b * dloss * weights
        d[rows, chosen] += a * dloss * weights[chosen]
        return d

    return loss, vjp


def _checked(class_weights: Array | Sequence[float] | None, classes: int, dtype: object) -> Array:
    if class_weights is None:
        return np.ones(classes, dtype)  # type: ignore[call-overload, no-any-return]
    weights: Array = np.asarray(class_weights, dtype)  # type: ignore[call-overload]
    if weights.shape != (classes,):
        raise ValueError(f"class_weights: expected shape ({classes},), got {weights.shape}")
    if not (weights >= 0).all():
        raise ValueError(f"class_weights: expected values of at least 0, got {weights.min()}")
    return weights


def binary_cross_entropy(logits: Array, labels: Array) -> tuple[float, Callable[[float], Array]]:
    """Mean of -t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)), in nats.

    Computed in float64 as max(z, 0) - z t + log(1 + exp(-|z|)), which overflows nowhere.

    Parameters
    ----------
    logits : array (N,) or (N, C)
        z, one for each question answered yes or no.
    labels : array of the same shape, or (N,) for logits (N, 1)
        t, in [0, 1].

    Returns
    -------
    loss : float
        0 if there are none.
    vjp : callable
        The loss's own gradient, a float -> dlogits, shaped like `logits`.

    Raises
    ------
    ValueError
        For labels of another shape or outside [0, 1].
    """
    if labels.shape != logits.shape and (*labels.shape, 1) != logits.shape:
        raise ValueError(f"labels: expected shape {logits.shape}, got {labels.shape}")
    t = labels.reshape(logits.shape).astype(np.float64)
    if t.size and not (t.min() >= 0 and t.max() <= 1):
        raise ValueError(f"labels: expected values in [0, 1], got {t.min()} to {t.max()}")
    # By the core's softmax over the pair (0, -|z|), since NumPy's exp depends on the CPU.
    z = logits.astype(np.float64)
    pairs = np.zeros((z.size, 2))
    pairs[:, 1] = -np.abs(z.reshape(-1))
    lse = np.empty(z.size)
    _core.log_sum_exp(pairs, lse)
    each = np.maximum(z, 0.0) - z * t + lse.reshape(z.shape)
    scale = 1.0 / max(1, z.size)

    def vjp(dloss: float) -> Array:
        shares = np.empty_like(pairs)  # 1 and exp(-|z|), over their sum
        _core.softmax_gradient(pairs, lse, np.ones_like(lse), shares)
        larger, smaller = shares.T.reshape(2, *z.shape)
        sigmoid = np.where(z >= 0.0, larger, smaller)
        d: Array = ((sigmoid - t) * (dloss * scale)).astype(logits.dtype)
        return d

    return float(each.sum()) * scale, vjp
