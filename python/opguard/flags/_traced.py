"""What the flag functions are made of, through ``torch.ops.opguard``: true everywhere.

This is the road while torch compiles or traces, and wherever a call is unusual: subclasses, fake
tensors, functorch's transforms, torch function and dispatch modes. In eager code
:mod:`opguard.flags._engine` goes a shorter one with the same results and the same errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from opguard._flag_ops import CARRIERS, SLOTS_A_WORD
from opguard.flags._provenance import noted
from opguard.flags.codes import ErrorCode
from opguard.flags.errors import (
    BatchMismatchError,
    CodeError,
    FlagsError,
    FlagsLayoutError,
    LocationError,
    SeverityError,
)

if TYPE_CHECKING:
    from torch import Tensor

Location: TypeAlias = "int | str | torch.nn.Module | None"

# Plain names of this module: each attribute that Dynamo looks up is one guard more.
_SEVERITIES = ErrorCode._SEVERITIES  # of the codes 0..15; -1: the configuration's

_ops = torch.ops.opguard

# GuardedTensor, and the module that does with one what the functions here do with tensors and
# flags: both are bound by that module, which needs this one. No tensor is an instance of ().
_Guarded: Any = ()
if TYPE_CHECKING:
    from opguard.flags import _guarded_record as _lifted
else:
    _lifted = None


def location_of(location: Location) -> int:
    """The id of a location, 0..1023; LocationError for another integer."""
    if type(location) is int:
        place: int = location
    else:
        from opguard.flags.locations import resolve_location

        place = resolve_location(location)
    if not 0 <= place <= 1023:
        raise LocationError(
            f"expected a location id from 0 to 1023, got {place}; pass a string or a module "
            "and its id is found"
        )
    return place


def _code(code: int) -> int:
    if not _is_whole(code) or not 0 <= code <= 15:
        raise CodeError(f"expected an error code from 0 to 15, got {code!r}")
    return code


def _severity(severity: int) -> int:
    if not _is_whole(severity) or not 0 <= severity <= 3:
        raise SeverityError(f"expected a severity from 0 to 3, got {severity!r}")
    return severity


def _is_whole(value: Any) -> bool:
    """Whether it is a number without a fraction; a tensor is one where it has no dimensions."""
    if isinstance(value, int):
        return True
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not (value.is_floating_point() or value.is_complex())
    return hasattr(value, "__index__")


def code_bits(code: int) -> int:
    """A code where a slot has it, for :func:`find`; CodeError for what is none."""
    return (code if type(code) is int and 0 <= code <= 15 else _code(code)) << 2


def slot_of(location: Location, code: int, severity: int | None, default_severity: int) -> int:
    """The 16 bits of an error; 0 in the code or severity bits means that it is not recorded."""
    code = _code(code)
    if severity is None:
        severity = _SEVERITIES[code]
        if severity < 0:
            severity = default_severity
    return _severity(severity) | code << 2 | location_of(location) << 6


def _flags(f: Tensor, name: str = "f") -> Tensor:
    if isinstance(f, _Guarded):
        return cast("Tensor", f.flags)
    if not isinstance(f, torch.Tensor):
        raise FlagsLayoutError(
            f"expected {name} to be flags, a tensor of shape (N, words), got {type(f).__name__}"
        )
    if f.dim() != 2 or f.shape[1] == 0 or f.dtype not in SLOTS_A_WORD:
        raise FlagsLayoutError(
            f"expected {name} to be flags of shape (N, words) in int64, int32, float64 or "
            f"float32, got shape {tuple(f.shape)} of {f.dtype}"
        )
    return f


def _rows(x: Tensor) -> int:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor of shape (N, ...), got {type(x).__name__}")
    return x.shape[0] if x.dim() else 1


def _batch(f: Tensor, x: Tensor, name: str) -> Tensor:
    _flags(f)
    if f.shape[0] != _rows(x):
        raise BatchMismatchError(
            f"expected {name} to hold the {f.shape[0]} samples of the flags, it holds {_rows(x)}"
        )
    return f


def _where(f: Tensor, where: Tensor) -> Tensor:
    if not isinstance(where, torch.Tensor):
        raise FlagsError(
            f"expected where to be a mask of shape (N,) in bool, got {type(where).__name__}"
        )
    if where.dtype is not torch.bool:
        if where.dtype.is_floating_point or where.dtype.is_complex:
            raise FlagsError(
                f"expected where to be a mask of shape (N,) in bool, got {where.dtype}; "
                "compare first"
            )
        where = where != 0
    if where.dim() > 1:
        raise BatchMismatchError(
            f"expected where to be a mask of shape ({f.shape[0]},), got {tuple(where.shape)}"
        )
    _batch(f, where, "where")
    return where if where.dim() else where.unsqueeze(0)


def new(samples: int, device: Any, key: int) -> Tensor:
    """Flags (samples, words) without errors, in the dtype and width of ``key``."""
    dtype = CARRIERS[key >> 21 & 3]
    words = -(-(key & 0xFFFF) // SLOTS_A_WORD[dtype])
    return noted(torch.zeros((samples, words), dtype=dtype, device=device))


def check(x: Tensor, location: Location, f: Tensor | None, checks: int, key: int) -> Tensor:
    """Flags (N, W) with what ``checks`` asks for (1 NaN, 2 +Inf, 4 -Inf) recorded per sample."""
    if isinstance(x, _Guarded) or isinstance(f, _Guarded):
        return _lifted.check(x, location, f, checks, key)
    place = location_of(location)
    if f is None:
        _rows(x)
        return noted(cast("Tensor", _ops.flags_check_new.default(x, place, checks, key)))
    return noted(cast("Tensor", _ops.flags_check.default(_batch(f, x, "x"), x, place, checks, key)))


def check_(x: Tensor, location: Location, f: Tensor | None, checks: int, key: int) -> Tensor:
    """:func:`check` written into ``f``, which is returned; None: those of a GuardedTensor."""
    if isinstance(x, _Guarded) or isinstance(f, _Guarded):
        return _lifted.check_(x, location, f, checks, key)
    f = _batch(cast("Tensor", f), x, "x")
    _ops.flags_check_.default(f, x, location_of(location), checks, key)
    return noted(f)


def push(  # noqa: PLR0917  (on hot paths; positions cost nothing)
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Location,
    severity: int | None,
    key: int,
    default_severity: int = 2,
) -> Tensor:
    """``f`` with one error recorded in the samples where ``where`` (N,) bool says so, or in all."""
    if isinstance(f, _Guarded) or isinstance(where, _Guarded):
        return _lifted.push(f, where, code, location, severity, key, default_severity)
    slot = slot_of(location, code, severity, default_severity)
    if where is None:
        return noted(cast("Tensor", _ops.flags_push_all.default(_flags(f), slot, key)))
    return noted(cast("Tensor", _ops.flags_push.default(_flags(f), _where(f, where), slot, key)))


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
    if isinstance(f, _Guarded) or isinstance(where, _Guarded):
        return _lifted.push_(f, where, code, location, severity, key, default_severity)
    slot = slot_of(location, code, severity, default_severity)
    if where is None:
        _ops.flags_push_all_.default(_flags(f), slot, key)
    else:
        _ops.flags_push_.default(_flags(f), _where(f, where), slot, key)
    return noted(f)


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
    if isinstance(f, _Guarded) or isinstance(codes, _Guarded) or isinstance(where, _Guarded):
        return _lifted.push_codes(f, codes, where, location, severity, default_severity, key)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dim() > 1:
        raise CodeError(
            f"expected codes to be integers of shape ({f.shape[0]},), got shape "
            f"{tuple(codes.shape)} of {codes.dtype}"
        )
    _batch(f, codes, "codes")
    if codes.dim() == 0:
        codes = codes.unsqueeze(0)
    if where is not None:
        codes = codes.masked_fill(~_where(f, where), 0)
    given = -1 if severity is None else _severity(severity)
    place = location_of(location)
    return noted(
        cast("Tensor", _ops.flags_push_codes.default(f, codes, place, given, default_severity, key))
    )


def _alike(f: Tensor, g: Tensor, name: str) -> Tensor:
    _flags(g, name)
    if g.shape[0] != f.shape[0]:
        raise BatchMismatchError(
            f"expected {name} to hold the {f.shape[0]} samples of the first flags, it holds "
            f"{g.shape[0]}"
        )
    ours, theirs = (flags.shape[1] * SLOTS_A_WORD[flags.dtype] for flags in (f, g))
    if theirs != ours:
        raise FlagsLayoutError(
            f"expected {name} to have the {ours} slots a sample of the first flags, it has "
            f"{theirs}; make both with one configuration"
        )
    return g


def _any_guarded(fs: Sequence[Tensor]) -> bool:
    for f in fs:  # noqa: SIM110  (traced by Dynamo)
        if isinstance(f, _Guarded):
            return True
    return False


def merge(fs: Sequence[Tensor], key: int) -> Tensor:
    """The errors of all flags in the first's dtype, the later ones pushed after the earlier."""
    if _any_guarded(fs):
        return _lifted.merge(fs, key)
    if not fs:
        raise FlagsError("expected at least one flags tensor to merge, got none")
    first = _flags(fs[0], "flags[0]")
    if len(fs) == 1:
        return noted(first)
    for i in range(1, len(fs)):
        _alike(first, fs[i], f"flags[{i}]")
    return noted(cast("Tensor", _ops.flags_merge.default(list(fs), key)))


