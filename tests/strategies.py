"""What hypothesis draws: problems of every shape, stride, rule and dtype."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from tests.yardstick import Problem, compute_type

# Around the widths of vectors and tiles.
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 63, 64, 65, 127, 128, 129, 130, 197, 331)
DIMS = (1, 2, 5, 8, 15, 16, 17, 24, 32, 40, 63, 64, 65, 80, 96, 128, 130, 256)
HALVES = (np.float16, bfloat16)
DTYPES = (np.float32, np.float64, *HALVES)
HEADS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 2), (8, 1))
MEMORY = (
    "contiguous",
    "transposed",
    "reversed",
    "sliced",
    "repeated",
    "misaligned",
    "field",
    "padded",
)


def in_memory(x: np.ndarray, how: str) -> np.ndarray:
    """The values of x in another place: same shape and dtype, other strides or alignment."""
    if how == "transposed":
        return np.asarray(np.ascontiguousarray(x.T).T)
    if how == "reversed":
        flip = np.s_[..., ::-1, ::-1]
        return np.asarray(np.ascontiguousarray(x[flip])[flip])
    if how == "sliced":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), np.nan, x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "repeated":  # stride 0; the one case that changes the values
        return np.broadcast_to(x[..., :1, :], x.shape)
    if how == "misaligned":
        return np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)
    if how == "field":
        records = np.zeros(x.shape, [("tag", np.int8), ("value", x.dtype)])
        records["value"] = x
        return records["value"]
    if how == "padded":
        wide = np.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), np.nan, x.dtype)
        wide[..., 2:-1, 2:-3] = x
        return wide[..., 2:-1, 2:-3]
    return x


@st.composite
def broadcastable(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that NumPy broadcasts to this one: some axes 1, some leading ones left out."""
    kept = tuple(n if draw(st.booleans()) else 1 for n in shape)
    return kept[draw(st.integers(0, len(shape))) :]


@st.composite
def shapes(draw: Any) -> dict[str, Any]:
    """Sizes of a problem, not too large in all of them at once."""
    lead = draw(st.sampled_from([None, (), (1,), (2,), (3,), (2, 2)]))
    heads, heads_kv = (1, 1) if lead is None else draw(st.sampled_from(HEADS))
    samples = 1 if lead is None else int(np.prod(lead))
    sq, sk = (draw(st.sampled_from(LENGTHS)) for _ in range(2))
    if samples * heads * sq * sk > 200_000:
        sq = min(sq, 17)
    d, dv = (draw(st.sampled_from(DIMS)) for _ in range(2))
    dv = draw(st.sampled_from([d, dv]))
    return {"lead": lead, "h": heads, "hkv": heads_kv, "sq": sq, "sk": sk, "d": d, "dv": dv}


def make(
    sizes: dict[str, Any],
    *,
    layout: str = "bhsd",
    dtype: Any = np.float32,
    rules: dict[str, Any] | None = None,
    memory: tuple[str, ...] = ("contiguous",) * 4,
    seed: int = 0,
) -> Problem:
    """A problem of random normal numbers; ``sizes`` as `shapes` draws them."""
    rng = np.random.default_rng(seed)
    lead = sizes["lead"]

    def array(heads: int, length: int, dim: int) -> tuple[int, ...]:
        if lead is None:
            return (length, dim)
        pair = (heads, length) if layout == "bhsd" else (length, heads)
        return (*lead, *pair, dim)

    h, hkv, sq, sk, d, dv = (sizes[n] for n in ("h", "hkv", "sq", "sk", "d", "dv"))
    wanted = array(h, sq, d), array(hkv, sk, d), array(hkv, sk, dv), array(h, sq, dv)
    values = (rng.standard_normal(shape).astype(dtype) for shape in wanted)
    q, k, v, dout = (in_memory(x, how) for x, how in zip(values, memory, strict=True))
    return Problem(q, k, v, dout, rules or {}, layout)


