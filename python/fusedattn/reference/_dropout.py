"""Dropout's random words: Philox4x32-10 keyed by the seed and counted by the pair's place.

A counter-based generator (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC'11) has
no state: whether the pair (query i, key j) of head h of sample b is kept depends on the seed and on
(b, h, i, j) alone. So the kernel, whatever its tiles, threads and instruction set, and its
backward pass agree with this page bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint32]

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1
LOW, BITS = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: Sequence[ArrayLike], key: tuple[int, int]) -> tuple[Words, ...]:
    """Four random words for each counter.

    Parameters
    ----------
    counter : four arrays of integers below 2**32 that broadcast together
    key : two integers below 2**32

    Returns
    -------
    four uint32 arrays
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    for step in range(ROUNDS):
        k0, k1 = (np.uint64((k + step * by) % 2**32) for k, by in zip(key, KEY_STEPS, strict=True))
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> BITS) ^ c1 ^ k0, p1 & LOW, (p0 >> BITS) ^ c3 ^ k1, p0 & LOW
    return tuple(np.asarray(c, np.uint32) for c in np.broadcast_arrays(c0, c1, c2, c3))


def dropout_mask(
    seed: int | None, dropout_p: float, shape: tuple[int, ...], *, first: int = 0
) -> NDArray[np.bool_]:
    """Which attention weights dropout keeps.

    Philox4x32-10 with counter (j // 8, i, h, b) and key (seed mod 2**32, seed // 2**32) gives eight
    numbers of 16 bits, two of each word, the lower half first. Number j mod 8 is that of the pair
    (i, j) of head h of sample b, which is kept if it is at least round(dropout_p * 2**16).

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1.
    dropout_p : float
        Probability of dropping a weight, from 0 to 1.
    shape : (B, H, Sq, Sk)
        Several leading dimensions count as one, in C order. In a packed batch, b is the number of
        the sequence, and i and j count from its beginning.
    first : int, default 0
        Number of the first sample.

    Returns
    -------
    bool array of that shape
        True where the weight is kept, and scaled by 1 / (1 - p), p the rounded dropout_p.

    Raises
    ------
    TypeError, ValueError
        For a seed or a probability that is none.
    """
    seed, threshold = _seed(seed), _threshold(dropout_p)
    samples, heads, sq, sk = shape
    b, h, i, j = np.ogrid[first : first + samples, :heads, :sq, : -(-sk // 8)]
    words = np.stack(philox4x32((j, i, h, b), (seed % 2**32, seed >> 32)), axis=-1)
    halves = np.stack((words & 0xFFFF, words >> 16), axis=-1)
    kept: NDArray[Any] = halves.reshape(samples, heads, sq, 8 * j.size)[..., :sk] >= threshold
    return kept


def rounded(dropout_p: float) -> float:
    """The nearest multiple of 2**-16: the probability with which a weight is dropped."""
    return _threshold(dropout_p) / 2**16


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected an integer where there is dropout, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


def _threshold(dropout_p: float) -> int:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p!r}")
    return round(float(dropout_p) * 2**16)
