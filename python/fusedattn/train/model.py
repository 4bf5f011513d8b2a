"""What the training loop asks for: of a model, of a loss, and of what adds up over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

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


class Sums(NamedTuple):
    """What the batches of a step add up to, each label counting alike.

    Attributes
    ----------
    loss : float
        The sum of the labels' losses.
    labels : int
        How many there were.
    gradients : dict
        Of that sum, nested as the parameters are, without those of frozen parameters.
    """

    loss: float
    labels: int
    gradients: Params


# The sums of this process -> those of all processes, the same in each of them.
Reduce: TypeAlias = Callable[[Sums], Sums]