def merge_(f: Tensor, g: Tensor, key: int) -> Tensor:
    """The errors of ``g`` pushed into ``f``, which is returned."""
    if isinstance(f, _Guarded) or isinstance(g, _Guarded):
        return _lifted.merge_(f, g, key)
    _ops.flags_merge_.default(_flags(f), _alike(f, g, "other"), key)
    return noted(f)


def gather(f: Tensor, index: Tensor, key: int) -> Tensor:
    """Rows of ``f`` by number: row m is rows ``index[m]`` merged in their order, -1 being none."""
    return noted(cast("Tensor", _ops.flags_gather.default(_flags(f), _index(index), key)))


def _index(index: Tensor) -> Tensor:
    if not isinstance(index, torch.Tensor):
        raise FlagsError(f"expected an index of rows in a tensor, got {type(index).__name__}")
    if index.dim() not in {1, 2} or index.dtype not in {torch.int64, torch.int32}:
        raise FlagsError(
            "expected an index of rows of shape (M,) or (M, K) in int64 or int32, got shape "
            f"{tuple(index.shape)} of {index.dtype}"
        )
    return index


def find(f: Tensor, mask: int, value: int) -> Tensor:
    """(N,) bool: a slot that holds an error has ``value`` in the bits of ``mask``."""
    return cast("Tensor", _ops.flags_find.default(_flags(f), mask, value))


