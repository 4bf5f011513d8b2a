"""Nested dicts of arrays: flatten them under dotted names, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fusedattn.nn._types import Array, Params


def leaves(params: Params, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Yield (dotted name, array) for every array of `params`, in the order of the dicts."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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
