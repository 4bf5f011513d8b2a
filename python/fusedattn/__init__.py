"""Fused softmax(QK^T / sqrt(d)) V and its gradients for NumPy arrays on CPUs, in linear memory."""

from fusedattn import reference
from fusedattn._attention import (
    AttentionGradients,
    attention,
    attention_backward,
    attention_vjp,
)
from fusedattn._core import __version__
from fusedattn._faces import (
    dot_product_attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
)
from fusedattn._kvcache import KVCache, attention_with_kvcache
from fusedattn._runtime import cpu_info, get_num_threads, set_num_threads
from fusedattn._states import merge_attention_states, merge_attention_states_backward
from fusedattn._varlen import attention_varlen, attention_varlen_backward

__all__ = [
    "AttentionGradients",
    "KVCache",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_vjp",
    "attention_with_kvcache",
    "cpu_info",
    "dot_product_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_num_threads",
    "merge_attention_states",
    "merge_attention_states_backward",
    "reference",
    "scaled_dot_product_attention",
    "set_num_threads",
]