def is_ok(f: Tensor) -> Tensor:
    """(N,) bool: nothing is recorded for the sample."""
    return cast("Tensor", _ops.flags_ok.default(_flags(f)))


def is_err(f: Tensor) -> Tensor:
    """(N,) bool: something is recorded for the sample."""
    return cast("Tensor", _ops.flags_err.default(_flags(f)))


def count(f: Tensor) -> Tensor:
    """(N,) int32: how many errors the sample has."""
    return cast("Tensor", _ops.flags_count.default(_flags(f)))


def max_severity(f: Tensor) -> Tensor:
    """(N,) int64 (int32 for 32-bit words): the worst severity of the sample, 0 without errors."""
    return cast("Tensor", _ops.flags_max_severity.default(_flags(f)))


def clear(f: Tensor, code: int) -> Tensor:
    """``f`` without the errors of this code."""
    if isinstance(f, _Guarded):
        return _lifted.clear(f, code)
    return noted(cast("Tensor", _ops.flags_clear.default(_flags(f), _code(code))))


def _ids(ids: Tensor, size: int) -> Tensor:
    _rows(ids)
    if not _is_whole(size) or size < 0:
        raise FlagsError(f"expected the size of a table, 0 or more rows, got {size!r}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool:
        raise FlagsError(f"expected indices of an integer dtype, got {ids.dtype}")
    return ids


def index(ids: Tensor, size: int, location: Location, f: Tensor | None, key: int) -> Tensor:
    """Flags with OUT_OF_BOUNDS where a sample of ``ids`` (N, ...) leaves 0..size-1."""
    if isinstance(ids, _Guarded) or isinstance(f, _Guarded):
        return _lifted.index(ids, size, location, f, key)
    place = location_of(location)
    if f is None:
        return noted(
            cast("Tensor", _ops.flags_index_new.default(_ids(ids, size), size, place, key))
        )
    return noted(
        cast(
            "Tensor",
            _ops.flags_index.default(_batch(f, ids, "ids"), _ids(ids, size), size, place, key),
        )
    )


def index_clamp(
    ids: Tensor, size: int, location: Location, f: Tensor | None, key: int
) -> tuple[Tensor, Tensor]:
    """:func:`index`, and ``ids`` clamped to 0..size-1."""
    if isinstance(ids, _Guarded) or isinstance(f, _Guarded):
        return _lifted.index_clamp(ids, size, location, f, key)
    if f is None:
        f = new(_rows(ids), ids.device, key)
    place = location_of(location)
    result = _ops.flags_index_clamp.default(
        _batch(f, ids, "ids"), _ids(ids, size), size, place, key
    )
    noted(result[0])
    return cast("tuple[Tensor, Tensor]", result)


def _slots(f: Tensor) -> list[list[int]]:
    words = _flags(f).detach().cpu().contiguous()
    return cast("list[list[int]]", words.view(torch.uint16).tolist())


def _named(slot: int, how: tuple[Any, ...] | None) -> Any:
    severity, code, location = slot & 3, slot >> 2 & 15, slot >> 6
    if how is None:
        return severity, code, location
    make, severities, codes, location_name = how
    names = severities[severity], codes[code], location_name(location)
    return make(severity, code, location, *names)


def read(f: Tensor, row: int, how: tuple[Any, ...] | None = None) -> list[Any]:
    """The errors of one sample as (severity, code, location), in the order of its slots."""
    f = _flags(f)
    samples = f.shape[0]
    if not -samples <= row < samples:
        raise FlagsError(f"expected a sample of the {samples} in the flags, got {row}")
    if row < 0:
        row += samples
    (slots,) = _slots(f[row : row + 1])
    return [_named(slot, how) for slot in slots if slot]


def read_all(f: Tensor, how: tuple[Any, ...] | None = None) -> list[list[Any]]:
    """:func:`read` of every sample."""
    return [[_named(slot, how) for slot in slots if slot] for slots in _slots(f)]
