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


S, W, CAP = 40, 5, 3.0
DOCUMENTS = np.sort(np.random.default_rng(1).integers(0, 4, (2, S)))
SLOPES = np.random.default_rng(2).random(3).astype(np.float32)
TABLE = np.random.default_rng(3).standard_normal((3, 2 * S)).astype(np.float32)
DISTANCE = np.arange(S)[:, None] - np.arange(S)
# Of FlexAttention's table: the array that the function reads, the function, what is written here.
MASK_MODS = {
    "q_idx >= kv_idx": (0, lambda x, b, h, i, j: i >= j, {"is_causal": True}),
    "q_idx - kv_idx <= w": (
        0,
        lambda x, b, h, i, j: (i >= j) & (i - j <= W),
        {"is_causal": True, "window": (W, -1)},
    ),
    "document_id[q_idx] == document_id[kv_idx]": (
        DOCUMENTS,
        lambda x, b, h, i, j: x[b, i] == x[b, j],
        {"segment_ids": DOCUMENTS},
    ),
}
SCORE_MODS = {
    "cap * tanh(score / cap)": (
        0,
        lambda x, s, b, h, i, j: CAP * (s / CAP).tanh(),
        {"softcap": CAP},
    ),
    "score - slope[h] * abs(q_idx - kv_idx)": (
        SLOPES,
        lambda x, s, b, h, i, j: s - x[h] * (i - j).abs(),
        {"alibi_slopes": SLOPES},
    ),
    "score + table[h, q_idx - kv_idx + n]": (
        TABLE,
        lambda x, s, b, h, i, j: s + x[h, i - j + S],
        {"bias": TABLE[:, DISTANCE + S]},
    ),
}


@pytest.mark.filterwarnings("ignore")  # that it runs unfused
@pytest.mark.parametrize("text", [*MASK_MODS, *SCORE_MODS])
def test_calls_of_flex_attention(text):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="an older PyTorch")
    assert text in PAGE.read_text(encoding="utf-8")
    array, function, rules = (MASK_MODS | SCORE_MODS)[text]
    array = torch.tensor(array)

    def mask_mod(b, h, i, j):
        return function(array, b, h, i, j)

    def score_mod(score, b, h, i, j):
        return function(array, score, b, h, i, j)

    if text in MASK_MODS:
        options = {"block_mask": flex.create_block_mask(mask_mod, 2, 3, S, S, device="cpu")}
    else:
        options = {"score_mod": score_mod}
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 3, S, 16)).astype(np.float32)
    expected = flex.flex_attention(*map(torch.tensor, (q, k, v)), **options)
    np.testing.assert_allclose(fusedattn.attention(q, k, v, **rules), expected, atol=1e-5)
