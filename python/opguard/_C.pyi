"""Types of the C core; its docstrings are in the module itself."""

from collections.abc import Callable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, TypeVar, final

from _typeshed import structseq
from torch import Tensor

_E = TypeVar("_E", bound=BaseException)
_T = TypeVar("_T")

# --- what the package binds ---------------------------------------------------------------------

def load_ops(path: str, /) -> None: ...
def ops_info() -> dict[str, str]: ...
def bind_types(tensor: type, parameter: type, /) -> None: ...

# --- files --------------------------------------------------------------------------------------

def exchange_paths(first: str | PathLike[str], second: str | PathLike[str], /) -> None: ...

# --- sanitizing ---------------------------------------------------------------------------------

@final
class TensorSummary(structseq[Any], tuple[Any, Any, Any]):
    __match_args__: Final = ("shape", "dtype", "device")
    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...

@final
class ObjectSummary(structseq[str], tuple[str]):
    __match_args__: Final = ("type",)
    @property
    def type(self) -> str: ...

def sanitize_exception(
    exc: _E,
    handled: BaseException | None = None,
    keep: tuple[type[BaseException], ...] | None = None,
    deep: bool = True,
    /,
) -> _E: ...
def sanitize_exit(
    exc: BaseException,
    handled: BaseException | None = None,
    keep: tuple[type[BaseException], ...] | None = None,
    /,
) -> None: ...

# --- detaching ----------------------------------------------------------------------------------

def detach(
    value: Any, copy: bool = False, models: tuple[Any, ...] = (), far: bool = False, /
) -> Any: ...
def detach_bind(
    resolve: Callable[[type], Any] | None,
    fetch: Callable[[list[Any]], list[Any]] | None,
    inference_mode: Callable[[bool], Any] | None,
    set_grad: Callable[[bool], Any] | None,
    make_subclass: Callable[..., Any] | None,
    watched: dict[Any, Any] | None,
    /,
) -> None: ...
def register_detach(
    type: type[_T], fn: Callable[[_T, Callable[[Any], Any]], Any] | None, /
) -> None: ...

# --- guards -------------------------------------------------------------------------------------

@final
class Guard:
    def __new__(
        cls,
        kind: int = ...,
        flags: int = ...,
        models: tuple[Any, ...] | None = ...,
        autocast: tuple[Any, ...] | None = ...,
        devices: Any = ...,
        caller: Callable[..., Any] | None = ...,
        on_oom: Any = ...,
        keep: tuple[type[BaseException], ...] | None = ...,
        /,
    ) -> Guard: ...
    @property
    def settings(self) -> tuple[Any, ...]: ...
    @property
    def memory(self) -> Any: ...
    def __enter__(self) -> Guard: ...
    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
        /,
    ) -> bool | None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def run(
        self, function: Callable[..., _T], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> _T: ...
    def step(self, inner: Any, yields: bool, /) -> Any: ...

def bind_guards(**parts: Any) -> None: ...
def guard_sanitize(
    error: BaseException,
    handled: BaseException | None,
    keep: tuple[type[BaseException], ...] | None,
    /,
) -> None: ...

# --- flags --------------------------------------------------------------------------------------

def flags_bind(**parts: Any) -> None: ...
def flags_epoch(epoch: int, /) -> None: ...
def flags_check(x: Tensor, location: Any, f: Tensor | None, checks: int, key: int, /) -> Tensor: ...
def flags_check_(
    x: Tensor, location: Any, f: Tensor | None, checks: int, key: int, /
) -> Tensor: ...
def flags_index(ids: Tensor, size: int, location: Any, f: Tensor | None, key: int, /) -> Tensor: ...
def flags_push(
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Any,
    severity: int | None,
    key: int,
    default_severity: int = 2,
    /,
) -> Tensor: ...
def flags_push_(
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Any,
    severity: int | None,
    key: int,
    default_severity: int = 2,
    /,
) -> Tensor: ...
def flags_merge(fs: Sequence[Tensor], key: int, /) -> Tensor: ...
def flags_merge_(f: Tensor, g: Tensor, key: int, /) -> Tensor: ...
def flags_gather(f: Tensor, index: Tensor, key: int, /) -> Tensor: ...
def flags_find(f: Tensor, mask: int, value: int, /) -> Tensor: ...
def flags_is_ok(f: Tensor, /) -> Tensor: ...
def flags_is_err(f: Tensor, /) -> Tensor: ...
def flags_count(f: Tensor, /) -> Tensor: ...
def flags_max_severity(f: Tensor, /) -> Tensor: ...
def flags_new(samples: int, device: Any, key: int, /) -> Tensor: ...
def flags_out_check(
    f: Tensor, x: Tensor, location: int, checks: int, key: int, *, out: Tensor
) -> None: ...
def flags_out_check_new(
    x: Tensor, location: int, checks: int, key: int, *, out: Tensor
) -> None: ...
def flags_out_chain(*tensors: Tensor, steps: bytes, out: Tensor) -> None: ...
def flags_out_index(
    f: Tensor, ids: Tensor, size: int, location: int, key: int, *, out: Tensor
) -> None: ...
def flags_out_index_new(
    ids: Tensor, size: int, location: int, key: int, *, out: Tensor
) -> None: ...
def flags_out_merge(*fs: Tensor, key: int, out: Tensor) -> None: ...
def flags_out_push(f: Tensor, where: Tensor, slot: int, key: int, *, out: Tensor) -> None: ...
def flags_out_push_all(f: Tensor, slot: int, key: int, *, out: Tensor) -> None: ...
def flags_read(f: Tensor, row: int, how: tuple[Any, ...] | None = None, /) -> list[Any]: ...
def flags_read_all(f: Tensor, how: tuple[Any, ...] | None = None, /) -> list[list[Any]]: ...
