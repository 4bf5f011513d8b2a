"""The reference's dropout mask: Philox's known answers, independence of the shape, and edges."""

import numpy as np
import pytest

from fusedattn import reference
from fusedattn.reference._dropout import philox4x32

# From the known-answer tests of Random123, the library of the paper's authors.
KNOWN = [
    ([0x00000000] * 4, (0x00000000, 0x00000000), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert " ".join(f"{int(word):08x}" for word in philox4x32(counter, key)) == words


def test_each_pair_by_its_place():
    seed, p, shape = 0x123456789ABCDEF0, 0.37, (2, 3, 4, 19)
    mask = reference.dropout_mask(seed, p, shape)
    for b, h, i, j in np.ndindex(shape):
        words = philox4x32((j // 8, i, h, b), (0x9ABCDEF0, 0x12345678))
        drawn = int(words[j % 8 // 2]) >> 16 * (j % 2) & 0xFFFF
        assert mask[b, h, i, j] == (drawn >= round(p * 2**16))


def test_a_part_of_the_whole():
    whole = reference.dropout_mask(5, 0.5, (3, 4, 9, 17))
    np.testing.assert_array_equal(
        reference.dropout_mask(5, 0.5, (2, 3, 8, 6)), whole[:2, :3, :8, :6]
    )
    np.testing.assert_array_equal(reference.dropout_mask(5, 0.5, (1, 4, 9, 17), first=2), whole[2:])
    assert (reference.dropout_mask(6, 0.5, (3, 4, 9, 17)) != whole).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(p):
    mask = reference.dropout_mask(1, p, (2, 5, 100, 100))
    # Five standard deviations of a binomial proportion.
    assert abs(mask.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / mask.size)


def test_edges():
    assert reference.dropout_mask(0, 0.0, (1, 1, 8, 9)).all()
    assert not reference.dropout_mask(0, 1.0, (1, 1, 8, 9)).any()
    assert reference.dropout_mask(0, 2**-18, (1, 1, 300, 900)).all()
    assert not reference.dropout_mask(0, 1 - 2**-18, (1, 1, 300, 900)).any()
    assert reference.dropout_mask(0, 0.5, (0, 2, 3, 4)).shape == (0, 2, 3, 4)
    assert reference.dropout_mask(2**64 - 1, 0.5, (1, 1, 3, 0)).shape == (1, 1, 3, 0)


@pytest.mark.parametrize(
    ("seed", "p", "error", "message"),
    [
        (None, 0.5, TypeError, "seed.*None"),
        (True, 0.5, TypeError, "seed.*True"),
        (1.0, 0.5, TypeError, r"seed.*1\.0"),
        (-1, 0.5, ValueError, "seed.*-1"),
        (2**64, 0.5, ValueError, "seed.*18446744073709551616"),
        (0, 1.5, ValueError, r"dropout_p.*1\.5"),
        (0, -0.5, ValueError, r"dropout_p.*-0\.5"),
        (0, float("nan"), ValueError, "dropout_p.*nan"),
    ],
)
def test_errors(seed, p, error, message):
    with pytest.raises(error, match=message):
        reference.dropout_mask(seed, p, (1, 1, 2, 2))


def test_dropped_weights_are_zero_and_kept_ones_scaled():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 3, 5, 4))
    eye = np.broadcast_to(np.eye(5), (2, 3, 5, 5))
    plain, lse = reference.attention(q, k, eye, return_lse=True)
    dropped, same_lse = reference.attention(q, k, eye, return_lse=True, dropout_p=0.25, seed=9)
    mask = reference.dropout_mask(9, 0.25, (2, 3, 5, 5))
    np.testing.assert_allclose(dropped, np.where(mask, plain / 0.75, 0.0), rtol=1e-15)
    np.testing.assert_array_equal(lse, same_lse)
