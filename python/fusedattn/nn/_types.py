"""Names for what travels between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Params: TypeAlias = dict[str, Any]  # a nested dict whose leaves are arrays
Shapes: TypeAlias = dict[str, Any]  # the same, with their shapes instead
VJP: TypeAlias = Callable[[Array], tuple[Params, Array]]  # dy -> (dparams, dx)
VJP2: TypeAlias = Callable[[Array], tuple[Params, Array, Array]]  # of a layer with two inputs
Rng: TypeAlias = np.random.Generator


class ResidualVJP(Protocol):
    """A `VJP` that can add an array to dx in the same pass: what went around the layer."""

    def __call__(self, dy: Array, added: Array | None = None) -> tuple[Params, Array]:
        """dy -> (dparams, dx + added)."""
        ...
