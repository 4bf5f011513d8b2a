"""AdamW, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fusedattn import _core
from fusedattn.nn import Array, Params, leaves


def decay_matrices(name: str, array: Array) -> bool:
    """Whether weight decay applies: to matrices and tables, not to biases and norms."""
    return array.ndim > 1


class AdamW:
    """Adam with decoupled weight decay (arXiv:1412.6980, arXiv:1711.05101), in place.

    With g the gradient, t the number of the step, and m and v starting from 0::

        m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g²
        p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Parameters
    ----------
    params : dict
        The nested dict of C-contiguous arrays that `step` updates.
    betas : tuple of float, default (0.9, 0.999)
    eps : float, default 1e-8
    weight_decay : float, default 0.01
    decays : callable, default `decay_matrices`
        (dotted name, array) -> whether the weight decay applies to it.
    rates : callable, optional
        dotted name -> what the learning rate is multiplied by for that parameter: smaller in lower
        layers, say, or 0 to freeze it. A frozen parameter needs no gradient and has no moments.

    Attributes
    ----------
    steps : int
        How many steps have been taken.
    m, v : dict
        The two moments, arrays by dotted name. With `steps` they are all that a resumed run needs.
    """

    def __init__(
        self,
        params: Params,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decays: Callable[[str, Array], bool] = decay_matrices,
        rates: Callable[[str], float] | None = None,
    ) -> None:
        self.params = params
        self.betas, self.eps = betas, eps
        self.rates = {n: 1.0 if rates is None else float(rates(n)) for n, _ in leaves(params)}
        self.decay = {n: weight_decay if decays(n, p) else 0.0 for n, p in leaves(params)}
        for name, p in leaves(params):
            if not p.flags.c_contiguous:
                raise ValueError(f"params: expected C-contiguous arrays, {name} is not")
        moving = {name: p for name, p in leaves(params) if self.rates[name] != 0.0}
        self.m = {name: np.zeros_like(p) for name, p in moving.items()}
        self.v = {name: np.zeros_like(p) for name, p in moving.items()}
        self.steps = 0

    def step(self, grads: Params, learning_rate: float, scale: float = 1.0) -> None:
        """Update the parameters, given gradients shaped like them.

        Parameters
        ----------
        grads : dict
            The parameters' own nesting. Left unchanged.
        learning_rate : float
        scale : float, default 1
            Multiplies the gradients first, as clipping wants it.
        """
        self.steps += 1
        gradients = dict(leaves(grads))
        for name, p in leaves(self.params):
            if name in self.m:
                rate = learning_rate * self.rates[name]
                self._update(name, p, gradients[name], rate, scale)

    def _update(self, name: str, p: Array, g: Array, learning_rate: float, scale: float) -> None:
        b1, b2 = self.betas
        rate = learning_rate / (1.0 - b1**self.steps)
        root = 1.0 / math.sqrt(1.0 - b2**self.steps)
        shrink = 1.0 - learning_rate * self.decay[name]
        p, g, m, v = (a.reshape(-1) for a in (p, g, self.m[name], self.v[name]))
        _core.adamw(p, g, m, v, scale, b1, b2, rate, root, shrink, self.eps)


def global_norm(grads: Params) -> float:
    """The Euclidean norm of all the gradients together."""
    return math.sqrt(sum(_core.sum_of_squares(g.reshape(-1)) for _, g in leaves(grads)))


def clip_scale(norm: float, max_norm: float | None) -> float:
    """What to multiply gradients of norm `norm` by, so that it is at most `max_norm`."""
    return 1.0 if max_norm is None or norm <= max_norm else max_norm / norm


def warmup_linear(progress: float, warmup: float) -> float:
    """Factor of the learning rate: up from 0 to 1 over `warmup`, then down to 0 along a line.

    Parameters
    ----------
    progress : float
        The share of the training that is done, in [0, 1].
    warmup : float
        The share of the training that is warm-up, in [0, 1).
    """
    if progress < warmup:
        return progress / warmup
    return (1.0 - progress) / (1.0 - warmup)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Like `warmup_linear`, going down along half a cosine."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1.0 - warmup))


SCHEDULES = {"linear": warmup_linear, "cosine": warmup_cosine}
