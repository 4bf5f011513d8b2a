"""merge_attention_states: parts of the keys are as good as all of them, forward and backward."""

import itertools

import numpy as np
import pytest

import fusedattn
from fusedattn import reference
from tests.accuracy import assert_same
from tests.strategies import DTYPES

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 40, 6, 3
INF = np.inf


def arrays(dtype=np.float64, layout="bhsd"):
    rng = np.random.default_rng(0)
    shapes = (B, H, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV), (B, H, SQ, DV)
    x = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return [np.swapaxes(a, 1, 2) for a in x] if layout == "bshd" else x


def parts(q, k, v, ends, mask, layout="bhsd", attention=fusedattn.attention):
    """The states of attention over the keys from each end to the next."""
    axis = 1 if layout == "bshd" else 2
    states = []
    for a, b in itertools.pairwise(ends):
        keys = (x.take(range(a, b), axis) for x in (k, v))
        states.append(attention(q, *keys, mask=mask[..., a:b], layout=layout, return_lse=True))
    return tuple(zip(*states, strict=True))


def some_mask():
    mask = np.random.default_rng(1).random((B, 1, SQ, SK)) < 0.5
    mask[0, 0, 1, :17] = False  # the first part sees nothing
    mask[1, 0, 2] = False  # no part does
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("ends", [(0, SK), (0, 17, SK), (0, 0, 3, 17, 18, 39, SK)])
def test_parts_are_as_good_as_the_whole(dtype, layout, ends):
    q, k, v, _ = arrays(dtype, layout)
    mask = some_mask()
    whole, lse = fusedattn.attention(q, k, v, mask=mask, layout=layout, return_lse=True)
    outs, lses = parts(q, k, v, ends, mask, layout)
    got, got_lse = fusedattn.merge_attention_states(outs, lses, layout=layout)
    assert got.dtype == dtype
    assert got_lse.dtype == lse.dtype
    if len(ends) == 2:
        assert_same(got, whole)
        assert_same(got_lse, lse)
    # 16-bit parts are rounded before they are merged.
    eps = max(float(reference_eps(dtype)), 1e-15)
    got, whole = got.astype(np.float64), whole.astype(np.float64)
    np.testing.assert_allclose(got, whole, rtol=4 * eps, atol=4 * eps)
    tight = 4 * float(np.finfo(lse.dtype).eps)
    np.testing.assert_allclose(got_lse, lse, rtol=tight, atol=tight)
    blind = np.isneginf(lse)
    assert blind[1, :, 2].all()
    np.testing.assert_array_equal(np.isneginf(got_lse), blind)
    rows = got if layout == "bhsd" else got.swapaxes(1, 2)
    assert np.all(rows[blind] == 0)


def reference_eps(dtype):
    """Spacing of numbers at 1; ml_dtypes has it for its own types alone."""
    one = np.ones((), dtype)
    return np.nextafter(one, one + one) - one


def test_an_empty_state_adds_nothing_whatever_it_holds():
    q, k, v, _ = arrays(np.float32)
    mask = some_mask()
    outs, lses = parts(q, k, v, (0, 17, SK), mask)
    expected, lse = fusedattn.merge_attention_states(outs, lses)
    junk = np.where(np.isneginf(lses[0])[..., None], np.float32(np.nan), outs[0])
    nothing = np.full_like(outs[0], INF), np.full_like(lse, -INF)
    got, got_lse = fusedattn.merge_attention_states(
        [nothing[0], junk, outs[1]], [nothing[1], *lses]
    )
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got_lse, lse)


def test_infinities_and_nan_of_a_state_arrive():
    out, lse = np.ones((2, 1, 3, 2)), np.zeros((2, 1, 3))
    odd = out.copy()
    odd[0, 0, 1, 0] = np.nan
    odd[0, 0, 2, 1] = INF
    odd_lse = lse.copy()
    odd_lse[1, 0, 0] = np.nan
    got, got_lse = fusedattn.merge_attention_states([out, odd], [lse, odd_lse])
    expected = odd.copy()
    expected[1, 0, 0] = np.nan
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.isnan(got_lse), np.isnan(odd_lse))


def test_weights_far_apart():
    out, lse = fusedattn.merge_attention_states([[[1.0]], [[2.0]]], [[1e4], [-1e4]])
    np.testing.assert_array_equal(out, [[1.0]])
    np.testing.assert_array_equal(lse, [1e4])


