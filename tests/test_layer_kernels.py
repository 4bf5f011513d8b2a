"""The core's operations for layers, for every instruction set: formulas, sizes, threads, NaN."""

import math

import numpy as np
import pytest

import fusedattn
from fusedattn import _core
from fusedattn.nn._core_ops import activate, drop, gather_sum, product, scatter_sum

DTYPES = [np.float32, np.float64]
SIZES = [
    (1, 1, 1),
    (5, 3, 2),
    (6, 64, 256),
    (7, 65, 257),
    (13, 17, 15),
    (64, 130, 600),
    (300, 48, 33),
    (17, 33, 65),
    (33, 47, 161),
    (49, 95, 129),
]


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_close(ours, exact, magnitude, units=8.0):
    """Within so many rounding errors of what was summed."""
    error = np.abs(ours.astype(np.float64) - exact)
    assert (error <= units * np.finfo(ours.dtype).eps * magnitude + 1e-300).all(), error.max()


def laid_out(a, transposed):
    """`a` with gaps after its rows, or after its columns."""
    wide = np.zeros((a.shape[0] + 3, a.shape[1] + 5), a.dtype)
    view = wide[: a.shape[0], : a.shape[1]]
    if transposed:
        view = np.zeros((a.shape[1] + 3, a.shape[0] + 5), a.dtype)[: a.shape[1], : a.shape[0]].T
    view[...] = a
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_product(isa, dtype, m, n, k, a_transposed, b_transposed):
    a, b, bias, added = (normal(s, x, dtype) for s, x in enumerate(((m, k), (k, n), n, (m, n))))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64) + 10
    a, b = laid_out(a, a_transposed), laid_out(b, b_transposed)
    assert_close(product(a, b), exact, size)
    assert_close(product(a, b, bias=bias, added=added), exact + bias + added, size)
    if a_transposed:
        sums = np.empty(m, dtype)
        product(a, b, row_sums=sums)
        assert_close(sums, a.astype(np.float64).sum(axis=1), np.abs(a).sum(axis=1) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_product(isa, dtype):
    for m in (1, 2, 5, 6, 7, 12):
        for n in range(1, 70):
            a, b = normal(n, (m, 9), dtype), normal(m, (9, n), dtype)
            np.testing.assert_allclose(product(a, b), a @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_product(isa, shape):
    m, n, k = shape
    bias = normal(0, n)
    y = product(np.ones((m, k), np.float32), np.ones((k, n), np.float32), bias=bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (m, n)))


def test_row_sums_of_narrow_matrices(isa):
    for shape in ((0, 4), (1, 4), (4, 1), (1, 1)):
        dy, sums = normal(0, shape), np.empty(shape[1], np.float32)
        product(dy.T, np.ones((shape[0], 3), np.float32), row_sums=sums)
        np.testing.assert_allclose(sums, dy.sum(axis=0), rtol=1e-6)


def test_a_row_of_a_product_does_not_depend_on_the_others(isa):
    x, w = normal(0, (700, 300)), normal(1, (130, 300))
    whole = product(x, w.T, bias=w[:, 0].copy())
    for begin, end in ((0, 1), (3, 10), (256, 263), (5, 600)):
        some = product(x[begin:end], w.T, bias=w[:, 0].copy())
        np.testing.assert_array_equal(some, whole[begin:end])


def test_nan_and_inf_stay_in_their_row_and_column(isa):
    a, b = normal(0, (9, 20)), normal(1, (20, 70))
    a[4, 3], b[7, 66] = np.nan, np.inf
    y = product(a, b)
    assert np.isnan(y[4]).all()
    assert not np.isfinite(y[:, 66]).any()
    rest = np.delete(np.delete(y, 4, axis=0), 66, axis=1)
    np.testing.assert_allclose(
        rest, np.delete(a, 4, axis=0) @ np.delete(b, 66, axis=1), rtol=0, atol=1e-4
    )


def test_a_column_of_a_product_does_not_depend_on_the_others(isa):
    x, w = normal(0, (70, 300)), normal(1, (130, 300))
    whole = product(x, w.T)
    for begin, end in ((0, 33), (3, 52), (97, 130)):
        np.testing.assert_array_equal(product(x, w[begin:end].T), whole[:, begin:end])


LARGEST = np.finfo(np.float32).max
ODD = [np.nan, np.inf, -np.inf, LARGEST, -LARGEST, 1e30]


@pytest.mark.parametrize("odd", [*ODD, np.uint32(0xFFFFFFFF).view(np.float32)])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_odd_numbers_leave_the_bits_of_other_rows_and_columns(isa, odd, a_transposed, b_transposed):
    a, b, bias = normal(0, (70, 200)), normal(1, (200, 100)), normal(2, 100)
    a, b = laid_out(a, a_transposed), laid_out(b, b_transposed)
    slope = np.empty((70, 100), np.float32)
    clean = product(a, b, bias=bias, then="gelu", slope=slope)
    a[41, 130], b[199, 77], b[3, 99] = odd, odd, -odd
    y = product(a, b, bias=bias, then="gelu", slope=np.empty_like(slope))
    rows, columns = np.arange(70) != 41, ~np.isin(np.arange(100), (77, 99))
    np.testing.assert_array_equal(y[np.ix_(rows, columns)], clean[np.ix_(rows, columns)])


@pytest.mark.parametrize("odd", ODD)
def test_odd_numbers_become_what_multiply_adds_make_of_them(isa, odd):
    a, b = np.ones((40, 128), np.float32), np.ones((128, 40), np.float32)
    a[7, 5], b[90, 9], b[5, 20], b[5, 21] = odd, odd, 1e10, 0
    with np.errstate(all="ignore"):
        expected = np.stack([(a[i, :, None] * b).sum(axis=0, dtype=np.float32) for i in range(40)])
    np.testing.assert_allclose(product(a, b), expected, rtol=1e-6)
    # Each overflows on its own, and so do products of their pieces, with either sign.
    huge = np.full((40, 128), 1e30 * (1 + 2**-9), np.float32)
    np.testing.assert_array_equal(product(huge, huge.T), np.full((40, 40), np.inf))


def activations(x):
    """In float64: y and slope by name."""
    cdf = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(x)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return {
        "relu": (np.maximum(x, 0), (x > 0) * 1.0),
        "gelu": (x * cdf, cdf + x * density),
        "gelu_tanh": (0.5 * x * (1 + t), slope),
        "tanh": (np.tanh(x), 1 - np.tanh(x) ** 2),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("then", ["relu", "gelu", "gelu_tanh", "tanh"])
def test_activations(isa, dtype, then):
    x = np.concatenate([np.linspace(-13, 13, 3001), [0.0, -0.0, 1e-30, -1e-30]]).astype(dtype)
    y, slope = activate(x[:, None], then)
    expected = activations(x.astype(np.float64))[then]
    bound = 4e-7 if dtype == np.float32 else 4e-15
    assert np.abs(y[:, 0] - expected[0]).max() <= bound * 13
    assert np.abs(slope[:, 0] - expected[1]).max() <= bound * 3
    # The same within a product, where the tile is finished.
    one = np.ones((1, 1), dtype)
    again = np.empty((len(x), 1), dtype)
    np.testing.assert_array_equal(product(x[:, None], one, then=then, slope=again), y)
    np.testing.assert_array_equal(again, slope)


@pytest.mark.parametrize("then", ["relu", "gelu", "gelu_tanh"])
def test_activations_at_the_ends(isa, then):
    x = np.array([[np.nan, np.inf, 1e30, -1e30]], np.float32)
    y, slope = activate(x, then)
    assert np.isnan(y[0, 0])
    np.testing.assert_array_equal(y[0, 1:3], x[0, 1:3])
    assert y[0, 3] == 0.0
    np.testing.assert_array_equal(slope[0, 2:], [1, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_keeps_its_digits_and_ends_at_one(isa, dtype):
    x = np.array([[1e-30, -1e-9, 1e-3, 0.14, -0.0, np.inf, -1e30, np.nan]], dtype)
    y, slope = activate(x, "tanh")
    np.testing.assert_allclose(y, np.tanh(x), rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(slope[0, 4:7], [1, 0, 0])


def test_times(isa):
    a, b, slope = normal(0, (50, 30)), normal(1, (30, 70)), normal(2, (50, 70))
    y = product(a, b, then="times", slope=slope)
    np.testing.assert_array_equal(y, product(a, b) * slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 64, 100, 384])
def test_layer_norm(isa, dtype, width):
    rows = 131
    x, dy = normal(0, (rows, width), dtype) * 3 + 1, normal(1, (rows, width), dtype)
    weight, bias = normal(2, width, dtype), normal(3, width, dtype)
    y, dx, mean, rstd = (
        np.empty_like(x),
        np.empty_like(x),
        np.empty(rows, dtype),
        np.empty(rows, dtype),
    )
    dweight, dbias = np.empty(width, dtype), np.empty(width, dtype)
    _core.layer_norm(x, y, weight, bias, mean, rstd, 1e-3)
    _core.layer_norm_backward(x, dy, dx, weight, mean, rstd, dweight, dbias)

    x, dy, weight, bias = (a.astype(np.float64) for a in (x, dy, weight, bias))
    r = 1 / np.sqrt(x.var(axis=1, keepdims=True) + 1e-3)
    h = (x - x.mean(axis=1, keepdims=True)) * r
    g = dy * weight
    expected = r * (g - g.mean(axis=1, keepdims=True) - h * (g * h).mean(axis=1, keepdims=True))
    size = 1 + np.abs(h).max()
    assert_close(y, h * weight + bias, 8 * size)
    assert_close(dx, expected, 30 * (1 + np.abs(g).max()) * size * r.max())
    assert_close(dweight, (dy * h).sum(axis=0), np.abs(dy * h).sum(axis=0) + size, 30)
    assert_close(dbias, dy.sum(axis=0), np.abs(dy).sum(axis=0) + 1)


def test_layer_norm_keeps_nan_in_its_row(isa):
    x = normal(0, (5, 20))
    x[2, 7] = np.nan
    y, mean, rstd = np.empty_like(x), np.empty(5, np.float32), np.empty(5, np.float32)
    _core.layer_norm(x, y, np.ones(20, np.float32), np.zeros(20, np.float32), mean, rstd, 1e-5)
    assert np.isnan(y[2]).all()
    assert np.isfinite(np.delete(y, 2, axis=0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 15, 17, 40_001])
def test_adamw(isa, dtype, size):
    p, g, m, v = (normal(s, size, dtype) for s in range(4))
    v *= v
    p0, g0, m0, v0 = (a.astype(np.float64) for a in (p, g, m, v))
    _core.adamw(p, g, m, v, 0.5, 0.9, 0.98, 0.01, 1.2, 0.999, 1e-8)
    m1, v1 = 0.9 * m0 + 0.1 * 0.5 * g0, 0.98 * v0 + 0.02 * (0.5 * g0) ** 2
    assert_close(m, m1, np.abs(m0) + np.abs(g0))
    assert_close(v, v1, v0 + g0**2)
    step = 0.01 * m1 / (1.2 * np.sqrt(v1) + 1e-8)
    bound = 0.01 * (np.abs(m0) + np.abs(g0)) / (1.2 * np.sqrt(v1) + 1e-8)
    assert_close(p, 0.999 * p0 - step, np.abs(p0) + bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1000])
def test_softmax(isa, dtype, classes):
    x, share = 5 * normal(0, (37, classes), dtype), normal(1, 37, dtype)
    x[3] += 1e4
    x[5, 1:] = -np.inf
    lse, dx = np.empty(37, dtype), np.empty_like(x)
    _core.log_sum_exp(x, lse)
    _core.softmax_gradient(x, lse, share, dx)
    wide = x.astype(np.float64)
    most = wide.max(axis=1, keepdims=True)
    exact = most[:, 0] + np.log(np.exp(wide - most).sum(axis=1))
    assert_close(lse, exact, np.abs(exact) + 1)
    p = np.exp(wide - exact[:, None]) * share[:, None]
    # An error of lse is one of all probabilities.
    assert_close(dx, p, np.abs(p) * (30 + np.abs(exact[:, None])) + 1e-6)


def test_softmax_of_nan(isa):
    x = np.array([[0.0, np.nan, 1.0], [0.0, 1.0, 2.0]], np.float32)
    lse = np.empty(2, np.float32)
    _core.log_sum_exp(x, lse)
    assert np.isnan(lse[0])
    assert np.isfinite(lse[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "rows", "width"), [(0, 3, 4), (7, 5, 1), (500, 3, 37), (900, 400, 20)]
)
def test_gather_and_scatter(isa, dtype, count, rows, width):
    rng = np.random.default_rng(0)
    tables = [normal(s, (rows, width), dtype) for s in range(3)]
    ids = [rng.integers(0, rows, count) for _ in tables]
    exact = sum(t.astype(np.float64)[i] for t, i in zip(tables, ids, strict=True))
    assert_close(gather_sum(tables, ids), exact, sum(np.abs(t).max() for t in tables))
    x = normal(5, (count, width), dtype)
    expected, size = np.zeros((rows, width)), np.zeros((rows, width))
    np.add.at(expected, ids[0], x)
    np.add.at(size, ids[0], np.abs(x))
    assert_close(scatter_sum(x, ids[0], rows), expected, size)


def test_drop(isa):
    x, added = normal(0, (300, 129)), normal(1, (300, 129))
    y = drop(x, None, 0.25, 7)
    kept = y != 0
    assert abs(kept.mean() - 0.75) < 0.01
    assert np.abs(kept.mean(axis=0) - 0.75).max() < 0.15
    assert np.abs(kept.mean(axis=1) - 0.75).max() < 0.25
    np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    np.testing.assert_allclose(drop(x, added, 0.25, 7), y + added, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(drop(x, None, 0.25, 7), y)
    other = drop(x, None, 0.25, 8) != 0
    assert abs((kept & other).mean() - 0.75**2) < 0.01


def test_the_same_elements_are_dropped_by_every_instruction_set():
    x = np.ones((20, 33), np.float32)
    before = fusedattn.cpu_info()["isa"]
    found = []
    for name in fusedattn.cpu_info()["isas"]:
        _core.set_isa(name)
        found.append(drop(x, None, 0.5, 2**63 - 5))
    _core.set_isa(before)
    for y in found[1:]:
        np.testing.assert_array_equal(y, found[0])


def everything():
    """A result of each operation, large enough to be divided among threads."""
    x, w, dy = normal(0, (1031, 130)), normal(1, (200, 130)), normal(2, (1031, 200))
    sums, slope = np.empty(200, np.float32), np.empty((1031, 200), np.float32)
    results = [product(x, w.T, then="gelu", slope=slope), product(dy.T, x, row_sums=sums)]
    results += [slope, sums, product(dy[:9], w)]
    y, dx = np.empty_like(x), np.empty_like(x)
    mean, rstd = np.empty(1031, np.float32), np.empty(1031, np.float32)
    dweight, dbias = np.empty(130, np.float32), np.empty(130, np.float32)
    _core.layer_norm(x, y, w[0], w[1], mean, rstd, 1e-5)
    _core.layer_norm_backward(x, y, dx, w[0], mean, rstd, dweight, dbias)
    lse = np.empty(1031, np.float32)
    _core.log_sum_exp(x, lse)
    ids = np.random.default_rng(3).integers(0, 7, 1031)
    p, m, v = x.reshape(-1).copy(), y.reshape(-1).copy(), np.abs(dx.reshape(-1))
    _core.adamw(p, x.reshape(-1), m, v, 1.0, 0.9, 0.99, 0.1, 1.0, 1.0, 1e-8)
    results += [y, dx, dweight, dbias, lse, p, m, v, drop(x, y, 0.3, 5)]
    return [*results, scatter_sum(x, ids, 7), gather_sum([x, w], [ids, ids])]


def test_threads_do_not_change_a_bit(isa):
    before = fusedattn.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7):
        fusedattn.set_num_threads(threads)
        found.append(everything())
    fusedattn.set_num_threads(before)
    for other in found[1:]:
        for ours, first in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(ours, first)


A, B = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: product(A.astype(np.float16), B), TypeError, "^a: expected float32 or float64"),
        (lambda: product(A, B.astype(np.float64)), TypeError, "^b: expected float32, got"),
        (lambda: product(A, A), ValueError, r"^b: expected shape \(3, 3\), got \(4, 3\)"),
        (lambda: product(A, B, bias=A[0]), ValueError, r"^bias: expected shape \(5,\)"),
        (lambda: product(A[::2, ::2], B[::2]), ValueError, "^a: expected rows or columns without"),
        (lambda: product(A, B, then="sinh"), ValueError, "^then: expected 'nothing', .*'sinh'"),
        (lambda: product(A, B, then="times"), ValueError, "^slope: expected an array for 'times'"),
        (lambda: product(A, B, row_sums=A[:, 0].copy()), ValueError, "^row_sums: expected an a"),
        (
            lambda: gather_sum([A], [np.array([4])]),
            ValueError,
            r"^ids: expected values in \[0, 4\)",
        ),
        (lambda: gather_sum([A], [np.array([1], np.int32)]), TypeError, "^ids: expected int64"),
        (lambda: gather_sum([A] * 4, [np.array([1])] * 4), ValueError, "^tables: expected one to"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
