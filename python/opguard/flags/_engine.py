"""The flag functions, as every part of opguard.flags calls them.

All take the configuration as its integer ``key`` (``ErrorConfig.key``). ``checks`` is a mask:
1 NaN, 2 +Inf, 4 -Inf. A ``location`` is an id, a name, a module or None. A function without an
underscore at its end never changes the flags it is given; one with it writes into them and returns
them. Bad input raises a subclass of ValueError and changes nothing.

Under torch.compile each is the function of the same name in :mod:`opguard.flags._traced`. In eager
code it is one C function, which does everything itself and calls that one where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from opguard import _C
from opguard.flags import _traced
from opguard.flags._compiled import merge as compiled_merge
from opguard.flags._traced import Location, clear, index_clamp, location_of, slot_of
from opguard.flags.errors import CodeError, FlagsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Location",
    "check",
    "check_",
    "clear",
    "count",
    "find",
    "gather",
    "index",
    "index_clamp",
    "is_err",
    "is_ok",
    "location_of",
    "max_severity",
    "merge",
    "merge_",
    "new",
    "push",
    "push_",
    "push_codes",
    "read",
    "read_all",
    "slot_of",
]


def check(x: Tensor, location: Location, f: Tensor | None, checks: int, key: int) -> Tensor:
    """Flags (N, W) with what ``checks`` asks for recorded per sample of ``x`` (N, ...).

    ``f`` None: new flags in the dtype and width of ``key``.
    """
    if is_dynamo_compiling():
        return _traced.check(x, location, f, checks, key)
    return _C.flags_check(x, location, f, checks, key)


def check_(x: Tensor, location: Location, f: Tensor, checks: int, key: int) -> Tensor:
    """:func:`check` written into ``f``, which is returned."""
    if is_dynamo_compiling():
        return _traced.check_(x, location, f, checks, key)
    return _C.flags_check_(x, location, f, checks, key)


def index(ids: Tensor, size: int, location: Location, f: Tensor | None, key: int) -> Tensor:
    """Flags with OUT_OF_BOUNDS where a sample of ``ids`` (N, ...) leaves 0..size-1."""
    if is_dynamo_compiling():
        return _traced.index(ids, size, location, f, key)
    return _C.flags_index(ids, size, location, f, key)


def push(  # noqa: PLR0917  (on hot paths; positions cost nothing)
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Location,
    severity: int | None,
    key: int,
    default_severity: int = 2,
) -> Tensor:
    """``f`` with one error recorded in the samples where ``where`` (N,) bool says so, or in all.

    ``severity`` None: the code's own, ``default_severity`` for codes without one.
    """
    if is_dynamo_compiling():
        return _traced.push(f, where, code, location, severity, key, default_severity)
    return _C.flags_push(f, where, code, location, severity, key, default_severity)


def push_(  # noqa: PLR0917
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Location,
    severity: int | None,
    key: int,
    default_severity: int = 2,
) -> Tensor:
    """:func:`push` written into ``f``, which is returned."""
    if is_dynamo_compiling():
        return _traced.push_(f, where, code, location, severity, key, default_severity)
    return _C.flags_push_(f, where, code, location, severity, key, default_severity)


def push_codes(  # noqa: PLR0917
    f: Tensor,
    codes: Tensor,
    where: Tensor | None,
    location: Location,
    severity: int | None,
    default_severity: int,
    key: int,
) -> Tensor:
    """``f`` with each sample's own code, ``codes`` (N,) of any integer dtype, 0 for none."""
    if is_dynamo_compiling():
        return _traced.push_codes(f, codes, where, location, severity, default_severity, key)
    try:
        return _traced.push_codes(f, codes, where, location, severity, default_severity, key)
    except RuntimeError as error:  # all that an op can raise
        if str(error).startswith("expected codes of "):
            raise CodeError(str(error)) from None
        raise


def merge(fs: Sequence[Tensor], key: int) -> Tensor:
    """The errors of all flags in the first's dtype, the later ones pushed after the earlier."""
    if is_dynamo_compiling():
        return compiled_merge(fs, key)
    return _C.flags_merge(fs, key)


