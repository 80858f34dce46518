"""What the flag functions do with GuardedTensors: the one place that lifts them.

Each function here has the name and the arguments of one in :mod:`._traced`, which comes here where
a GuardedTensor is among them. One in the place of the data is read row by row and given back with
more flags; one in the place of the flags stands for its flags, and is given back with others. Data
is never touched. All of it is one op, ``opguard::guarded_told``, to compiled code, since a graph
knows neither the rows of a tensor within it nor its configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.compiler import is_dynamo_compiling

from opguard._flag_ops import SLOTS_A_WORD
from opguard.flags import _compiled, _engine, _traced
from opguard.flags import config as _config
from opguard.flags._guarded_ops import ATTACH
from opguard.flags._guarded_wrap import build, public_rows, rows_now, set_rows
from opguard.flags._rows.payloads import FlagPayload
from opguard.flags._words import as_words
from opguard.flags.errors import BatchMismatchError, FlagsError
from opguard.flags.guarded import GuardedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from opguard.flags._traced import Location

__all__ = [
    "by_rows",
    "check",
    "check_",
    "clear",
    "data_of",
    "data_rows",
    "flags_of",
    "index",
    "index_clamp",
    "merge",
    "merge_",
    "push",
    "push_",
    "push_codes",
    "rows_first",
    "spread",
    "subset",
]

_SLOTS = 0xFFFF  # of a key: how many slots a sample has


def flags_of(f: Any) -> Any:
    """The flags of a GuardedTensor; everything else itself."""
    return f.flags if isinstance(f, GuardedTensor) else f


def data_of(x: Any) -> Any:
    """The data of a GuardedTensor; everything else itself."""
    return x.unwrap() if isinstance(x, GuardedTensor) else x


def by_rows(x: Tensor, dims: Sequence[int]) -> Tensor:
    """``x`` (n, ...) with the rows along ``dims`` first; the tensor itself where they are."""
    if not dims:
        return x.unsqueeze(0)
    if dims == (0,):
        return x
    if tuple(dims) != tuple(range(len(dims))):
        x = x.movedim(tuple(dims), tuple(range(len(dims))))
    return x if len(dims) == 1 else x.flatten(0, len(dims) - 1)


def _data_rows(g: GuardedTensor) -> Tensor:
    return by_rows(g._data, public_rows(g)[0])


# --- what each work makes of a tensor's flags: (g, tensors, numbers) -> flags (n, W) --------------

Work = Callable[[GuardedTensor, Sequence["Tensor | None"], Sequence[int]], "Tensor"]
_ops: Any = torch.ops.opguard


def _flags_and_key(g: GuardedTensor, key: int, other: Tensor | None = None) -> tuple[Tensor, int]:
    """The flags of ``g``, those of ``other`` merged into them, and how they are recorded.

    Without a configuration of the call's own, it is the tensor's. No error is left out because the
    configuration now has fewer slots than the flags were made with.
    """
    payload = public_rows(g)[1]
    if key == _config._current.key:
        key = payload.key
    if other is not None and other is not g:
        others = flags_of(other)
        _traced._flags(others)
        if others.shape[0] != payload.rows:
            raise BatchMismatchError(
                f"expected flags of the {payload.rows} rows of the GuardedTensor, got flags of"
                f" {others.shape[0]}"
            )
        payload = payload.merge(FlagPayload(others, key))
    flags: Tensor = payload.flags
    return flags, key & ~_SLOTS | flags.shape[1] * SLOTS_A_WORD[flags.dtype]


def _checked(g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    place, checks, key = numbers
    f, other = tensors
    flags, key = _flags_and_key(g, key, f)
    x = _data_rows(g) if other is None else other
    if not (x.is_floating_point() or x.is_complex()):
        return flags
    return _engine.check(x, place, flags, checks, key)


def _pushed(g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    slot, key = numbers
    (where,) = tensors
    flags, key = _flags_and_key(g, key)
    if where is None:
        return cast("Tensor", _ops.flags_push_all.default(flags, slot, key))
    return cast("Tensor", _ops.flags_push.default(flags, _traced._where(flags, where), slot, key))


def _codes_pushed(
    g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]
) -> Tensor:
    place, severity, default_severity, key = numbers
    codes, where = tensors
    flags, key = _flags_and_key(g, key)
    given = None if severity < 0 else severity
    return _traced.push_codes(
        flags, cast("Tensor", codes), where, place, given, default_severity, key
    )


def _merged(g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    (key,) = numbers
    flags = _flags_and_key(g, key)[0]
    for other in tensors:
        flags = _flags_and_key(g.with_flags(flags), key, other)[0]
    return flags


def _cleared(g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    return cast("Tensor", _ops.flags_clear.default(g.flags, numbers[0]))


def _indexed(g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    size, place, key = numbers
    f, other = tensors
    flags, key = _flags_and_key(g, key, f)
    ids = _traced._ids(_data_rows(g) if other is None else other, size)
    return cast(
        "Tensor", _ops.flags_index.default(_traced._batch(flags, ids, "ids"), ids, size, place, key)
    )


def _chosen(g: GuardedTensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    """Rows of the second tensor where the first says so, else of the third; all as ``g`` where
    their rows do not lie as those of ``g``."""
    mask, value, other = tensors
    ours, theirs = flags_of(value), flags_of(other)
    alike = g.flags.shape == ours.shape == theirs.shape and ours.dtype is theirs.dtype
    if not alike or not g.batch_dims == value.batch_dims == other.batch_dims:  # type: ignore[union-attr]
        return g.flags
    return as_words_where(cast("Tensor", mask), ours, theirs)


def as_words_where(mask: Tensor, f: Tensor, other: Tensor) -> Tensor:
    """Rows of ``f`` where mask (n,), else of ``other``, moved as integers."""
    words = torch.where(mask.unsqueeze(1), as_words(f), as_words(other))
    return words.view(f.dtype)


_WORKS: dict[str, Work] = {
    "choose": _chosen,
    "check": _checked,
    "push": _pushed,
    "push_codes": _codes_pushed,
    "merge": _merged,
    "clear": _cleared,
    "index": _indexed,
}


def _in_graph(
    cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    if func is _DATA_ROWS:
        return _data_rows(args[0])
    if func is _SPREAD:
        return _spread(*args)
    if func is _ROWS_FIRST:
        return _rows_first(*args)
    g, what, tensors, numbers = args
    if what == "flags":
        return g.flags.view_as(g.flags)
    return _WORKS[what](g, tensors, numbers)


def _spread(g: GuardedTensor, rows: Tensor) -> Tensor:
    """``rows`` (n,) where the rows of ``g`` lie, to be broadcast to its shape."""
    dims = g.batch_dims
    samples = g.flags.shape[0]
    if rows.shape[0] != samples:
        raise BatchMismatchError(
            f"expected a GuardedTensor of the {rows.shape[0]} samples of the flags, got one of"
            f" {samples}"
        )
    others = [dim for dim in range(g.dim()) if dim not in dims]
    shape = [g.shape[dim] for dim in dims] + [1] * len(others)
    order = [*dims, *others]
    placed = rows.reshape(shape)
    if order == list(range(len(order))):
        return placed
    return placed.permute([order.index(dim) for dim in range(len(order))])


def _rows_first(g: GuardedTensor) -> GuardedTensor:
    dims = g.batch_dims
    if dims:
        return by_rows(g, dims)  # type: ignore[return-value]
    data = g.unwrap().unsqueeze(0)
    carrier = build(data.detach(), g.flags, ((0,), rows_key(g), g._merges))
    return ATTACH(data, carrier)  # type: ignore[no-any-return]


def rows_key(g: GuardedTensor) -> int:
    """The key of the configuration by which the flags of ``g`` merge."""
    return rows_now(g).payload.key  # type: ignore[attr-defined,no-any-return]


def _define() -> tuple[Any, ...]:
    library: Any = torch.library.Library  # untyped before torch 2.14
    library = library("opguard", "FRAGMENT")
    schemas = {
        "guarded_told": "(Tensor g, str what, Tensor?[] tensors, int[] numbers) -> Tensor",
        "guarded_data_rows": "(Tensor g) -> Tensor",
        "guarded_spread": "(Tensor g, Tensor rows) -> Tensor",
        "guarded_rows_first": "(Tensor g) -> Tensor",
    }
    for name, schema in schemas.items():
        library.define(name + schema)
        if name == "guarded_rows_first":  # made of ops that have their gradients
            library.impl(name, _rows_first, "CompositeImplicitAutograd")
        else:  # flags and masks: no gradient goes through them
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_torch_dispatch(
            f"opguard::{name}", GuardedTensor, _in_graph, lib=library
        )
    return library, *(getattr(torch.ops.opguard, name).default for name in schemas)


_LIBRARY, _TOLD, _DATA_ROWS, _SPREAD, _ROWS_FIRST = _define()


def rows_first(g: Tensor) -> Tensor:
    """The GuardedTensor (n, ...) with its rows in dimension 0."""
    if is_dynamo_compiling():
        return cast("Tensor", _ROWS_FIRST(g))
    return _rows_first(cast("GuardedTensor", g))


def subset(g: Tensor, index: Any) -> GuardedTensor:
    """The rows that ``index`` picks; an int picks one, which stays in a dimension of its own."""
    if isinstance(index, GuardedTensor):
        index = data_rows(index)
    if isinstance(index, int):
        index = [index]
    return rows_first(g)[index]  # type: ignore[return-value]


def with_flags(g: Tensor, flags: Tensor) -> Tensor:
    """``g`` with other flags."""
    return cast("GuardedTensor", g).with_flags(flags)


def choose(g: Tensor, mask: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """``g`` with the flags of ``value`` where mask (n,), of ``other`` elsewhere."""
    return _told(cast("GuardedTensor", g), "choose", [mask, value, other], [])


def data_rows(g: GuardedTensor) -> Tensor:
    """The data (n, ...) with its rows first, without flags and without a gradient."""
    if is_dynamo_compiling():
        return cast("Tensor", _DATA_ROWS(g))
    return _data_rows(g)


def spread(g: Tensor, rows: Tensor) -> Tensor:
    """``rows`` (n,), one for each row of ``g``, shaped so that it broadcasts over its data."""
    if is_dynamo_compiling():
        return cast("Tensor", _SPREAD(g, rows))
    return _spread(cast("GuardedTensor", g), rows)


def _told(
    g: GuardedTensor, what: str, tensors: Sequence[Tensor | None], numbers: Sequence[int]
) -> GuardedTensor:
    """``g`` with what the work makes of its flags."""
    if is_dynamo_compiling():
        return g.with_flags(_TOLD(g, what, tensors, numbers))
    return g.with_flags(_WORKS[what](g, tensors, numbers))


def _put(
    g: GuardedTensor, what: str, tensors: Sequence[Tensor | None], numbers: Sequence[int]
) -> GuardedTensor:
    """``g`` itself, with what the work makes of its flags from now on."""
    if torch.compiler.is_compiling():
        raise FlagsError(
            "expected flags of a GuardedTensor to be written in place outside compiled code, which"
            " cannot change them in a tensor that it was given; use the function without the"
            " underscore, which gives one back"
        )
    made = g.with_flags(_WORKS[what](g, tensors, numbers))
    set_rows(g, rows_now(made))
    return g


# --- the functions of _traced ---------------------------------------------------------------------


def _carrier(x: Any, f: Any) -> tuple[Any, list[Any]]:
    """Whose flags are recorded in; further flags, and data that is not its own."""
    return (x, [f, None]) if isinstance(x, GuardedTensor) else (f, [None, x])


def check(x: Tensor, location: Location, f: Tensor | None, checks: int, key: int) -> Tensor:
    """:func:`._traced.check`; a GuardedTensor."""
    g, tensors = _carrier(x, f)
    return _told(g, "check", tensors, (_traced.location_of(location), checks, key))


def _rows_in(x: Any) -> Any:
    return data_rows(x) if isinstance(x, GuardedTensor) else x


def check_(x: Tensor, location: Location, f: Tensor | None, checks: int, key: int) -> Tensor:
    """:func:`._traced.check_`; ``f`` None: into the flags of ``x`` itself."""
    if f is None or f is x:
        into, other = cast("GuardedTensor", x), None
    elif isinstance(f, GuardedTensor):
        into, other = f, _rows_in(x)
    else:
        return _traced.check_(_rows_in(x), location, f, checks, key)
    numbers = (_traced.location_of(location), checks, key)
    return _put(into, "check", [None, other], numbers)


def push(  # noqa: PLR0917
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Location,
    severity: int | None,
    key: int,
    default_severity: int = 2,
) -> Tensor:
    """:func:`._traced.push`; of a GuardedTensor as ``where`` the data counts."""
    where = _rows_in(where)
    if not isinstance(f, GuardedTensor):
        return _traced.push(f, where, code, location, severity, key, default_severity)
    slot = _traced.slot_of(location, code, severity, default_severity)
    return _told(f, "push", [where], (slot, key))


def push_(  # noqa: PLR0917
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Location,
    severity: int | None,
    key: int,
    default_severity: int = 2,
) -> Tensor:
    """:func:`._traced.push_`."""
    where = _rows_in(where)
    if not isinstance(f, GuardedTensor):
        return _traced.push_(f, where, code, location, severity, key, default_severity)
    slot = _traced.slot_of(location, code, severity, default_severity)
    return _put(f, "push", [where], (slot, key))


def push_codes(  # noqa: PLR0917
    f: Tensor,
    codes: Tensor,
    where: Tensor | None,
    location: Location,
    severity: int | None,
    default_severity: int,
    key: int,
) -> Tensor:
    """:func:`._traced.push_codes`."""
    codes, where = _rows_in(codes), _rows_in(where)
    if not isinstance(f, GuardedTensor):
        return _traced.push_codes(f, codes, where, location, severity, default_severity, key)
    given = -1 if severity is None else _traced._severity(severity)
    numbers = (_traced.location_of(location), given, int(default_severity), key)
    return _told(f, "push_codes", [codes, where], numbers)


def merge(fs: Sequence[Tensor], key: int) -> Tensor:
    """:func:`._traced.merge`: the data of the first GuardedTensor, with the flags of all."""
    first = next(f for f in fs if isinstance(f, GuardedTensor))
    return _told(first, "merge", list(fs), (key,))


def merge_(f: Tensor, g: Tensor, key: int) -> Tensor:
    """:func:`._traced.merge_`."""
    if not isinstance(f, GuardedTensor):
        return _traced.merge_(f, flags_of(g), key)
    return _put(f, "merge", [g], (key,))


def clear(f: GuardedTensor, code: int) -> Tensor:
    """:func:`._traced.clear`."""
    return _told(f, "clear", [], (_traced._code(code),))


def index(ids: Tensor, size: int, location: Location, f: Tensor | None, key: int) -> Tensor:
    """:func:`._traced.index`."""
    _traced._ids(ids, size)
    g, tensors = _carrier(ids, f)
    return _told(g, "index", tensors, (size, _traced.location_of(location), key))


def index_clamp(
    ids: Tensor, size: int, location: Location, f: Tensor | None, key: int
) -> tuple[Tensor, Tensor]:
    """:func:`._traced.index_clamp`: twice the clamped ids with the flags, if ids are guarded."""
    told = index(ids, size, location, f, key)
    if isinstance(ids, GuardedTensor):
        clamped = told.clamp(0, size - 1) if size else told
        return clamped, clamped
    return told, ids.clamp(0, size - 1)


_traced._Guarded = _compiled._Guarded = GuardedTensor
vars(_traced)["_lifted"] = sys.modules[__name__]
