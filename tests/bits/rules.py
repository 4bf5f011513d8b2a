"""One call of attention: its sizes and its arrays, and every rule by a name."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.bits.draw import Draw, in_memory

Options = dict[str, Any]
KEPT = list(itertools.product([False, True], repeat=4))


@dataclass
class Call:
    """The sizes of one call, and how it is made; ``rules`` are names in RULES."""

    sq: int
    sk: int
    d: int
    dtype: np.dtype
    rules: tuple[str, ...] = ()
    b: int = 1
    h: int = 2
    hkv: int = 1
    dv: int = 0  # 0 is d
    layout: str = "bhsd"
    memory: tuple[str, ...] = ("contiguous",) * 4
    num_threads: int = 1
    reach: float = 2.0
    seed: int = 0
    odd: tuple[str, float] | None = None  # an array, and what some of its elements are
    drawn: Draw = field(init=False)

    def __post_init__(self) -> None:
        self.dv = self.dv or self.d
        self.drawn = Draw(self.seed, self.sq, self.sk, self.d)

    def broadcast(self, kept: tuple[bool, ...]) -> tuple[int, ...]:
        """The logits' shape with the axes that are not kept as 1."""
        whole = (self.b, self.h, self.sq, self.sk)
        return tuple(n if keep else 1 for n, keep in zip(whole, kept, strict=True))

    def arrays(self) -> list[np.ndarray]:
        """q, k, v and dout."""
        queries, keys = (self.h, self.sq), (self.hkv, self.sk)
        rows = (*queries, self.d), (*keys, self.d), (*keys, self.dv), (*queries, self.dv)
        arrays = []
        for name, (heads, length, dim), how in zip("qkvo", rows, self.memory, strict=True):
            pair = (heads, length) if self.layout == "bhsd" else (length, heads)
            x = self.drawn.numbers((self.b, *pair, dim), self.dtype, self.reach)
            if self.odd is not None and self.odd[0] == name:
                x.reshape(-1)[:: max(7, x.size // 5)] = self.odd[1]
            arrays.append(in_memory(x, how))
        return arrays

    def options(self) -> Options:
        """The rules as keyword arguments, ``dlse`` among them where there is one."""
        options: Options = {}
        for rule in self.rules:
            options |= RULES[rule](self)
        if self.odd is not None and self.odd[0] == "bias" and "bias" in options:
            bias = options["bias"].reshape(-1)
            bias[:: max(7, bias.size // 5)] = self.odd[1]
        return options


Rule = Callable[[Call], Options]


def mask(kept: tuple[bool, ...], share: float) -> Rule:
    return lambda c: {"mask": c.drawn.chance(share, c.broadcast(kept))}


def bias(kept: tuple[bool, ...], masked: float = 0.0) -> Rule:
    def rule(c: Call) -> Options:
        x = c.drawn.numbers(c.broadcast(kept), c.dtype)
        if masked:
            x[c.drawn.chance(masked, x.shape)] = -np.inf
        return {"bias": x}

    return rule


def mask_in_blocks(c: Call) -> Options:
    """Whole blocks of pairs that see nothing or everything, as sparse attention has them."""
    blocks = c.drawn.chance(0.5, (c.b, 1, -(-c.sq // 32), -(-c.sk // 32)))
    wide = blocks.repeat(32, axis=2).repeat(32, axis=3)
    return {"mask": np.ascontiguousarray(wide[:, :, : c.sq, : c.sk])}


def segments(kind: str) -> Rule:
    def rule(c: Call) -> Options:
        q, k = (c.drawn.below(3, (c.b, n)) for n in (c.sq, c.sk))
        if kind == "contiguous":
            q, k = np.sort(q), np.sort(k)
        return {"segment_ids": k if c.sq == c.sk else (q, k)}

    return rule


def lengths(*names: str) -> Rule:
    def rule(c: Call) -> Options:
        sizes = {"q_lengths": c.sq, "kv_lengths": c.sk}
        return {name: c.drawn.below(sizes[name] + 1, (c.b,)) for name in names}

    return rule


def slopes(each: bool, own: bool) -> Rule:
    def rule(c: Call) -> Options:
        shape = (c.b, c.h) if each else (c.h,)
        return {"alibi_slopes": abs(c.drawn.numbers(shape, c.dtype if own else np.float32, 0.5))}

    return rule


def sinks(own: bool) -> Rule:
    return lambda c: {"sinks": c.drawn.numbers((c.h,), c.dtype if own else np.float32)}


def dlse(c: Call) -> Options:
    real = np.float64 if c.dtype == np.float64 else np.float32
    return {"dlse": c.drawn.numbers((c.b, c.h, c.sq), real)}


def always(**rules: Any) -> Rule:
    return lambda c: dict(rules)


def kept_name(kept: tuple[bool, ...]) -> str:
    return "".join(letter if keep else "1" for letter, keep in zip("bhqk", kept, strict=True))


# By family: those of one family exclude each other, those of two compose.
FAMILIES: dict[str, dict[str, Rule]] = {
    "causal": {
        "causal": always(is_causal=True),
        "causal from the end": lambda c: {"is_causal": True, "q_offset": c.sk - c.sq},
        "causal + 7": always(is_causal=True, q_offset=7),
        "causal - 5": always(is_causal=True, q_offset=-5),
        "causal each": lambda c: {"is_causal": True, "q_offset": c.drawn.below(99, (c.b,)) - 30},
    },
    "window": {
        f"window {left} {right}": always(window=(left, right))
        for left, right in ((0, 0), (7, 3), (-1, 5), (20, -1), (64, 64), (1, 100))
    },
    "lengths": {
        "q lengths": lengths("q_lengths"),
        "kv lengths": lengths("kv_lengths"),
        "lengths": lengths("q_lengths", "kv_lengths"),
        "no keys": always(kv_lengths=0),
    },
    "segments": {f"segments {kind}": segments(kind) for kind in ("contiguous", "scattered")},
    "mask": {
        **{f"mask {kept_name(kept)}": mask(kept, 0.5) for kept in KEPT},
        "mask sparse": mask((True, True, True, True), 0.03),
        "mask dense": mask((True, False, True, True), 0.97),
        "mask keys dense": mask((True, False, False, True), 0.9),
        "mask blocks": mask_in_blocks,
    },
    "bias": {
        **{f"bias {kept_name(kept)}": bias(kept) for kept in KEPT},
        "bias masks": bias((True, True, True, True), 0.3),
        "bias masks keys": bias((False, False, False, True), 0.3),
    },
    "softcap": {f"softcap {n}": always(softcap=n) for n in (0.5, 3.0, 50.0)},
    "alibi": {
        "alibi": slopes(False, False),
        "alibi own": slopes(False, True),
        "alibi each": slopes(True, False),
    },
    "sinks": {"sinks": sinks(False), "sinks own": sinks(True)},
    "dropout": {f"dropout {p}": always(dropout_p=p, seed=2**40 + 5) for p in (0.1, 0.5, 0.9)},
    "scale": {f"scale {n}": always(scale=n) for n in (0.0, -0.5, 3.0, 100.0, 2.0**-30)},
    "dlse": {"dlse": dlse},
}
RULES: dict[str, Rule] = {name: rule for f in FAMILIES.values() for name, rule in f.items()}
