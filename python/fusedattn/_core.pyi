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
    into: tuple[NDArray[Any], ...] | None,
) -> tuple[Any, Any, Any, Any, Any]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int | None) -> None: ...
def cpu_info() -> dict[str, Any]: ...
def set_isa(name: str) -> None: ...
def measure_peak(dtype: str, threads: int) -> float: ...
def measure_bandwidth(threads: int) -> float: ...

# For fusedattn.nn, fusedattn.losses and fusedattn.optim: results go to arrays that are given.

def product(
    a: NDArray[Any],
    b: NDArray[Any],
    c: NDArray[Any],
    bias: NDArray[Any] | None,
    added: NDArray[Any] | None,
    slope: NDArray[Any] | None,
    row_sums: NDArray[Any] | None,
    then: str,
) -> None: ...
def activate(y: NDArray[Any], slope: NDArray[Any], then: str) -> None: ...
def layer_norm(
    x: NDArray[Any],
    y: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    mean: NDArray[Any],
    rstd: NDArray[Any],
    eps: float,
) -> None: ...
def layer_norm_backward(
    x: NDArray[Any],
    dy: NDArray[Any],
    dx: NDArray[Any],
    weight: NDArray[Any],
    mean: NDArray[Any],
    rstd: NDArray[Any],
    dweight: NDArray[Any],
    dbias: NDArray[Any],
) -> None: ...
def adamw(
    p: NDArray[Any],
    g: NDArray[Any],
    m: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    b1: float,
    b2: float,
    rate: float,
    root: float,
    shrink: float,
    eps: float,
) -> None: ...
def log_sum_exp(x: NDArray[Any], lse: NDArray[Any]) -> None: ...
def softmax_gradient(
    x: NDArray[Any], lse: NDArray[Any], share: NDArray[Any], dx: NDArray[Any]
) -> None: ...
def gather_sum(tables: list[NDArray[Any]], ids: list[NDArray[Any]], y: NDArray[Any]) -> None: ...
def scatter_sum(
    x: NDArray[Any], order: NDArray[Any], first: NDArray[Any], rows: NDArray[Any], y: NDArray[Any]
) -> None: ...
def drop_rows(
    x: NDArray[Any],
    added: NDArray[Any] | None,
    y: NDArray[Any],
    seed: int,
    threshold: int,
    scale: float,
) -> None: ...
