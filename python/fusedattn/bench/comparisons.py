"""What ``fusedattn bench --ratios`` asks: the comparisons, and how their calls are prepared."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusedattn.bench.cases import Array
from fusedattn.bench.ratios import Call, Comparison, Sides

__all__ = ["COMPARISONS", "matching"]


def draw(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def padded(direction: str, threads: int, shape: tuple[int, ...], **rules: Any) -> Call:
    """A call on four arrays of one shape, with what a backward pass needs made beforehand."""
    from fusedattn import attention, attention_backward

    q, k, v, dout = (draw(*shape, seed=n) for n in range(4))
    options = {"num_threads": threads} | rules
    if direction == "forward":
        return lambda: attention(q, k, v, **options)
    out, lse = attention(q, k, v, return_lse=True, **options)
    return lambda: attention_backward(dout, q, k, v, out, lse, **options)


def packed(direction: str, threads: int, lengths: Array, heads: int, d: int) -> Call:
    """A call on sequences of these lengths, packed."""
    from fusedattn import attention_varlen, attention_varlen_backward

    cu = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v, dout = (draw(int(cu[-1]), heads, d, seed=n) for n in range(4))
    options: dict[str, Any] = {"num_threads": threads}
    if direction == "forward":
        return lambda: attention_varlen(q, k, v, cu, cu, **options)
    out, lse = attention_varlen(q, k, v, cu, cu, return_lse=True, **options)
    return lambda: attention_varlen_backward(dout, q, k, v, out, lse, cu, cu, **options)


def in_turn(calls: Sequence[Call]) -> Call:
    """All of them, one after the other; all results live until the last, as those of one call."""
    return lambda: [call() for call in calls]


def rule(
    shape: tuple[int, ...], make: Callable[[], dict[str, Any]], **beside: Any
) -> Callable[[str, int], Sides]:
    """A call with the rules that ``make`` gives, beside the same call without."""

    def prepare(direction: str, threads: int) -> Sides:
        return Sides(
            padded(direction, threads, shape, **make()),
            padded(direction, threads, shape, **beside),
        )

    return prepare


SHORT, LONG = (8, 12, 512, 64), (1, 8, 4096, 64)


def window(direction: str, threads: int) -> Sides:
    """A row sees itself and 255 keys before it; beside it the dense rate at the same length."""
    s, left = 16384, 255
    shape = (1, 1, s, 64)
    pairs = s * (left + 1) - left * (left + 1) // 2
    return Sides(
        padded(direction, threads, shape, window=(left, 0)),
        padded(direction, threads, shape),
        factor=s * s / pairs,
    )


def documents(direction: str, threads: int) -> Sides:
    """Sixteen documents in one row by their ids, beside a call for each."""
    ids = np.repeat(np.arange(16, dtype=np.int32), 1024)[None]
    alone = [padded(direction, threads, (1, 8, 1024, 64)) for _ in range(16)]
    return Sides(
        padded(direction, threads, (1, 8, 16384, 64), segment_ids=ids),
        in_turn(alone),
    )


def sentence_lengths() -> Array:
    """256 lengths with mean 40 and at most 128, skewed as those of sentences are."""
    lengths = np.random.default_rng(0).gamma(3.0, 40 / 3, 256).round()
    clipped: Array = np.clip(lengths, 3, 128).astype(np.int64)
    return clipped


def sentences(direction: str, threads: int) -> Sides:
    """Packed sentences beside their own work: one plain call for all those of one length."""
    lengths = sentence_lengths()
    same = [
        padded(direction, threads, (int(n), 12, int(length), 64))
        for length, n in zip(*np.unique(lengths, return_counts=True), strict=True)
    ]
    return Sides(packed(direction, threads, lengths, 12, 64), in_turn(same))


def sentences_or_padding(direction: str, threads: int) -> Sides:
    """Packed sentences beside the same ones padded to the longest, under a mask of the keys."""
    lengths = sentence_lengths()
    longest = int(lengths.max())
    mask = (np.arange(longest) < lengths[:, None])[:, None, None]
    return Sides(
        packed(direction, threads, lengths, 12, 64),
        padded(direction, threads, (len(lengths), 12, longest, 64), mask=mask),
    )


def padding_mask() -> dict[str, Any]:
    """Sequences of 505 to 512 tokens: nearly all the work is left."""
    lengths = 505 + np.arange(8)
    return {"mask": (np.arange(512) < lengths[:, None])[:, None, None]}


def half_empty() -> dict[str, Any]:
    """Squares of 128 queries and keys, every other one empty, as on a chessboard."""
    n = np.arange(4096) // 128
    return {"mask": (n[:, None] + n) % 2 == 0}


def random_mask() -> dict[str, Any]:
    """Nine of ten pairs allowed, at random: no tile is empty and none is full."""
    return {"mask": np.random.default_rng(0).random((512, 512)) < 0.9}


def bias() -> dict[str, Any]:
    """A number for every head, query and key; its gradient is not asked for."""
    return {"bias": draw(12, 512, 512)}


def slopes() -> dict[str, Any]:
    """ALiBi's: a geometric sequence down to 2^-8."""
    return {"alibi_slopes": (2.0 ** (-8 * np.arange(1, 13) / 12)).astype(np.float32)}