@st.composite
def rules_for(draw: Any, sizes: dict[str, Any], dtype: Any, seed: int) -> dict[str, Any]:
    """Some rules, composed; the arrays among them of any shape that broadcasts."""
    rng = np.random.default_rng(seed)
    lead, sq, sk = sizes["lead"], sizes["sq"], sizes["sk"]
    logits = (sq, sk) if lead is None else (*lead, sizes["h"], sq, sk)
    has_batch = lead is not None and len(lead) == 1
    rules: dict[str, Any] = {}
    if draw(st.booleans()):
        rules["is_causal"] = True
        offset = draw(st.sampled_from([0, sk - sq, 1, -3, sk, -sq, 7]))
        if has_batch and draw(st.booleans()):
            rules["q_offset"] = offset + rng.integers(-4, 5, lead)
        elif offset or draw(st.booleans()):
            rules["q_offset"] = offset
    if draw(st.integers(0, 3)) == 0:
        rules["scale"] = draw(st.sampled_from([0.0, -0.5, 1.0, 3.0, 0.01]))
    if draw(st.integers(0, 2)) == 0:
        share = draw(st.sampled_from([0.03, 0.5, 0.97]))
        rules["mask"] = rng.random(draw(broadcastable(logits))) < share
    if draw(st.integers(0, 2)) == 0:
        bias = rng.standard_normal(draw(broadcastable(logits))).astype(dtype)
        if draw(st.booleans()):
            bias = np.where(rng.random(bias.shape) < 0.3, dtype(-np.inf), bias)
        rules["bias"] = bias
    if draw(st.integers(0, 3)) == 0:
        ends = st.sampled_from([-1, 0, 1, 7, 16, 64, 100])
        rules["window"] = (draw(ends), draw(ends))
    for name, length in (("q_lengths", sq), ("kv_lengths", sk)):
        if has_batch and draw(st.integers(0, 3)) == 0:
            rules[name] = rng.integers(0, length + 1, lead)
    if draw(st.integers(0, 3)) == 0:
        rules["softcap"] = draw(st.sampled_from([0.5, 3.0, 50.0]))
    heads, samples = (1, ()) if lead is None else (sizes["h"], lead)
    if draw(st.integers(0, 3)) == 0:
        each = (*samples, heads) if draw(st.booleans()) else (heads,)
        rules["alibi_slopes"] = rng.random(each).astype(draw(st.sampled_from([np.float32, dtype])))
    if draw(st.integers(0, 3)) == 0:
        rules["sinks"] = rng.standard_normal(heads).astype(
            draw(st.sampled_from([np.float32, dtype]))
        )
    if draw(st.integers(0, 3)) == 0:
        count = draw(st.integers(1, 4))
        packed = draw(st.booleans())  # ascending ids, as documents in a row have, or any
        q_ids, k_ids = (rng.integers(0, count, (*samples, n)) for n in (sq, sk))
        if packed:
            q_ids, k_ids = np.sort(q_ids), np.sort(k_ids)
        rules["segment_ids"] = k_ids if sq == sk and draw(st.booleans()) else (q_ids, k_ids)
    if draw(st.integers(0, 3)) == 0:
        rules["dropout_p"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        rules["seed"] = seed * 2**32 + seed
    return rules


@st.composite
def problems(draw: Any) -> Problem:
    """Any problem."""
    sizes = draw(shapes())
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**32 - 1))
    problem = make(
        sizes,
        layout=draw(st.sampled_from(["bhsd", "bshd"])),
        dtype=dtype,
        rules=draw(rules_for(sizes, dtype, seed)),
        memory=tuple(draw(st.sampled_from(MEMORY)) for _ in range(4)),
        seed=seed,
    )
    if draw(st.booleans()):
        rows = problem.heads_first(problem.dout).shape[:-1]
        rows = rows if sizes["lead"] is not None else rows[1:]
        dlse = np.random.default_rng(seed + 1).standard_normal(rows)
        problem.dlse = dlse.astype(compute_type(dtype))
    return problem
