"""How fast each parameter learns: frozen ones, and slower blocks below."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def layer_rates(
    names: Iterable[str], freeze: Sequence[str] = (), layer_decay: float = 1.0
) -> dict[str, float]:
    """What to multiply each parameter's learning rate by.

    With L blocks, what lies above them learns at 1, block n (from 0) at layer_decay^(L - n), and
    the embeddings at layer_decay^(L + 1) (discriminative fine-tuning, arXiv:1801.06146).

    Parameters
    ----------
    names : iterable of str
        Dotted names, as `fusedattn.nn.leaves` gives them.
    freeze : sequence of str, default ()
        Names that begin with one of these get 0.
    layer_decay : float, default 1

    Returns
    -------
    dict
        name -> factor.

    Raises
    ------
    ValueError
        For an entry of `freeze` with which no name begins.
    """
    names = list(names)
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"freeze: expected beginnings of parameters' names, got {prefix!r}")
    blocks = {name: _block(name) for name in names}
    top = 1 + max((n for n in blocks.values() if n is not None), default=-1)
    rates = {}
    for name in names:
        n = blocks[name]
        depth = top - n if n is not None else top + 1 if _is_embedding(name) else 0
        rates[name] = 0.0 if name.startswith(tuple(freeze)) else layer_decay**depth
    return rates


def _block(name: str) -> int | None:
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _is_embedding(name: str) -> bool:
    return re.search(r"(?:^|\.)embeddings\.", name) is not None
