"""Numbers that are the same on every CPU and with every NumPy, and places in memory for them.

They come from PCG64's raw stream, which NumPy promises never to change, by integer arithmetic and
division by powers of two. NumPy's own distributions may change, and some of them call the C
library's mathematics.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(bfloat16),
}
MEMORY = (
    "contiguous",
    "transposed",
    "reversed",
    "every other",
    "repeated row",
    "repeated all",
    "misaligned",
    "pages apart",
    "padded",
)


class Draw:
    """A stream of numbers that the seed, a tuple of integers, decides."""

    def __init__(self, *seed: int) -> None:
        self._stream = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, limit: int, shape: Any = ()) -> Any:
        """Integers from 0 to limit - 1, a Python int where no shape is given."""
        count = int(np.prod(shape))
        raw = np.atleast_1d(self._stream.random_raw(count)) >> np.uint64(32)
        numbers = ((raw * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)
        return numbers.reshape(shape) if shape != () else int(numbers[0])

    def numbers(self, shape: Any, dtype: Any, reach: float = 2.0) -> np.ndarray:
        """Evenly spread over [-reach, reach), a power of two; 24 random bits, 53 in float64."""
        bits = 53 if dtype == np.float64 else 24
        count = int(np.prod(shape))
        raw = np.atleast_1d(self._stream.random_raw(count)) if count else np.empty(0, np.uint64)
        whole = (raw >> np.uint64(64 - bits)).astype(np.int64) - 2 ** (bits - 1)
        wide = whole.astype(np.float64 if bits == 53 else np.float32)
        wide *= wide.dtype.type(reach * 2.0 ** (1 - bits))
        return np.asarray(wide.astype(dtype).reshape(shape))

    def chance(self, share: float, shape: Any = ()) -> Any:
        """True for this share of the places."""
        return self.below(1024, shape) < round(1024 * share)

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return options[self.below(len(options))]


def in_memory(x: np.ndarray, how: str) -> np.ndarray:
    """x in another place: same shape and dtype, other strides, and but for "repeated" same values.

    What lies between its elements is NaN.
    """
    if how == "transposed":
        return np.asarray(np.ascontiguousarray(x.T).T)
    if how == "reversed":
        flip = np.s_[..., ::-1, ::-1]
        return np.asarray(np.ascontiguousarray(x[flip])[flip])
    if how == "every other":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), np.nan, x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "repeated row":
        return np.broadcast_to(x[..., :1, :], x.shape)
    if how == "repeated all":
        return np.broadcast_to(x[:1, :1] if x.ndim == 4 else x[:1], x.shape)
    if how == "misaligned":
        return np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)
    if how == "pages apart":
        wide = np.full((*x.shape[:-1], max(4096 // x.itemsize, x.shape[-1])), np.nan, x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if how == "padded":
        wide = np.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), np.nan, x.dtype)
        wide[..., 2:-1, 2:-3] = x
        return wide[..., 2:-1, 2:-3]
    return x
