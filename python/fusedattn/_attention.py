"""The public attention functions: convert, check each argument in order, call the core.

Shapes are written with the field's letters: B batch, H query heads, Hkv key/value heads, Sq and Sk
query and key lengths, D head dimension of q and k, Dv of v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from fusedattn import _core
from fusedattn._rules import rules_of, takes_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._rules import RuleKeywords

Array = NDArray[Any]


class AttentionGradients(NamedTuple):
    """Gradients of attention; ``None`` for what was not asked for."""

    dq: Array | None
    dk: Array | None
    dv: Array | None
    dbias: Array | None
    dsinks: Array | None


GRADIENTS = ("q", "k", "v", "bias", "sinks")


def needs_of(need: Sequence[str]) -> tuple[bool, bool, bool, bool, bool]:
    """Whether each of `GRADIENTS` is needed."""
    if isinstance(need, str):
        need = (need,)
    for name in need:
        if name not in GRADIENTS:
            raise ValueError(f"need: expected names among {GRADIENTS}, got {name!r}")
    return ("q" in need, "k" in need, "v" in need, "bias" in need, "sinks" in need)


@takes_rules
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "bhsd",
    out: Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
    **rules: Unpack[RuleKeywords],
) -> Any:
    """Softmax attention, ``softmax(scale * q @ k^T + bias) @ v``, without the score matrix.

    Online softmax in tiles (Milakov and Gimelshein, 2018; Dao et al., *FlashAttention*, 2022). The
    logits are ``s_ij = scale * (q_i . k_j)``, then softcap, ALiBi and bias in this order, minus
    infinity where a rule forbids the pair (i, j); the softmax runs over j. Scratch memory is linear
    in the lengths. B below is the number of samples, the product of the leading dimensions.

    Parameters
    ----------
    q : array, shape (..., H, Sq, D), or (..., Sq, H, D) with ``layout="bshd"``
        Queries, float32, float64, float16 or bfloat16 (ml_dtypes); NumPy or anything with
        ``__array__`` or DLPack on the CPU. Any number of leading dimensions, any strides; (S, D) is
        a single head.
    k : array, shape (..., Hkv, Sk, D) or (..., Sk, Hkv, D)
        Keys. Hkv divides H: query head h reads key/value head ``h // (H // Hkv)``.
    v : array, shape (..., Hkv, Sk, Dv) or (..., Sk, Hkv, Dv)
        Values.
    **rules
        See `fusedattn._rules.Rules`.
    layout : {"bhsd", "bshd"}, default "bhsd"
    out : array, optional
        Where to write the result: shape and dtype of the result, memory of its own, any strides.
    num_threads : int, optional
        Default :func:`get_num_threads`. Results do not depend on it.
    return_lse : bool, default False
        Return the log-sum-exp as well.

    Returns
    -------
    out : array, shape of q with Dv in place of D
        0 for a query that sees no key.
    lse : array, shape (..., H, Sq), only with ``return_lse=True``
        Natural-log sum of exp of the logits, the sink's included; minus infinity for a query that
        sees no key.

    Raises
    ------
    TypeError, ValueError
        Wrong input; the message names the argument, what was expected and what came. Nothing is
        written to `out`.

    Notes
    -----
    NaN and infinity in a slot that is allowed propagate; what lies in a masked slot of k, v or
    bias, even NaN, reaches nothing. The bits are the same for any number of threads, alone or in a
    batch, padded or packed; in float32 and float64 also with AVX2, AVX-512 and NEON, not with AMX.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 2, 3, 4), dtype=np.float32)
    >>> attention(x, x, x, is_causal=True).shape
    (1, 2, 3, 4)
    """
    drawn = rules_of(rules).drawn()
    return _core.attention(q, k, v, drawn, layout, out, num_threads, return_lse)


@takes_rules
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    layout: str = "bhsd",
    dlse: Any = None,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
    **rules: Unpack[RuleKeywords],
) -> AttentionGradients:
    """Gradients of :func:`attention`, recomputing the probabilities from the log-sum-exp.

    With ``P = exp(S - lse)``, ``dP = dout v^T`` and ``delta = rowsum(dout * out)``:
    ``dS = P * (dP - delta)``, ``dv = P^T dout``, ``dq = scale * dS k``, ``dk = scale * dS^T q``,
    ``dbias = dS`` summed over the axes along which the bias was broadcast (Dao et al., 2022). With
    dropout P is the kept and scaled one, but in ``dS``; with a softcap, ``dS`` times
    ``1 - tanh**2`` gives dq and dk; dlse is taken from delta; ``dsinks = -sum_i exp(sink - lse_i)
    * delta_i``.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of a scalar by the output.
    q, k, v : arrays
        As given to :func:`attention`, and likewise every rule.
    out, lse : arrays
        As :func:`attention` returned them with ``return_lse=True``.
    need : sequence of {"q", "k", "v", "bias", "sinks"}, default ("q", "k", "v")
        Which gradients to compute.
    dlse : array, shape of lse, optional
        Gradient of the scalar by lse; default 0.

    Returns
    -------
    AttentionGradients
        Named tuple (dq, dk, dv, dbias, dsinks) of arrays shaped and typed like the inputs; what
        `need` does not name is None. A query that sees no key has gradient 0.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.
    """
    gradients = _core.attention_backward(
        dout, q, k, v, out, lse, dlse, rules_of(rules), layout, num_threads, needs_of(need)
    )
    return AttentionGradients(*gradients)


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
    **rules: Any,
) -> tuple[Array, Callable[..., AttentionGradients]]:
    """Attention and its vector-Jacobian product.

    Parameters
    ----------
    q, k, v, num_threads, **rules
        As in :func:`attention`; `out` and `return_lse` have no meaning here.
    need : sequence of {"q", "k", "v", "bias", "sinks"}, default ("q", "k", "v")
        Which gradients `vjp` computes.

    Returns
    -------
    out : array
    vjp : function
        ``vjp(dout, dlse=None)`` gives the :class:`AttentionGradients` of ``sum(dout * out) +
        sum(dlse * lse)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.
    """
    for name in ("out", "return_lse"):
        if name in rules:
            raise TypeError(f"{name}: not an argument of attention_vjp")
    needs = needs_of(need)
    layout = rules.pop("layout", "bhsd")
    drawn = rules_of(rules).drawn()
    out, lse = _core.attention(q, k, v, drawn, layout, num_threads=num_threads, return_lse=True)

    def vjp(dout: Any, dlse: Any = None) -> AttentionGradients:
        gradients = _core.attention_backward(
            dout, q, k, v, out, lse, dlse, drawn, layout, num_threads, needs
        )
        return AttentionGradients(*gradients)

    return out, vjp
