"""Nested dicts of arrays (or of their shapes): under dotted names, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusedattn.nn._types import Array, Params


def leaves(params: Params, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Yield (dotted name, array) for every array of `params`, in the order of the dicts."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def map_leaves(f: Callable[[str, Any], Any], tree: dict[str, Any], prefix: str = "") -> Params:
    """The nested dict with f(dotted name, leaf) in the place of each leaf of `tree`."""
    return {
        key: map_leaves(f, value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else f(prefix + key, value)
        for key, value in tree.items()
    }


def flatten(params: Params) -> dict[str, Array]:
    """The arrays of `params`, not copied, in one dict under dotted names."""
    return dict(leaves(params))


def unflatten(arrays: Mapping[str, Array]) -> Params:
    """The nested dict whose dotted names are the keys of `arrays`."""
    params: Params = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return params
