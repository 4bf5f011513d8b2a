"""The C++ core of fusedattn; the public functions are in the package."""

from typing import Any, Literal, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from fusedattn._rules import Rules

class _HasArray(Protocol):
    def __array__(self) -> NDArray[Any]: ...

class _HasDLPack(Protocol):
    def __dlpack__(self) -> object: ...

_Array: TypeAlias = NDArray[Any]
_Input: TypeAlias = _Array | _HasArray | _HasDLPack
_Gradients: TypeAlias = tuple[
    _Array | None, _Array | None, _Array | None, _Array | None, _Array | None
]
_Needs: TypeAlias = tuple[bool, bool, bool, bool, bool]

__version__: str

@overload
def attention(
    q: _Input,
    k: _Input,
    v: _Input,
    rules: Rules,
    layout: str = "bhsd",
    out: _Array | None = None,
    num_threads: int | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[_Array, _Array]: ...
@overload
def attention(
    q: _Input,
    k: _Input,
    v: _Input,
    rules: Rules,
    layout: str = "bhsd",
    out: _Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
) -> Any: ...
@overload
def attention_paged(
    q: _Input,
    k: _Input,
    v: _Input,
    block_table: _Array,
    rules: Rules,
    layout: str = "bhsd",
    out: _Array | None = None,
    num_threads: int | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[_Array, _Array]: ...
@overload
def attention_paged(
    q: _Input,
    k: _Input,
    v: _Input,
    block_table: _Array,
    rules: Rules,
    layout: str = "bhsd",
    out: _Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
) -> Any: ...
def attention_backward(
    dout: _Input,
    q: _Input,
    k: _Input,
    v: _Input,
    out: _Input,
    lse: _Input,
    dlse: _Input | None,
    rules: Rules,
    layout: str,
    num_threads: int | None,
    need: _Needs,
) -> _Gradients: ...
@overload
def attention_varlen(
    q: _Input,
    k: _Input,
    v: _Input,
    cu_seqlens_q: _Input,
    cu_seqlens_k: _Input,
    rules: Rules,
    out: _Array | None = None,
    num_threads: int | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[_Array, _Array]: ...
@overload
def attention_varlen(
    q: _Input,
    k: _Input,
    v: _Input,
    cu_seqlens_q: _Input,
    cu_seqlens_k: _Input,
    rules: Rules,
    out: _Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
) -> Any: ...
def attention_varlen_backward(
    dout: _Input,
    q: _Input,
    k: _Input,
    v: _Input,
    out: _Input,
    lse: _Input,
    dlse: _Input | None,
    cu_seqlens_q: _Input,
    cu_seqlens_k: _Input,
    rules: Rules,
    num_threads: int | None,
    need: _Needs,
    into: tuple[_Array, _Array, _Array] | None,
) -> _Gradients: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int | None) -> None: ...
def cpu_info() -> dict[str, Any]: ...
def set_isa(name: str) -> None: ...
def measure_peak(dtype: str, threads: int) -> float: ...
def measure_bandwidth(threads: int) -> float: ...

_Ids: TypeAlias = NDArray[np.int64]

# For fusedattn.nn, fusedattn.losses and fusedattn.optim: results go to arrays that are given.

def product(
    a: _Array,
    b: _Array,
    c: _Array,
    bias: _Array | None,
    added: _Array | None,
    slope: _Array | None,
    row_sums: _Array | None,
    then: str,
) -> None: ...
def activate(y: _Array, slope: _Array, then: str) -> None: ...
def layer_norm(
    x: _Array,
    y: _Array,
    weight: _Array,
    bias: _Array,
    mean: _Array,
    rstd: _Array,
    eps: float,
) -> None: ...
def layer_norm_backward(
    x: _Array,
    dy: _Array,
    dx: _Array,
    weight: _Array,
    mean: _Array,
    rstd: _Array,
    dweight: _Array,
    dbias: _Array,
) -> None: ...
def adamw(
    p: _Array,
    g: _Array,
    m: _Array,
    v: _Array,
    scale: float,
    b1: float,
    b2: float,
    rate: float,
    root: float,
    shrink: float,
    eps: float,
) -> None: ...
def sum_of_squares(x: _Array) -> float: ...
def log_sum_exp(x: _Array, lse: _Array) -> None: ...
def softmax_gradient(x: _Array, lse: _Array, share: _Array, dx: _Array) -> None: ...
def gather_sum(tables: list[_Array], ids: list[_Ids], y: _Array) -> None: ...
def scatter_sum(x: _Array, order: _Ids, first: _Ids, rows: _Ids, y: _Array) -> None: ...
def drop_rows(
    x: _Array,
    added: _Array | None,
    y: _Array,
    seed: int,
    threshold: int,
    scale: float,
) -> None: ...
