"""How well predicted labels agree with the true ones."""

from __future__ import annotations

import numpy as np

from fusedattn.nn import Array


def accuracy(labels: Array, predicted: Array) -> float:
    """The share of `predicted` (N,) that equals `labels` (N,); NaN for none."""
    return float(np.mean(labels == predicted)) if len(labels) else float("nan")


def macro_f1(labels: Array, predicted: Array) -> float:
    """The plain mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    The classes are those that occur in `labels` (N,) or in `predicted` (N,), integers from 0 on, as
    in scikit-learn's ``f1_score(average="macro")``; NaN for none.
    """
    if not len(labels):
        return float("nan")
    size = int(max(labels.max(), predicted.max())) + 1
    hits = np.bincount(labels[labels == predicted], minlength=size)
    either = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
    met = either > 0
    return float(np.mean(2.0 * hits[met] / either[met]))
