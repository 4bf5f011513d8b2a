"""Calls of attention: by size, by rule, by place in memory, drawn; packed, cached and merged."""

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

import fusedattn
from tests.bits.draw import DTYPES, MEMORY, Draw, in_memory
from tests.bits.rules import FAMILIES, RULES, Call, Options

Results = dict[str, np.ndarray]
Case = tuple[str, Callable[[], Results]]

# One less, one more and as many as fill vectors, tiles and blocks.
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257)
DIMS = (1, 8, 16, 33, 40, 64, 80, 96, 128)


def call(c: Call) -> Results:
    """Forward and backward, all gradients."""
    q, k, v, dout = c.arrays()
    rules = c.options()
    outer = rules.pop("dlse", None)
    given: Options = {"layout": c.layout, "num_threads": c.num_threads}
    out, lse = fusedattn.attention(q, k, v, return_lse=True, **given, **rules)
    need = ["q", "k", "v", *(name for name in ("bias", "sinks") if name in rules)]
    grads = fusedattn.attention_backward(
        dout, q, k, v, out, lse, dlse=outer, need=need, **given, **rules
    )
    found = {name: x for name, x in grads._asdict().items() if x is not None}
    return {"out": out, "lse": lse, **found}


def by_size() -> Iterator[Case]:
    pairs = list(itertools.product(LENGTHS, DIMS))
    for n, ((s, d), (dtype, kind)) in enumerate(itertools.product(pairs, DTYPES.items())):
        other = LENGTHS[(n * 5) % len(LENGTHS)] if n % 3 == 0 else s
        c = Call(s, other, d, kind, h=1 + n % 2, hkv=1, layout=("bhsd", "bshd")[n // 2 % 2])
        c.dv = (d, d, DIMS[(n * 7) % len(DIMS)])[n % 3]
        c.num_threads = (1, 3)[n // 4 % 2]
        c.rules = (("causal",), (), ())[n % 3]
        yield f"sizes/{dtype}/{s} {other} {d} {c.dv}", functools.partial(call, c)


def by_rule() -> Iterator[Case]:
    shapes = ((2, 4, 2, 33, 65, 40), (2, 2, 1, 129, 131, 64), (3, 4, 1, 3, 140, 32))
    for rule, (dtype, kind) in itertools.product(RULES, DTYPES.items()):
        for n, (b, h, hkv, sq, sk, d) in enumerate(shapes):
            c = Call(sq, sk, d, kind, (rule,), b, h, hkv, layout=("bhsd", "bshd", "bhsd")[n])
            c.num_threads = (1, 3)[n % 2]
            yield f"rules/{dtype}/{rule} {sq} {sk}", functools.partial(call, c)


def by_memory() -> Iterator[Case]:
    for how, (dtype, kind), n in itertools.product(MEMORY, DTYPES.items(), range(6)):
        sq, sk, d = ((65, 97, 64), (40, 40, 33), (2, 100, 48))[n % 3]
        memory = (how,) * 4 if n < 3 else ("contiguous", how, how, "contiguous")
        c = Call(sq, sk, d, kind, ("causal from the end",), 2, 4, 2, memory=memory)
        c.layout = ("bhsd", "bshd")[n % 2]
        yield f"memory/{dtype}/{how} {n}", functools.partial(call, c)


def few_queries() -> Iterator[Case]:
    rules = [(), ("causal from the end",), ("softcap 3.0",), ("kv lengths", "alibi"), ("sinks",)]
    turns = itertools.product((1, 2, 4, 5, 8), (16, 40, 64, 128), DTYPES.items(), (17, 130, 515))
    for n, (sq, d, (dtype, kind), sk) in enumerate(turns):
        c = Call(sq, sk, d, kind, rules[n % 5], h=(1, 4, 8, 6)[n // 5 % 4], layout="bshd")
        c.hkv = (1, 2)[c.h % 2 == 0 and n % 3 == 0]
        c.num_threads = (1, 3)[n // 7 % 2]
        name = " ".join((*c.rules, f"{c.h} {c.hkv} {sq} {sk} {d}"))
        yield f"few queries/{dtype}/{name}", functools.partial(call, c)


def by_need() -> Iterator[Case]:
    """Some of the gradients alone, other leading axes, and results written into given memory."""
    needs = ["q", "k", "v", "bias", "sinks", "k v", "q bias", "q k v"]
    for need, (dtype, kind), sq in itertools.product(needs, DTYPES.items(), (2, 70)):
        for rules in ((), ("softcap 3.0", "window 20 -1")):
            rules = (*rules, *(r for r in ("bias bhqk", "sinks") if r.split()[0] in need))
            c = Call(sq, 100, 40, kind, rules, 2, 4, 2, dv=24)
            yield f"need/{dtype}/{need} {sq} {len(rules)}", functools.partial(call_some, c, need)


def call_some(c: Call, need: str) -> Results:
    q, k, v, dout = c.arrays()
    rules = c.options()
    if need == "k v":  # one head, no leading axes
        q, k, v, dout = (x[0, 0] for x in (q, k, v, dout))
    if need == "q k v":  # two leading axes
        q, k, v, dout = (x[None] for x in (q, k, v, dout))
    given = in_memory(np.empty(dout.shape, dout.dtype), "transposed")
    out, lse = fusedattn.attention(q, k, v, out=given, return_lse=True, **rules)
    grads = fusedattn.attention_backward(dout, q, k, v, out, lse, need=need.split(), **rules)
    found = {name: x for name, x in grads._asdict().items() if x is not None}
    return {"out": out, "lse": lse, **found}


def long() -> Iterator[Case]:
    """Several blocks of keys and of queries of every kernel, in both directions."""
    rules = (
        (),
        ("causal",),
        ("causal from the end", "window 64 64"),
        ("mask b1qk",),
        ("mask blocks", "softcap 50.0"),
        ("mask keys dense", "alibi each"),
        ("bias bhqk",),
        ("bias masks keys", "dropout 0.1"),
        ("bias 11q1", "segments contiguous"),
        ("segments scattered", "sinks"),
        ("lengths", "softcap 3.0", "dlse"),
        ("causal - 5", "bias 1h1k", "dropout 0.5"),
    )
    shapes = ((600, 600), (290, 1190), (1100, 300), (1, 2500), (8, 2300), (16, 1400))
    turns = itertools.product(shapes, rules, DTYPES.items())
    for n, ((sq, sk), names, (dtype, kind)) in enumerate(turns):
        d = (64, 40, 128, 64, 96, 33, 80)[n // 4 % 7]
        c = Call(sq, sk, d, kind, names, 1, 2 if sq < 99 else 1, 1, num_threads=(1, 3)[n // 4 % 2])
        c.layout = ("bhsd", "bshd")[n // 8 % 2]
        yield f"long/{dtype}/{sq} {sk} {d} {' '.join(names)}", functools.partial(call, c)


def drawn() -> Iterator[Case]:
    """Rules of two to four families at once, in any sizes, heads and memory."""
    for n in range(700):
        draw = Draw(14, n)
        dtype = draw.pick(list(DTYPES))
        chosen = [f for f in FAMILIES if draw.chance(0.3)] or ["causal", "bias"]
        rules = tuple(draw.pick(list(FAMILIES[f])) for f in chosen[:5])
        h, hkv = draw.pick([(1, 1), (2, 1), (3, 3), (4, 2)])
        sq, sk = draw.pick(LENGTHS), draw.pick(LENGTHS)
        c = Call(sq, sk, draw.pick(DIMS), DTYPES[dtype], rules, 1 + draw.below(2), h, hkv, seed=n)
        c.dv = draw.pick((c.d, c.d, draw.pick(DIMS)))
        c.layout = draw.pick(("bhsd", "bshd"))
        c.memory = tuple(draw.pick(MEMORY) for _ in range(4))
        c.num_threads = draw.pick((1, 3))
        c.reach = draw.pick((2.0, 2.0, 2.0, 2.0**-4, 2.0**5))
        yield f"drawn/{dtype}/{n} {' '.join(rules)}", functools.partial(call, c)


def odd_numbers() -> Iterator[Case]:
    """NaN, infinities, huge and subnormal numbers."""
    numbers = (np.nan, np.inf, -np.inf)
    places = ("q", "k", "v", "o", "bias")
    for (dtype, kind), name, number in itertools.product(DTYPES.items(), places, numbers):
        for sq, rules in ((40, ("bias bhqk",)), (2, ("bias bhqk", "mask keys dense"))):
            c = Call(sq, 70, 40, kind, rules, 2, 2, 1, odd=(name, number))
            yield f"odd/{dtype}/{name} {number} {sq}", functools.partial(call, c)
    for (dtype, kind), power in itertools.product(DTYPES.items(), (-130, -60, -14, 7, 14, 60)):
        if kind.itemsize > 2 or abs(power) < 20:
            for sq in (2, 65):
                c = Call(sq, 65, 24, kind, reach=2.0**power)
                yield f"odd/{dtype}/reach {power} {sq}", functools.partial(call, c)


ROWS = ([5, 0, 33, 1, 64], [17], [130, 3, 1, 1, 40, 16])


def packed() -> Iterator[Case]:
    names = [rule for f in FAMILIES for rule in list(FAMILIES[f])[:: 5 if f in "mask bias" else 2]]
    for n, (rule, (dtype, kind)) in enumerate(itertools.product(names, DTYPES.items())):
        case = functools.partial(call_packed, rule, kind, ROWS[n // 4 % 3], n)
        yield f"packed/{dtype}/{rule}", case


def call_packed(rule: str, kind: np.dtype, rows: list[int], n: int) -> Results:
    cu = np.concatenate([[0], np.cumsum(rows)])
    h, hkv, d, total, longest = 4, (4, 2)[n % 2], (16, 64, 40)[n % 3], int(cu[-1]), max(rows)
    c = Call(longest, longest, d, kind, (rule,), len(rows), h, hkv, seed=n)
    rules = c.options()
    if "segment_ids" in rules:
        rules["segment_ids"] = c.drawn.below(3, (total,))
    for name in {"q_lengths", "kv_lengths"} & rules.keys():
        rules[name] = np.minimum(rules[name], rows)
    outer = rules.pop("dlse", None)
    outer = outer if outer is None else c.drawn.numbers((h, total), outer.dtype)
    if n % 2:  # views of one projection, as self-attention has them
        whole = c.drawn.numbers((total, 2 * hkv + h, d), kind)
        q, k, v = whole[:, :h], whole[:, h : h + hkv], whole[:, h + hkv :]
    else:
        q, k, v = (c.drawn.numbers((total, heads, d), kind) for heads in (h, hkv, hkv))
    dout = c.drawn.numbers((total, h, d), kind)
    into = None
    given: Options = {"num_threads": (1, 3)[n // 2 % 2]}
    if n % 2:
        place = np.empty((total, 2 * hkv + h, d), kind)
        into = (place[:, :h], place[:, h : h + hkv], place[:, h + hkv :])
    need = ["q", "k", "v", *(name for name in ("bias", "sinks") if name in rules)]
    out, lse = fusedattn.attention_varlen(q, k, v, cu, cu, return_lse=True, **given, **rules)
    grads = fusedattn.attention_varlen_backward(
        dout, q, k, v, out, lse, cu, cu, dlse=outer, need=need, into=into, **given, **rules
    )
    found = {name: x for name, x in grads._asdict().items() if x is not None}
    return {"out": out, "lse": lse, **found}


def cached() -> Iterator[Case]:
    names = ["", "window 7 3", "softcap 3.0", "alibi", "sinks", "scale 3.0"]
    turns = itertools.product(names, DTYPES.items(), (None, 16), ("bhsd", "bshd"))
    for n, (rule, (dtype, kind), page, layout) in enumerate(turns):
        case = functools.partial(call_cached, rule, kind, page, layout, (64, 40, 128)[n % 3])
        yield f"cache/{dtype}/{rule} {page} {layout}", case


def call_cached(rule: str, kind: np.dtype, page: int | None, layout: str, d: int) -> Results:
    """A prompt of unequal lengths, a piece of one, and two single tokens."""
    cache = fusedattn.KVCache(3, 96, 2, d, dtype=kind, page_size=page, layout=layout)
    results: Results = {}
    draw = Draw(d, 5)
    for step, rows in enumerate((40, 7, 1, 1)):
        c = Call(rows, rows, d, kind, (rule,) if rule else (), 3, 4, 2, layout=layout, seed=step)
        q, k, v, _ = c.arrays()
        counts = draw.below(rows + 1, (3,)) if step < 2 else None
        out, lse = fusedattn.attention_with_kvcache(
            q, cache, k=k, v=v, q_lengths=counts, return_lse=True, **c.options()
        )
        results |= {f"out {step}": out, f"lse {step}": lse}
    return results


def merged() -> Iterator[Case]:
    turns = itertools.product(DTYPES.items(), ("bhsd", "bshd"), (1, 2, 5), (False, True))
    for (dtype, kind), layout, parts, empty in turns:
        case = functools.partial(call_merged, kind, layout, parts, empty)
        yield f"merge/{dtype}/{layout} {parts} {empty}", case


def call_merged(kind: np.dtype, layout: str, parts: int, empty: bool) -> Results:
    draw = Draw(parts, 3)
    real = np.float64 if kind == np.float64 else np.float32
    shape = (2, 3, 17, 24) if layout == "bhsd" else (2, 17, 3, 24)
    outs = [draw.numbers(shape, kind) for _ in range(parts)]
    lses = [draw.numbers((2, 3, 17), real, 8.0) for _ in range(parts)]
    if empty:
        for lse in lses:
            lse[draw.chance(0.4, lse.shape)] = -np.inf
    out, lse = fusedattn.merge_attention_states(outs, lses, layout=layout)
    douts, dlses = fusedattn.merge_attention_states_backward(
        draw.numbers(shape, kind), draw.numbers(lse.shape, real), outs, lses, layout=layout
    )
    return {"out": out, "lse": lse, "douts": np.stack(douts), "dlses": np.stack(dlses)}


def cases() -> Iterator[Case]:
    yield from itertools.chain(by_size(), by_rule(), by_memory(), few_queries(), by_need(), long())
    yield from itertools.chain(drawn(), odd_numbers(), packed(), cached(), merged())
