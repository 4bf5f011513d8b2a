"""What the training loop asks of a model and of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from fusedattn.nn import VJP, Array, Params, Rng
from fusedattn.text import Batch

# (logits, labels) -> (a mean over the labels, its vjp: a float -> dlogits)
Loss: TypeAlias = Callable[[Array, Array], tuple[float, Callable[[float], Array]]]


class Model(Protocol):
    """What can be trained: parameters, and logits with their vjp."""

    params: Params

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Logits, a row for each label that is not IGNORE, and their vjp; random given an `rng`."""
        ...
