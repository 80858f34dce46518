"""The functions of every layer as torch.compile traces them, with as few guards as they can have.

Each thing that traced Python looks up is guarded in every later call of the graph, and at small
batches that costs as much as the ops. So nothing is looked up twice or by two ways, numbers come
from functions that run once at trace time, and shapes and dtypes are left to the ops' fake kernels,
which refuse bad ones with the same sentences. The other functions are traced as :mod:`._traced` has
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from opguard.flags import _traced
from opguard.flags import config as _config
from opguard.flags._provenance import is_traced, noted
from opguard.flags.errors import FlagsError
from opguard.flags.locations import _of_module, resolve_location

if TYPE_CHECKING:
    from torch import Tensor

    from opguard.flags._traced import Location
    from opguard.flags.config import ErrorConfig

# GuardedTensor, bound by _guarded_record. Here, and not looked up in _traced, for a guard less.
_Guarded: Any = ()

_ops: Any = torch.ops.opguard
_check = _ops.flags_check.default
_check_new = _ops.flags_check_new.default
_push = _ops.flags_push.default
_push_all = _ops.flags_push_all.default
_merge = _ops.flags_merge.default

_CHECKS = {"both": 6, "pos": 2, "none": 0}


def checks_of(inf: str, nan: int) -> int:
    """The mask of checks that ``inf`` asks for, with bit 1 (NaN) as in ``nan``."""
    if not isinstance(inf, str) or inf not in _CHECKS:
        raise FlagsError(
            f'expected inf to be "both", "pos" (-inf is legal, as masked logits have it) or "none",'
            f" got {inf!r}"
        )
    return _CHECKS[inf] | nan


def _slot(place: int, code: int, severity: int | None, default_severity: int) -> int:
    return _traced.slot_of(place, code, severity, default_severity)


def _id(place: int) -> int:
    return _traced.location_of(place)


# What torch.compiler.assume_constant_result sets; that imports torch._dynamo, which takes 0.8 s.
for _function in (checks_of, _slot, _id):
    vars(_function)["_dynamo_marked_constant"] = True


def _number(value: Any) -> Any:
    # An argument of the graph that was another number before is none that Dynamo knows, until it
    # is asked for as an index: then the graph is this number's.
    return index(value) if type(value) is int else value


def _place(location: Location) -> int:
    return _id(index(location)) if type(location) is int else resolve_location(location)


def check(
    x: Tensor, location: Location, f: Tensor | None, checks: int, config: ErrorConfig | None
) -> Tensor:
    """:func:`opguard.flags._engine.check`."""
    if isinstance(x, _Guarded) or isinstance(f, _Guarded):
        using = _config._current if config is None else config
        return _traced.check(x, location, f, checks, using.key)
    key = (_config._current if config is None else config).key
    place = _of_module(location) if isinstance(location, Module) else _place(location)
    result = _check_new(x, place, checks, key) if f is None else _check(f, x, place, checks, key)
    return noted(result) if is_traced() else result  # type: ignore[no-any-return]


def push(  # noqa: PLR0917  (as _engine.push)
    f: Tensor,
    where: Tensor | None,
    code: int,
    location: Location,
    severity: int | None,
    config: ErrorConfig | None,
) -> Tensor:
    """:func:`opguard.flags._engine.push`."""
    using = _config._current if config is None else config
    if isinstance(f, _Guarded) or isinstance(where, _Guarded):
        otherwise = int(using.default_severity)
        return _traced.push(f, where, code, location, severity, using.key, otherwise)
    code, severity = _number(code), _number(severity)
    # Read only for the codes without a severity of their own: what is read is guarded.
    otherwise = int(using.default_severity) if code in {4, 8, 12, 15} else 2
    place = _of_module(location) if isinstance(location, Module) else _place(location)
    slot = _slot(place, code, severity, otherwise)
    if where is None:
        result = _push_all(f, slot, using.key)
    elif where.dtype is not torch.bool or where.dim() != 1:
        return _traced.push(f, where, code, location, severity, using.key, otherwise)
    else:
        result = _push(f, where, slot, using.key)
    return noted(result) if is_traced() else result  # type: ignore[no-any-return]


def merge(fs: Sequence[Tensor], key: int) -> Tensor:
    """:func:`opguard.flags._engine.merge`."""
    if len(fs) < 2 or _traced._any_guarded(fs):
        return _traced.merge(fs, key)
    result = _merge(fs, key)
    return noted(result) if is_traced() else result  # type: ignore[no-any-return]


def merge_all(fs: Sequence[Tensor], config: ErrorConfig | None) -> Tensor:
    """``err.merge``, without a call of :func:`merge` for the usual two or more."""
    key = (_config._current if config is None else config).key
    if len(fs) < 2 or is_traced() or _traced._any_guarded(fs):
        return merge(fs, key)
    return _merge(fs, key)  # type: ignore[no-any-return]
