"""Parameters that are not to be learnt, on whose gradients no layer spends anything."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

from fusedattn.nn._types import Params


class Frozen(dict[str, Any]):
    """Parameters none of which is learnt: a layer's vjp gives {} in the place of their gradients.

    It says so of the parameters that lie in it, not of those in dicts further down.
    """


def learns(params: Params) -> bool:
    """Whether there are parameters here, at any depth, that are not `Frozen`."""
    here = not isinstance(params, Frozen)
    return any(learns(p) if isinstance(p, dict) else here for p in params.values())


@contextmanager
def freezing(params: Params, names: Container[str]) -> Iterator[None]:
    """Within the block, each dict of `params` that holds nothing but the `names` is `Frozen`.

    A Frozen with the same arrays is put in the place of the dict. It counts for vjps of what runs
    forward in the block. Where a layer has other parameters besides, it makes all their gradients.

    Parameters
    ----------
    params : dict
    names : container of str
        Dotted names, as `leaves` gives them.
    """
    found: list[tuple[Params, str, Params]] = []

    def is_frozen(node: Params, prefix: str) -> bool:
        whole = True
        for key, value in node.items():
            if not isinstance(value, dict):
                whole &= prefix + key in names
            elif is_frozen(value, f"{prefix}{key}."):
                found.append((node, key, value))
            else:
                whole = False
        return whole

    is_frozen(params, "")
    for node, key, value in found:  # from below: what a Frozen holds has its own in place already
        node[key] = Frozen(value)
    try:
        yield
    finally:
        for node, key, value in found:
            node[key] = value
