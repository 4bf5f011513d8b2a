"""Keys and values kept from call to call, and attention to them."""

from fusedattn._kvcache.attend import attention_with_kvcache
from fusedattn._kvcache.cache import KVCache

__all__ = ["KVCache", "attention_with_kvcache"]
