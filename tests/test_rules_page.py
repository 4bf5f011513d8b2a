"""docs/rules.md: every picture is what the kernel does."""

import re
from pathlib import Path

import numpy as np
import pytest

import fusedattn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rules.md"
BLOCKS = re.findall(r"^```picture\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
PICTURES = {
    column[0].strip(): [line.split() for line in column[1:]]
    for block in BLOCKS
    for column in zip(*(line.split("|") for line in block.splitlines()), strict=True)
}


def rules_of(text):
    """The keyword arguments of a picture; lists are arrays."""
    rules = eval(f"dict({text})", {"inf": np.float32(np.inf)})
    for name, x in rules.items():
        if isinstance(x, list):
            rules[name] = np.array(x, np.float32 if name == "bias" else None)
        elif name == "segment_ids":
            rules[name] = tuple(map(np.array, x))
    return rules


def test_there_are_pictures():
    assert len(PICTURES) >= 13


@pytest.mark.parametrize("rules", PICTURES)
def test_picture(rules):
    q, k = np.zeros((1, 1, 4, 2), np.float32), np.zeros((1, 1, 6, 2), np.float32)
    eye = np.eye(6, dtype=np.float32)[None, None]
    weights = fusedattn.attention(q, k, eye, **rules_of(rules))[0, 0]
    assert [["#" if w > 0 else "." for w in row] for row in weights] == PICTURES[rules]


def test_the_distances_of_alibi():
    rows = re.search(r"((?:^      [-0-9 ]+\n)+)", PAGE.read_text(encoding="utf-8"), re.M)[1]
    shown = np.array([row.split() for row in rows.splitlines()], int)
    q, k = np.zeros((1, 4, 1)), np.zeros((1, 6, 1))
    logits = fusedattn.reference.logits(q, k, alibi_slopes=[1.0], q_offset=2)
    np.testing.assert_array_equal(logits[0], shown)
