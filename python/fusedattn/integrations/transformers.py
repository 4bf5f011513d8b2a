"""The fused kernel inside the models of Hugging Face's transformers, on the CPU.

::

    from fusedattn.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="fusedattn")
"""

from __future__ import annotations

from typing import Any

from fusedattn.integrations.torch import attention

__all__ = ["register"]


def register(name: str = "fusedattn") -> None:
    """Make the kernel one of transformers' attention implementations, to train and to infer.

    Masks are those that transformers makes for PyTorch's attention, and so are the results.
    Besides, softcaps and sinks are taken, which that one refuses or ignores, and grouped heads
    are not repeated.

    Parameters
    ----------
    name : str
        What ``attn_implementation=`` is to be.

    Raises
    ------
    ImportError
        Without transformers.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError("transformers is needed: pip install transformers") from error
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **others: Any,
) -> tuple[Any, None]:
    """One attention layer, called as transformers calls its own.

    Parameters
    ----------
    module : torch.nn.Module
        Its ``is_causal`` holds where the argument is None.
    query, key, value : tensors, shape (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)
    attention_mask : tensor broadcasting to (B, H, Sq, Sk), or None
        Boolean, or numbers to be added. Without one, a causal layer sees keys 0 to i.
    dropout, scaling, softcap
        dropout_p, scale and softcap of :func:`fusedattn.attention`.
    s_aux : tensor (H,), optional
        Its sinks.
    position_bias : tensor broadcasting to (B, H, Sq, Sk), optional
        Its bias; a mask of numbers is added to it.

    Returns
    -------
    out : tensor, shape (B, Sq, H, Dv)
    weights : None, which are never formed
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    rules: dict[str, Any] = {"bias": position_bias}
    if attention_mask is None:
        rules["is_causal"] = bool(is_causal) and query.shape[2] > 1
    elif str(attention_mask.dtype) == "torch.bool":
        rules["mask"] = attention_mask
    else:
        rules["bias"] = attention_mask if position_bias is None else position_bias + attention_mask
    if rules["bias"] is not None:
        rules["bias"] = rules["bias"].to(query.dtype)
    out = attention(
        query, key, value, dropout_p=dropout, scale=scaling, softcap=softcap or 0.0, sinks=s_aux,
        **rules,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None
