"""Word vectors from counts of neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusedattn.nn import Array


def cooccurrence_embeddings(
    sequences: Sequence[Array], vocab_size: int, width: int, *, window: int = 4, seed: int = 0
) -> Array:
    """Word vectors from counts of neighbours, to start an embedding from.

    The leading singular vectors of the positive pointwise mutual information of tokens at most
    `window` apart, neighbours at distance d counted 1/d and context counts smoothed by the power
    3/4 (Levy, Goldberg and Dagan, TACL 3, 2015), found by random projection (Halko, Martinsson and
    Tropp, SIAM Review 53, 2011). Takes seconds; needs some 16 * vocab_size² bytes while it runs.

    Parameters
    ----------
    sequences : sequence of int arrays
        Token ids; more text gives better vectors, and no labels are needed.
    vocab_size, width : int
        The shape of the result; columns beyond vocab_size are 0.
    window : int, default 4
    seed : int, default 0
        Of the projection, and of the vectors of tokens that have no neighbours.

    Returns
    -------
    float32 array (vocab_size, width)
        Rows of root-mean-square 1.
    """
    if vocab_size < 1 or width < 1:
        raise ValueError(f"vocab_size, width: expected at least 1, got {vocab_size}, {width}")
    rng = np.random.default_rng(seed)
    pairs, weights = [np.empty(0, np.int64)], [np.empty(0)]
    for distance in range(1, window + 1):
        for ids in (s.astype(np.int64) for s in sequences if len(s) > distance):
            pairs.append(ids[:-distance] * vocab_size + ids[distance:])
            weights.append(np.full(len(ids) - distance, 1.0 / distance))
    counts = np.bincount(np.concatenate(pairs), np.concatenate(weights), vocab_size**2)
    joint = counts.astype(np.float32).reshape(vocab_size, vocab_size)
    ppmi = joint + joint.T
    totals = np.maximum(ppmi.sum(axis=0), np.finfo(np.float32).tiny)
    context = totals**0.75
    context /= context.sum()
    # max(log(joint / (totals * context)), 0), and 0 where joint is 0
    ppmi /= totals[:, None]
    ppmi /= context
    np.log(np.maximum(ppmi, 1.0, out=ppmi), out=ppmi)

    basis = rng.standard_normal((vocab_size, min(vocab_size, width + 32)), dtype=np.float32)
    for _ in range(4):
        basis = _orthonormal(ppmi @ (ppmi.T @ basis))
    inside = ppmi.T @ basis
    values, turn = np.linalg.eigh(inside.T @ inside)  # squares of the singular values, ascending
    turn *= np.maximum(values, 0.0) ** 0.25
    vectors = np.zeros((vocab_size, width), np.float32)
    vectors[:, : turn.shape[1]] = basis @ turn[:, : -width - 1 : -1]
    alone = ~vectors.any(axis=1)
    vectors[alone] = rng.standard_normal((int(alone.sum()), width), dtype=np.float32)
    vectors /= np.sqrt(np.mean(vectors**2, axis=1, keepdims=True))
    return vectors


def _orthonormal(columns: Array) -> Array:
    """The same span by way of the Gram matrix: all BLAS products, unlike a QR of a tall matrix."""
    values, turn = np.linalg.eigh(columns.T @ columns)
    turn /= np.sqrt(np.maximum(values, np.finfo(values.dtype).eps * values[-1] + 1e-30))
    return columns @ turn  # type: ignore[no-any-return]
