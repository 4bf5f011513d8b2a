from typing import Any

from numpy.typing import NDArray

__version__: str

def attention(
    q: Any,
    k: Any,
    v: Any,
    rules: tuple[Any, ...],
    layout: Any,
    out: NDArray[Any] | None,
    num_threads: int | None,
    return_lse: bool,
) -> Any: ...
def attention_paged(
    q: Any,
    k: Any,
    v: Any,
    block_table: NDArray[Any],
    rules: tuple[Any, ...],
    layout: Any,
    out: NDArray[Any] | None,
    num_threads: int | None,
    return_lse: bool,
) -> Any: ...
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    rules: tuple[Any, ...],
    layout: Any,
    num_threads: int | None,
    need: tuple[bool, ...],
) -> tuple[Any, Any, Any, Any, Any]: ...
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    rules: tuple[Any, ...],
    out: NDArray[Any] | None,
    num_threads: int | None,
    return_lse: bool,
) -> Any: ...
def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    rules: tuple[Any, ...],
    num_threads: int | None,
    need: tuple[bool, ...],
) -> tuple[Any, Any, Any, Any, Any]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int | None) -> None: ...
def cpu_info() -> dict[str, Any]: ...
def set_isa(name: str) -> None: ...
def measure_peak(dtype: str, threads: int) -> float: ...
def measure_bandwidth(threads: int) -> float: ...
