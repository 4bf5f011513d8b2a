"""Attention under the names and meanings of other libraries; each is thin and says what differs."""

from fusedattn._faces.flash import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from fusedattn._faces.jax import dot_product_attention
from fusedattn._faces.pytorch import scaled_dot_product_attention

__all__ = [
    "dot_product_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
]