def test_packed_sequences_split_by_keys():
    rng = np.random.default_rng(3)
    cu = np.array([0, 5, 5, 12])
    q, k, v = rng.standard_normal((3, 12, 2, 4))
    whole, lse = fusedattn.attention_varlen(q, k, v, cu, cu, return_lse=True)
    halves = [(cu[:-1], (cu[:-1] + cu[1:]) // 2), ((cu[:-1] + cu[1:]) // 2, cu[1:])]
    states = []
    for starts, ends in halves:
        keys = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        cu_k = np.concatenate([[0], np.cumsum(ends - starts)])
        states.append(fusedattn.attention_varlen(q, k[keys], v[keys], cu, cu_k, return_lse=True))
    got, got_lse = fusedattn.merge_attention_states(*zip(*states, strict=True), layout="bshd")
    np.testing.assert_allclose(got, whole, rtol=1e-13)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-13)


def test_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(2)
    outs, lses = rng.standard_normal((3, 2, 4, 3)), rng.standard_normal((3, 2, 4))
    lses[1, 0, 2] = -INF
    lses[:, 1, 1] = -INF
    outs[np.isneginf(lses)] = np.nan
    dout, dlse = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4))

    def loss(outs, lses):
        out, lse = fusedattn.merge_attention_states(outs, lses)
        return np.sum(dout * out) + np.sum(dlse * np.where(np.isneginf(lse), 0.0, lse))

    douts, dlses = fusedattn.merge_attention_states_backward(dout, dlse, outs, lses)
    step = 1e-6
    for x, got in ((outs, np.stack(douts)), (lses, np.stack(dlses))):
        for at in np.ndindex(x.shape):
            if not np.isfinite(x[at]):
                assert got[at] == 0
                continue
            kept = x[at]
            x[at] = kept + step
            up = loss(outs, lses)
            x[at] = kept - step
            down = loss(outs, lses)
            x[at] = kept
            np.testing.assert_allclose(got[at], (up - down) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("library", [fusedattn, reference], ids=["kernel", "reference"])
def test_gradients_through_parts_are_those_of_the_whole(library, layout):
    q, k, v, dout = arrays(layout=layout)
    mask, ends = some_mask(), (0, 3, 17, SK)
    dlse = np.random.default_rng(5).standard_normal((B, H, SQ))
    options = {"layout": layout}
    out, lse = library.attention(q, k, v, mask=mask, return_lse=True, **options)
    whole = library.attention_backward(dout, q, k, v, out, lse, mask=mask, dlse=dlse, **options)
    outs, lses = parts(q, k, v, ends, mask, layout, library.attention)
    douts, dlses = fusedattn.merge_attention_states_backward(dout, dlse, outs, lses, layout=layout)
    axis = 1 if layout == "bshd" else 2
    shares = []
    for n, (a, b) in enumerate(itertools.pairwise(ends)):
        keys = (x.take(range(a, b), axis) for x in (k, v))
        shares.append(
            library.attention_backward(
                douts[n], q, *keys, outs[n], lses[n], mask=mask[..., a:b], dlse=dlses[n], **options
            )
        )
    dqs, dks, dvs, *_ = zip(*shares, strict=True)
    np.testing.assert_allclose(sum(dqs), whole.dq, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate(dks, axis), whole.dk, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate(dvs, axis), whole.dv, rtol=1e-10, atol=1e-12)


def test_the_merged_state_serves_each_part_as_its_own():
    q, k, v, dout = arrays()
    mask, ends = some_mask(), (0, 3, 17, SK)
    out, lse = fusedattn.attention(q, k, v, mask=mask, return_lse=True)
    whole = fusedattn.attention_backward(dout, q, k, v, out, lse, mask=mask)
    state = fusedattn.merge_attention_states(*parts(q, k, v, ends, mask))
    dq = 0
    for a, b in itertools.pairwise(ends):
        share = fusedattn.attention_backward(
            dout, q, k[:, :, a:b], v[:, :, a:b], *state, mask=mask[..., a:b]
        )
        dq = dq + share.dq
        np.testing.assert_allclose(share.dk, whole.dk[:, :, a:b], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(share.dv, whole.dv[:, :, a:b], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dq, whole.dq, rtol=1e-10, atol=1e-12)


OUT, LSE = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "layout", "error", "message"),
    [
        ([], [], "bhsd", ValueError, "outs: expected at least one"),
        ([OUT], [LSE, LSE], "bhsd", ValueError, "lses: expected .* 1 outs, got 2"),
        ([OUT], [LSE], "bhds", ValueError, "layout: expected .*'bhds'"),
        ([OUT], [LSE], "bshd", ValueError, r"lses: expected shape \(3, 2\), got \(2, 3\)"),
        ([OUT, OUT[:1]], [LSE, LSE], "bhsd", ValueError, r"outs: .*\(2, 3, 4\).*\(1, 3, 4\)"),
        ([OUT, OUT.astype(float)], [LSE] * 2, "bhsd", TypeError, "outs: .*float32.*float64"),
        ([OUT.astype(int)], [LSE], "bhsd", TypeError, "outs: .*int64"),
        ([OUT], [LSE.astype(np.float16)], "bhsd", TypeError, "lses: .*float32.*float16"),
        ([OUT[0, 0]], [LSE[0, 0]], "bhsd", ValueError, r"outs: .*\(4,\)"),
    ],
)
def test_errors(outs, lses, layout, error, message):
    with pytest.raises(error, match=message):
        fusedattn.merge_attention_states(outs, lses, layout=layout)
    with pytest.raises(error, match=message):
        fusedattn.merge_attention_states_backward(OUT, LSE, outs, lses, layout=layout)


def test_errors_of_gradients():
    with pytest.raises(ValueError, match=r"dout: expected shape \(2, 3, 4\), got \(2, 3\)"):
        fusedattn.merge_attention_states_backward(LSE, LSE, [OUT], [LSE])
    with pytest.raises(ValueError, match=r"dlse: expected shape \(2, 3\), got \(2, 3, 4\)"):
        fusedattn.merge_attention_states_backward(OUT, OUT, [OUT], [LSE])
