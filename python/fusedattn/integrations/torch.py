"""Attention for PyTorch's tensors on the CPU, differentiable, with every rule.

Tensors share their memory with the kernel; none is copied, bfloat16 included.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import fusedattn

__all__ = ["attention"]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    bias: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    **rules: Any,
) -> Any:
    """`fusedattn.attention` of tensors, with a graph behind its results.

    Parameters
    ----------
    q, k, v : tensors on the CPU, shape (..., H, Sq, D), (..., Hkv, Sk, D), (..., Hkv, Sk, Dv)
        Or as `layout` says; float32, float64, float16 or bfloat16.
    bias, sinks : tensors, optional
        They get gradients as q, k and v do, if they ask for them.
    dropout_p, seed
        Without a seed, PyTorch's own generator gives one, so that ``torch.manual_seed`` decides.
    return_lse : bool
        Also return the log-sum-exp, through which gradients flow too.
    **rules
        Any other argument of :func:`fusedattn.attention` but `out`; arrays as tensors or NumPy's.

    Returns
    -------
    out : tensor of q's dtype
    lse : tensor, only with ``return_lse=True``

    Raises
    ------
    ImportError
        Without torch.
    TypeError, ValueError
        As :func:`fusedattn.attention`.
    """
    torch, function = _torch()
    if "out" in rules:
        raise TypeError("out: not an argument here, the result is a new tensor")
    if dropout_p and seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    arrays = {name: _as_numpy(x) for name, x in rules.items()}
    options = arrays | {"dropout_p": dropout_p, "seed": seed}
    out, lse = function.apply(q, k, v, bias, sinks, options)
    return (out, lse) if return_lse else out


@functools.cache
def _torch() -> tuple[Any, Any]:
    """The module, and attention as one of its differentiable functions."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("torch is needed: see https://pytorch.org") from error

    class Attention(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, sinks: Any, rules: Any) -> Any:
            results = fusedattn.attention(
                _as_numpy(q), _as_numpy(k), _as_numpy(v), bias=_as_numpy(bias),
                sinks=_as_numpy(sinks), return_lse=True, **rules,
            )  # fmt: skip
            out, lse = (_as_tensor(torch, x) for x in results)
            ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
            ctx.rules = rules
            return out, lse

        @staticmethod
        def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
            q, k, v, bias, sinks, out, lse = (_as_numpy(x) for x in ctx.saved_tensors)
            names = ("q", "k", "v", "bias", "sinks")
            need = [
                name for name, wanted in zip(names, ctx.needs_input_grad, strict=False) if wanted
            ]
            grads = fusedattn.attention_backward(
                _as_numpy(dout), q, k, v, out, lse, bias=bias, sinks=sinks, dlse=_as_numpy(dlse),
                need=need, **ctx.rules,
            )  # fmt: skip
            return *(_as_tensor(torch, x) for x in grads), None

    return torch, Attention


def _as_numpy(x: Any) -> Any:
    """A tensor's memory as an array; tuples likewise; what is no tensor stays."""
    if isinstance(x, tuple):
        return tuple(map(_as_numpy, x))
    if not hasattr(x, "detach"):
        return x
    x = x.detach()
    if str(x.dtype) != "torch.bfloat16":
        return x.numpy()
    from ml_dtypes import bfloat16

    return x.view(_torch()[0].int16).numpy().view(bfloat16)


def _as_tensor(torch: Any, x: Any) -> Any:
    """An array's memory as a tensor."""
    if x is None:
        return None
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
