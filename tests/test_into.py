"""Gradients of packed attention, written where the caller says."""

import numpy as np
import pytest

from fusedattn import attention_varlen, attention_varlen_backward

CU = np.array([0, 3, 3, 20])


def problem():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((20, 2, 8), dtype=np.float32) for _ in range(4))
    out, lse = attention_varlen(q, k, v, CU, CU, return_lse=True)
    return dout, q, k, v, out, lse, CU, CU


def test_into_views_of_one_array_gives_the_same_bits():
    call = problem()
    fused = np.full((20, 3, 2, 8), np.nan, np.float32)
    grads = attention_varlen_backward(*call, into=tuple(fused.swapaxes(0, 1)))
    expected = attention_varlen_backward(*call)
    for i, name in enumerate(("dq", "dk", "dv")):
        np.testing.assert_array_equal(fused[:, i], getattr(expected, name))
        assert np.shares_memory(getattr(grads, name), fused)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a[:, :1], ValueError, r"^dk: expected shape \(20, 2, 8\), got \(20, 1, 8\)"),
        (lambda a: a.astype(np.float64), TypeError, r"^dk: expected float32, got"),
        (lambda a: np.broadcast_to(a[:1], a.shape), ValueError, r"^dk: expected a writeable array"),
    ],
)
def test_into_errors(change, error, message):
    call = problem()
    dq, dk, dv = (np.empty_like(call[1]) for _ in range(3))
    with pytest.raises(error, match=message):
        attention_varlen_backward(*call, into=(dq, change(dk), dv))
