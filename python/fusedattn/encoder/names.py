"""What parameters are called in a folder, in both directions: `to_disk` and `from_disk`.

A family's table (families.py) has the names. Two things differ besides. Inside, a block has one
fused projection to queries, keys and values; on disk there are three. A position table on disk may
begin with rows that no text uses; inside it does not. What a folder has beyond the parameters that
are asked for, such as a pooler or position_ids, is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fusedattn.encoder.config import EncoderConfig
from fusedattn.nn import Array, Params, Shapes, leaves, map_leaves

_POSITIONS = "encoder.embeddings.position.weight"
# Other names that a parameter may have on disk: BERT's first layer norms, and an output's bias.
_ALIASES = (
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
    (r"^(cls\.predictions|lm_head)\.bias$", r"\1.decoder.bias"),
)


def names_on_disk(name: str, config: EncoderConfig) -> list[str]:
    """The arrays which, end to end along their first axis, are the parameter `name`."""
    stem, _, leaf = name.rpartition(".")
    number = re.search(r"\.blocks\.(\d+)\.", name)
    n = number.group(1) if number else ""
    generic = stem.replace(f".{n}.", ".{n}.", 1) if n else stem
    parts = [generic[:-3] + part for part in "qkv"] if generic.endswith(".qkv") else [generic]
    prefix = config.family.prefix if name.startswith("encoder.") else ""
    names = config.family.names
    return [f"{prefix}{names[part].replace('{n}', n)}.{leaf}" for part in parts]


def to_disk(params: Params, config: EncoderConfig) -> dict[str, Array]:
    """The arrays of a folder for parameters {"encoder": ..., and those of a head}."""
    arrays: dict[str, Array] = {}
    for name, array in leaves(params):
        names = names_on_disk(name, config)
        if name == _POSITIONS:
            array = np.pad(array, ((config.unused_positions, 0), (0, 0)))
        arrays |= zip(names, np.split(array, len(names)), strict=True)
    return arrays


def from_disk(
    arrays: Mapping[str, Array], shapes: Shapes, config: EncoderConfig, path: str | Path
) -> Params:
    """Parameters of `shapes` from the arrays of a folder `path`, widened to float32.

    Raises
    ------
    ValueError
        Where an array is missing, has another shape or does not hold real numbers.
    """
    missing: list[str] = []

    def read(name: str, whole: tuple[int, ...]) -> Array:
        target = np.empty(whole, np.float32)
        names = names_on_disk(name, config)
        for on_disk, part in zip(names, np.split(target, len(names)), strict=True):
            array = _find(arrays, on_disk, config.family.prefix)
            if array is None:
                missing.append(on_disk)
                continue
            unused = config.unused_positions if name == _POSITIONS else 0
            shape = (part.shape[0] + unused, *part.shape[1:])
            real = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
            if array.shape != shape or not real:
                raise ValueError(
                    f"path: {path} has {on_disk} of shape {array.shape} and {array.dtype}, "
                    f"its config.json implies {shape} and floats"
                )
            part[...] = array[unused:]
        return target

    params = map_leaves(read, shapes)
    if missing:
        raise ValueError(f"path: {path} lacks parameters that its config.json implies: {missing}")
    return params


def _find(arrays: Mapping[str, Array], name: str, prefix: str) -> Array | None:
    for known in (name, name.removeprefix(prefix)):
        if known in arrays:
            return arrays[known]
        for pattern, other in _ALIASES:
            if (alias := re.sub(pattern, other, known)) in arrays:
                return arrays[alias]
    return None
