"""Loss functions: ``loss, vjp = loss_function(logits, labels)`` and ``dlogits = vjp(1.0)``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusedattn.nn import Array


def cross_entropy(
    logits: Array, labels: Array, label_smoothing: float = 0.0
) -> tuple[float, Callable[[float], Array]]:
    """Mean over the rows of -sum_c t_c log softmax(logits)_c, in nats.

    The target t is one at the label, or with label smoothing s (arXiv:1512.00567) (1 - s) at the
    label plus s / C everywhere.

    Parameters
    ----------
    logits : array (N, C)
    labels : int array (N,)
        Each in [0, C).
    label_smoothing : float, default 0
        In [0, 1).

    Returns
    -------
    loss : float
    vjp : callable
        The loss's own gradient, a float -> dlogits (N, C).

    Raises
    ------
    ValueError
        For labels of another shape or outside [0, C), or a smoothing outside [0, 1).
    """
    count, classes = logits.shape
    if labels.shape != (count,):
        raise ValueError(f"labels: expected shape ({count},), got {labels.shape}")
    if count and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"labels: expected values in [0, {classes}), got {labels.min()} to {labels.max()}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected a value in [0, 1), got {label_smoothing}")
    rows = np.arange(count)
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    nll = -log_p[rows, labels].mean(dtype=np.float64)
    loss = (1.0 - label_smoothing) * nll - label_smoothing * log_p.mean(dtype=np.float64)

    def vjp(dloss: float) -> Array:
        # dlogits = (softmax - t) / N
        d: Array = np.exp(log_p)
        d -= label_smoothing / classes
        d[rows, labels] -= 1.0 - label_smoothing
        d *= dloss / count
        return d

    return float(loss), vjp