def merge_(f: Tensor, g: Tensor, key: int) -> Tensor:
    """The errors of ``g`` pushed into ``f``, which is returned."""
    if is_dynamo_compiling():
        return _traced.merge_(f, g, key)
    return _C.flags_merge_(f, g, key)


def gather(f: Tensor, index: Tensor, key: int) -> Tensor:
    """Rows of ``f`` by number: row m is rows ``index[m]`` merged in their order, -1 being none.

    ``index``: (M,) or (M, K), int64 or int32, on the device of ``f``. All slots are used.
    """
    if is_dynamo_compiling():
        return _traced.gather(f, index, key)
    try:
        return _C.flags_gather(f, index, key)
    except RuntimeError as error:  # all that an op can raise
        if str(error).startswith("expected index to name "):
            raise FlagsError(str(error)) from None
        raise


def find(f: Tensor, mask: int, value: int) -> Tensor:
    """(N,) bool: a slot that holds an error has ``value`` in the bits of ``mask``."""
    if is_dynamo_compiling():
        return _traced.find(f, mask, value)
    return _C.flags_find(f, mask, value)


def is_ok(f: Tensor) -> Tensor:
    """(N,) bool: nothing is recorded for the sample."""
    if is_dynamo_compiling():
        return _traced.is_ok(f)
    return _C.flags_is_ok(f)


def is_err(f: Tensor) -> Tensor:
    """(N,) bool: something is recorded for the sample."""
    if is_dynamo_compiling():
        return _traced.is_err(f)
    return _C.flags_is_err(f)


def count(f: Tensor) -> Tensor:
    """(N,) int32: how many errors the sample has."""
    if is_dynamo_compiling():
        return _traced.count(f)
    return _C.flags_count(f)


def max_severity(f: Tensor) -> Tensor:
    """(N,) int64 (int32 for 32-bit words): the worst severity of the sample, 0 without errors."""
    if is_dynamo_compiling():
        return _traced.max_severity(f)
    return _C.flags_max_severity(f)


def new(samples: int, device: Any, key: int) -> Tensor:
    """Flags (samples, words) without errors, in the dtype and width of ``key``."""
    if is_dynamo_compiling():
        return _traced.new(samples, device, key)
    return _C.flags_new(samples, device, key)


def read(f: Tensor, row: int, how: tuple[Any, ...] | None = None) -> list[Any]:
    """The errors of one sample as (severity, code, location), in the order of its slots.

    ``how``: ``(cls, severity_names, code_names, location_name)`` makes each a ``cls``, a NamedTuple
    of the three numbers and their names: tuples of 4 and 16 names, and a function of an id.
    """
    return _C.flags_read(f, row, how)


def read_all(f: Tensor, how: tuple[Any, ...] | None = None) -> list[list[Any]]:
    """:func:`read` of every sample."""
    return _C.flags_read_all(f, how)


_BY_NUMBER = {3: torch.int32, 4: torch.int64, 6: torch.float32, 7: torch.float64, 11: torch.bool}


def _empty(rows: int, columns: int, dtype: int, like: Tensor) -> Tensor:
    shape = (rows,) if columns < 0 else (rows, columns)
    return torch.empty(shape, dtype=_BY_NUMBER[dtype], device=like.device)


def _bind() -> None:
    """Tells C where its road ends, and by which functions of torch it knows.

    A torch that lacks one of them leaves the place empty: then every call goes the long road, and a
    torch without a DLPack exchange makes all tensors by torch.empty.
    """
    long = (*(name for name in __all__ if hasattr(_C, "flags_" + name)),)
    _C.flags_bind(
        **{name: getattr(_traced, name) for name in long},
        resolve=location_of,
        empty=_empty,
        dispatch_modes=getattr(torch._C, "_len_torch_dispatch_stack", None),
        functorch=getattr(torch._C, "_are_functorch_transforms_active", None),
        function_modes=getattr(torch._C, "_len_torch_function_stack", None),
        tracing=getattr(torch._C, "_get_tracing_state", None),
        exchange=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
    )


_bind()
