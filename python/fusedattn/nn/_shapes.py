"""Parameters from their shapes: a layer states the shapes, and starting values follow from them."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._tree import map_leaves
from fusedattn.nn._types import Array, Params, Rng, Shapes


def draw(rng: Rng, shapes: Shapes, std: float) -> Params:
    """Starting parameters of these shapes; float32.

    Matrices are drawn from N(0, std²) in the order of `shapes`. Of vectors, those named ``weight``
    scale, and are 1; biases are 0.
    """

    def start(name: str, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return np.full(shape, float(name.rpartition(".")[2] == "weight"), np.float32)
        weight = rng.standard_normal(shape, dtype=np.float32)
        weight *= std
        return weight

    return map_leaves(start, shapes)