def dropout() -> dict[str, Any]:
    """One probability in ten."""
    return {"dropout_p": 0.1, "seed": 1}


def layout(direction: str, threads: int) -> Sides:
    """(B, S, H, D) whose rows lie 4096 bytes apart, beside (B, H, S, D)."""
    return Sides(
        padded(direction, threads, (2, 1024, 16, 64), layout="bshd"),
        padded(direction, threads, (2, 16, 1024, 64)),
    )


def few(n: int, beside: int) -> Callable[[str, int], Sides]:
    """n queries in one call, beside one-query calls for each, or beside a call with more."""

    def prepare(direction: str, threads: int) -> Sides:
        from fusedattn import attention

        k, v = (draw(1, 32, 4096, 128, seed=n) for n in (1, 2))

        def call(queries: int) -> Call:
            q = draw(1, 32, queries, 128)
            return lambda: attention(q, k, v, num_threads=threads)

        return Sides(call(n), call(beside), factor=1 / n if beside == 1 else 1.0)

    return prepare


# At most, what beside what, the calls.
QUESTIONS: dict[str, tuple[float, str, Callable[[str, int], Sides]]] = {
    "causal": (0.55, "causal beside dense, S4096", rule(LONG, lambda: {"is_causal": True})),
    "window": (2.0, "256 keys a row beside the dense rate, S16384", window),
    "documents": (1.15, "16 documents of 1024 in one row beside 16 calls", documents),
    "padding-mask": (1.05, "(B,1,1,Sk) mask beside dense, S512", rule(SHORT, padding_mask)),
    "mask": (1.15, "(Sq,Sk) random mask beside dense, S512", rule(SHORT, random_mask)),
    "half-empty": (0.65, "mask with half its tiles empty, S4096", rule(LONG, half_empty)),
    "bias": (1.25, "(H,Sq,Sk) bias beside dense, S512", rule(SHORT, bias)),
    "alibi": (1.25, "ALiBi slopes beside dense, S512", rule(SHORT, slopes)),
    "softcap": (1.25, "softcap beside dense, S512", rule(SHORT, lambda: {"softcap": 30.0})),
    "dropout": (1.4, "dropout beside dense, S512", rule(SHORT, dropout)),
    "sentences": (1.1, "packed, mean 40 of at most 128, beside its own work", sentences),
    "padding": (0.5, "packed beside padded to the longest", sentences_or_padding),
    "layout": (1.05, "bshd with rows 4096 bytes apart beside bhsd", layout),
}
FEW = {
    f"few-{n}-{name}": (1.0, f"{n} queries beside {text}, 4096 keys", few(n, beside))
    for n in (2, 4, 8, 16)
    for name, text, beside in (("decode", "one by one", 1), ("prefill", "32", 32))
}
COMPARISONS = {
    name: Comparison(name, text, at_most, prepare, directions)
    for questions, directions in ((QUESTIONS, ("forward", "backward")), (FEW, ("forward",)))
    for name, (at_most, text, prepare) in questions.items()
}


def matching(patterns: Sequence[str] = ()) -> list[Comparison]:
    """The comparisons whose name matches one of the patterns; none means all.

    Raises
    ------
    ValueError
        For a pattern that matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(COMPARISONS, pattern):
            raise ValueError(
                f"expected a comparison or a pattern of {', '.join(COMPARISONS)}, got {pattern!r}"
            )
    return [
        c
        for name, c in COMPARISONS.items()
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
