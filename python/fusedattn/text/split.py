"""Setting a part of labelled texts aside."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from fusedattn.text.readers import Examples


def split_examples(examples: Examples, share: float, seed: int = 0) -> tuple[Examples, Examples]:
    """Set a share of each label's texts aside, at random; equal texts stay on one side.

    Parameters
    ----------
    examples : Examples
        Without labels, all texts count as of one label.
    share : float
        In [0, 1). Of n texts, round(share * n) go aside.
    seed : int, default 0

    Returns
    -------
    kept, aside : Examples
        Both in the order of `examples`.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share: expected a value in [0, 1), got {share}")
    rng = np.random.default_rng(seed)
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    labels = examples.labels or [""] * len(examples.texts)
    home: dict[str, str] = {}
    for i, (text, label) in enumerate(zip(examples.texts, labels, strict=True)):
        groups[home.setdefault(text, label)][text].append(i)
    aside: set[int] = set()
    for label in sorted(groups):
        copies = list(groups[label].values())
        wanted = math.floor(share * sum(map(len, copies)) + 0.5)
        for place in rng.permutation(len(copies)).tolist():
            if wanted <= 0:
                break
            aside.update(copies[place])
            wanted -= len(copies[place])
    return _choose(examples, aside, False), _choose(examples, aside, True)


def _choose(examples: Examples, chosen: set[int], inside: bool) -> Examples:
    places = [i for i in range(len(examples.texts)) if (i in chosen) == inside]
    labels = [examples.labels[i] for i in places] if examples.labels else []
    return Examples([examples.texts[i] for i in places], labels)
