"""Partial attention states: keys split over calls, processes or machines, merged exactly.

The softmax over all keys is a weighted mean of the softmaxes over any parts of them, and the
log-sum-exp of each part is all that the weights need (Milakov and Gimelshein, *Online normalizer
calculation for softmax*, 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn import _core

__all__ = ["merge_attention_states", "merge_attention_states_backward"]

Array = NDArray[Any]


def merge_attention_states(
    outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhsd"
) -> tuple[Array, Array]:
    """Attention over all keys from attention over parts of them.

    ``lse = log(sum_n exp(lse_n))`` and ``out = sum_n exp(lse_n - lse) out_n``, over any number of
    parts. A part in which a query sees no key, LSE minus infinity, adds nothing whatever its out
    holds; where no part sees a key, out is 0 and the LSE minus infinity. A single part is returned
    as it is. Merging is associative up to rounding, so states may be merged as they arrive.

    Parameters
    ----------
    outs : sequence of N arrays, shape (..., H, Sq, Dv), or (..., Sq, H, Dv) with ``layout="bshd"``
        Outputs of :func:`attention` with the same queries and different keys; float32, float64,
        float16 or bfloat16. A packed batch, (T, H, Dv), is of layout "bshd".
    lses : sequence of N arrays, shape (..., H, Sq)
        Their log-sum-exps, float32 or float64; the sums are kept in this precision.
    layout : {"bhsd", "bshd"}, default "bhsd"

    Returns
    -------
    out : array like one of outs
    lse : array like one of lses

    Raises
    ------
    TypeError, ValueError
        Wrong input; the message names the argument, what was expected and what came.

    See Also
    --------
    merge_attention_states_backward : Gradients by outs and lses.

    Notes
    -----
    Where the merged result is all that matters, parts need no gradient by their own state: with
    the *merged* out and lse, ``attention_backward(dout, q, k_n, v_n, out, lse)`` gives the dk and
    dv of part n and its share of dq, to be added up.

    A sink must join one part only.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 4))
    >>> parts = [attention(q, k[:, s], v[:, s], return_lse=True) for s in np.s_[:4, 4:]]
    >>> out, lse = merge_attention_states(*zip(*parts))
    >>> bool(np.allclose(out, attention(q, k, v)))
    True
    """
    outs, lses = _states(outs, lses, layout)
    weights, lse = _weights(lses)
    out = np.zeros(outs[0].shape, lse.dtype)
    for out_n, lse_n, weight in zip(outs, lses, weights, strict=True):
        out += _selected(lse_n, weight, out_n, layout)
    return out.astype(outs[0].dtype, copy=False), lse


def merge_attention_states_backward(
    dout: Any, dlse: Any, outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhsd"
) -> tuple[list[Array], list[Array]]:
    """Gradients of :func:`merge_attention_states`.

    With ``w_n = exp(lse_n - lse)``: ``dout_n = w_n dout`` and
    ``dlse_n = w_n (rowsum(dout * (out_n - out)) + dlse)``, which `attention_backward` takes as its
    dout and dlse. They are 0 where part n sees no key.

    Parameters
    ----------
    dout : array like one of outs
        Gradient of a scalar by the merged out.
    dlse : array like one of lses, or None
        Gradient by the merged lse; None is 0.
    outs, lses, layout
        As given to :func:`merge_attention_states`.

    Returns
    -------
    douts : list of N arrays like outs
    dlses : list of N arrays like lses

    Raises
    ------
    TypeError, ValueError
        As :func:`merge_attention_states`.
    """
    outs, lses = _states(outs, lses, layout)
    out, _ = merge_attention_states(outs, lses, layout=layout)
    weights, lse = _weights(lses)
    dout, dlse = np.asarray(dout), np.zeros_like(lse) if dlse is None else np.asarray(dlse)
    for name, x, like in (("dout", dout, out), ("dlse", dlse, lse)):
        if x.shape != like.shape:
            raise ValueError(f"{name}: expected shape {like.shape}, got {x.shape}")
    real = lse.dtype
    douts, dlses = [], []
    for out_n, lse_n, weight in zip(outs, lses, weights, strict=True):
        dout_n = _selected(lse_n, weight, dout, layout)
        along = dout.astype(real) * (out_n.astype(real) - out.astype(real))
        along = _lse_first(along.sum(axis=-1), layout)
        dlses.append(np.where(np.isneginf(lse_n), real.type(0), weight * (along + dlse)))
        douts.append(dout_n.astype(out_n.dtype, copy=False))
    return douts, dlses


def _states(outs: Any, lses: Any, layout: str) -> tuple[list[Array], list[Array]]:
    """Both as lists of arrays that fit one another."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: expected 'bhsd' or 'bshd', got {layout!r}")
    outs, lses = [np.asarray(x) for x in outs], [np.asarray(x) for x in lses]
    if not outs:
        raise ValueError("outs: expected at least one state, got none")
    if len(lses) != len(outs):
        raise ValueError(f"lses: expected one for each of the {len(outs)} outs, got {len(lses)}")
    first = outs[0]
    if first.dtype.name not in ("float32", "float64", "float16", "bfloat16"):
        raise TypeError(
            f"outs: expected float32, float64, float16 or bfloat16, got {first.dtype.name}"
        )
    if first.ndim < 2:
        raise ValueError(f"outs: expected shape (..., H, Sq, Dv), got {first.shape}")
    rows = _lse_first(first[..., 0:0].sum(axis=-1), layout).shape
    real = "float64" if first.dtype.name == "float64" else "float32"
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dtype != first.dtype:
            raise TypeError(f"outs: expected {first.dtype.name} as the first, got {out.dtype.name}")
        if out.shape != first.shape:
            raise ValueError(f"outs: expected shape {first.shape} as the first, got {out.shape}")
        if lse.dtype.name not in (real, "float64"):
            raise TypeError(f"lses: expected {real} for outs of {first.dtype}, got {lse.dtype}")
        if lse.shape != rows:
            raise ValueError(f"lses: expected shape {rows}, got {lse.shape} at {n}")
    return outs, lses


def _weights(lses: list[Array]) -> tuple[Array, Array]:
    """exp(lse_n - lse) of each state, (N, ..., H, Sq), and lse.

    By the core's softmax: the bits of NumPy's exp and log depend on the CPU.
    """
    x = np.stack(lses, axis=-1)
    with np.errstate(invalid="ignore"):
        top = x.max(axis=-1)
        unseen = np.isneginf(top)
        x -= np.where(unseen, x.dtype.type(0), top)[..., None]
    rows = x.reshape(-1, len(lses))
    log_total = np.empty(len(rows), x.dtype)
    _core.log_sum_exp(rows, log_total)
    _core.softmax_gradient(rows, log_total, np.ones_like(log_total), rows)
    lse = np.where(unseen, x.dtype.type(-np.inf), top + log_total.reshape(top.shape))
    return np.moveaxis(x, -1, 0), lse


def _selected(lse: Array, weight: Array, rows: Array, layout: str) -> Array:
    """weight * rows in the precision of lse; 0 where lse is minus infinity, whatever rows hold."""
    seen = _lse_first(~np.isneginf(lse), layout)[..., None]
    with np.errstate(invalid="ignore"):
        product = _lse_first(weight, layout)[..., None] * rows.astype(lse.dtype)
    return np.asarray(np.where(seen, product, lse.dtype.type(0)))


def _lse_first(x: Array, layout: str) -> Array:
    """(..., H, Sq) from the order of the layout's rows, or back."""
    return np.swapaxes(x, -1, -2) if layout == "bshd" and x.ndim > 1 else x
