"""The rules of attention by name: which keys a query sees, and what becomes of its logits.

`Rules` is built once, where a public function is called, and passed on as it is; the core reads it
by attribute name. A new rule is a line in `Rules`, its text in the docstring, and a line in
`RuleKeywords`; every public signature and docstring follows. What a rule means is the kernel's to
say, and the oracle's; nothing here looks at values.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict, TypeVar

from numpy.typing import ArrayLike

F = TypeVar("F", bound=Callable[..., Any])


class Rules(NamedTuple):
    """All rules of one call.

    Frozen, with defaults, read by name: a named tuple and no frozen dataclass, whose ``__init__``
    takes four microseconds for these fields, as long as a whole call of a small attention.

    Parameters
    ----------
    mask : boolean array, optional
        True where query i may see key j; broadcasts to (..., H, Sq, Sk) in either layout and is
        never expanded in memory.
    bias : array of q's dtype, optional
        Added to the logits; broadcasts as `mask` does. An entry of minus infinity masks.
    is_causal : bool, default False
        Query i sees keys ``j <= i + q_offset`` only.
    q_offset : int or integer array of shape (B,), default 0
        Position of the first query among the keys. 0 aligns top-left (PyTorch, JAX, ONNX),
        ``Sk - Sq`` bottom-right (FlashAttention).
    window : (left, right), optional
        Query i sees keys from ``p - left`` to ``p + right`` only, ends included, where
        ``p = i + q_offset``; -1 is no end. With `is_causal`, right is at most 0.
    scale : float, optional
        Default ``1 / sqrt(D)``.
    softcap : float, default 0
        If positive, logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, 2024).
    alibi_slopes : float array of shape (H,) or (B, H), optional
        Logits fall by ``slope * |i + q_offset - j|`` (Press et al., *ALiBi*, 2022).
    sinks : float array of shape (H,), optional
        A logit for each head that joins the sum of its softmax, and the LSE, but has no value
        (Xiao et al., *Attention sinks*, 2024).
    q_lengths : int or integer array of shape (B,), optional
        Queries at and beyond this position are padding: out 0, LSE minus infinity, gradients 0.
        Default Sq.
    kv_lengths : int or integer array of shape (B,), optional
        Keys at and beyond this position are padding. Default Sk.
    segment_ids : integer array of shape (B, S), or a pair ((B, Sq), (B, Sk)), optional
        A query sees the keys whose number equals its own: documents packed in one row.
    dropout_p : float, default 0
        Each probability is dropped with this probability; what is kept is divided by
        ``1 - dropout_p``. It counts to the nearest multiple of 2**-16. Philox4x32-10 (Salmon et
        al., 2011) keyed by seed, sample, head, query and key decides:
        :func:`fusedattn.reference.dropout_mask` gives the same mask.
    seed : int, optional
        From 0 to 2**64 - 1; by default a fresh one, which leaves no way to the gradients but
        :func:`attention_vjp`.
    """

    mask: Any = None
    bias: Any = None
    is_causal: bool = False
    q_offset: int | ArrayLike = 0
    window: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Any = None
    sinks: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    segment_ids: Any = None
    dropout_p: float = 0.0
    seed: int | None = None

    def drawn(self) -> Rules:
        """The same with a fresh seed where dropout wants one and none was given."""
        if self.seed is not None or not self.dropout_p:
            return self
        return self._replace(seed=int.from_bytes(os.urandom(8), "little"))


class RuleKeywords(TypedDict, total=False):
    """The fields of `Rules` as keyword arguments, for type checkers and editors."""

    mask: Any
    bias: Any
    is_causal: bool
    q_offset: int | ArrayLike
    window: tuple[int, int] | None
    scale: float | None
    softcap: float
    alibi_slopes: Any
    sinks: Any
    q_lengths: Any
    kv_lengths: Any
    segment_ids: Any
    dropout_p: float
    seed: int | None


NO_RULES = Rules()


def rules_of(given: Mapping[str, Any]) -> Rules:
    """Rules from keyword arguments; TypeError for one that is none."""
    if not given:
        return NO_RULES
    try:
        return Rules(**given)
    except TypeError:
        unknown = ", ".join(name for name in given if name not in Rules._fields)
        names = ", ".join(Rules._fields)
        raise TypeError(
            f"{unknown}: expected an argument of the function or a rule ({names}), got neither"
        ) from None


def takes_rules(function: F) -> F:
    """Show ``**rules`` for what they are: one keyword each in the signature, before the others.

    A paragraph ``**rules`` of the docstring becomes that of `Rules`.
    """
    signature = inspect.signature(function)
    *others, rules = signature.parameters.values()
    at = sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in others)
    keywords = [
        rules.replace(
            name=name,
            kind=inspect.Parameter.KEYWORD_ONLY,
            default=Rules._field_defaults[name],
            annotation=getattr(written, "__forward_arg__", written),
        )
        for name, written in Rules.__annotations__.items()
    ]
    signature = signature.replace(parameters=[*others[:at], *keywords, *others[at:]])
    function.__signature__ = signature  # type: ignore[attr-defined]
    if function.__doc__ and Rules.__doc__:  # both are left out by python -OO
        text = inspect.cleandoc(Rules.__doc__).partition("----------\n")[2]
        function.__doc__ = re.sub(
            r"^\*\*rules\n(    .*\n)+", lambda _: text + "\n", inspect.cleandoc(function.__doc__),
            flags=re.MULTILINE,
        )  # fmt: skip
    return function
