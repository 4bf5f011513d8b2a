"""The kernel drops exactly what the reference's mask says, whatever the shape, type and threads."""

import numpy as np
import pytest

import fusedattn
from fusedattn.reference import dropout_mask
from tests.strategies import DTYPES

SEED = 0xFEDCBA9876543210


def kept_by_the_kernel(sq, sk, dtype, p, **options):
    """Which weights are not 0: those of equal logits, with the identity for values."""
    q, k = np.zeros((2, 2, sq, 1), dtype), np.zeros((2, 2, sk, 1), dtype)
    v = np.broadcast_to(np.eye(sk, dtype=dtype), (2, 2, sk, sk))
    out = fusedattn.attention(q, k, v, dropout_p=p, seed=SEED, **options)
    return out != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 200), (3, 65), (17, 16), (70, 131), (130, 257)])
def test_the_mask(isa, sq, sk, dtype):
    for p in (0.1, 0.5, 0.9):
        got = kept_by_the_kernel(sq, sk, dtype, p)
        np.testing.assert_array_equal(got, dropout_mask(SEED, p, (2, 2, sq, sk)))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads(isa, num_threads):
    got = kept_by_the_kernel(300, 300, np.float32, 0.3, num_threads=num_threads)
    np.testing.assert_array_equal(got, dropout_mask(SEED, 0.3, (2, 2, 300, 300)))


def test_behind_other_rules(isa):
    mask = np.tri(150, 150, 20, dtype=bool)
    got = kept_by_the_kernel(150, 150, np.float32, 0.3, is_causal=True, q_offset=20)
    np.testing.assert_array_equal(got, dropout_mask(SEED, 0.3, (2, 2, 150, 150)) & mask)


def test_backward_drops_the_same(isa):
    # With dout the identity, dv is the transposed matrix of the weights that are left.
    sq, sk, p = 90, 140, 0.4
    q, k, v = (np.zeros((2, 2, n, d), np.float32) for n, d in ((sq, 1), (sk, 1), (sk, sq)))
    dout = np.broadcast_to(np.eye(sq, dtype=np.float32), (2, 2, sq, sq))
    _, vjp = fusedattn.attention_vjp(q, k, v, dropout_p=p, seed=SEED)
    kept = np.swapaxes(vjp(dout).dv, -1, -2) != 0
    np.testing.assert_array_equal(kept, dropout_mask(SEED, p, (2, 2, sq, sk)))


def test_a_fresh_seed_reaches_the_gradients():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 8, 4))
    out, vjp = fusedattn.attention_vjp(q, k, v, dropout_p=0.5)
    # out is linear in v: its derivative along v is out itself, if the mask is the same.
    np.testing.assert_allclose(np.sum(vjp(out).dv * v), np.sum(out * out), rtol=1e-12)
    assert not np.array_equal(out, fusedattn.attention(q, k, v, dropout_p=0.5))
