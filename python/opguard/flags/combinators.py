"""Values and flags together: filter, transform, chain, guard, recover. ``err`` has them all.

``flags`` are ``(N, words)``, ``tensor`` is ``(N, ...)`` (or 0-d with N = 1). What is chosen per
sample is chosen by ``torch.where``, so its gradients are where's. A tensor keeps its dtype: a fill
that the dtype cannot hold is an error. Except for ``take_ok``, ``take_err``, ``get_ok``,
``get_err`` and the partitions, whose results have as many rows as there are such samples, shapes
stay, as a compiled graph wants it.

A :class:`GuardedTensor` is tensor and flags in one: ``take_ok(g)``, ``recover_with_fallback(g, 0.0,
loc)``, and what gives values or values and flags gives one GuardedTensor. In the place of the flags
alone it stands for its flags. Given beside flags of its own, it gets those too, and what is a pair
for tensors is a pair: the GuardedTensor and its flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opguard.flags import _engine
from opguard.flags import _guarded_record as _record
from opguard.flags._traced import Location, code_bits
from opguard.flags._words import as_words
from opguard.flags.codes import ErrorCode
from opguard.flags.config import ErrorConfig, get_config
from opguard.flags.constants import CODE_MASK, CODE_SHIFT
from opguard.flags.errors import BatchMismatchError, FlagsError
from opguard.flags.guarded import GuardedTensor

__all__ = [
    "and_then",
    "bind",
    "ensure_mask",
    "get_err",
    "get_ok",
    "guard",
    "map_err",
    "map_err_flags",
    "map_ok",
    "partition",
    "partition_many",
    "recover_with_fallback",
    "replace",
    "take_err",
    "take_err_p",
    "take_ok",
    "take_ok_p",
]

# Floats whose largest bit patterns are numbers or NaN, so that an infinity becomes something else.
_WITHOUT_INF = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


_CODE_BITS = CODE_MASK << CODE_SHIFT

# No argument: None is a location.
_MISSING: Any = object()


def _is_inf(value: Any) -> bool:
    # By comparing, as math.isinf and math.isnan take no number that a compiled graph keeps open.
    return bool(value in (math.inf, -math.inf))


def _is_nan(value: Any) -> bool:
    return bool(value != value)  # noqa: PLR0124


def _holds(dtype: torch.dtype, value: Any) -> bool:
    if isinstance(value, complex) or dtype.is_complex:
        return dtype.is_complex
    if dtype.is_floating_point:
        if _is_inf(value):
            return dtype not in _WITHOUT_INF
        return _is_nan(value) or abs(value) <= torch.finfo(dtype).max
    if _is_inf(value) or _is_nan(value) or value != int(value):
        return False
    if dtype is torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(dtype)
    return bool(limits.min <= value <= limits.max)


def _filled(tensor: Tensor, mask: Tensor, fill: Tensor | complex, name: str) -> Tensor:
    """``tensor`` with ``fill`` where mask, in the tensor's dtype."""
    dtype = tensor.dtype
    if isinstance(fill, Tensor):
        if fill.dtype is not dtype and not torch.can_cast(fill.dtype, dtype):
            raise FlagsError(
                f"expected {name} to be a tensor that converts to {dtype}, got one of {fill.dtype}"
            )
        _fits(fill, tensor, name)
        return torch.where(mask, fill.to(device=tensor.device, dtype=dtype), tensor)
    if not isinstance(fill, int | float | complex):
        raise FlagsError(f"expected {name} to be a number or a tensor, got {type(fill).__name__}")
    if not _holds(dtype, fill):
        raise FlagsError(
            f"expected {name} to be a number that {dtype} holds, got {fill}; choose another or"
            " convert the tensor first"
        )
    if not dtype.is_floating_point and not dtype.is_complex:
        fill = int(fill.real)
    return torch.where(mask, torch.full((), fill, dtype=dtype, device=tensor.device), tensor)


def _fits(value: Tensor, tensor: Tensor, name: str) -> None:
    ours, theirs = tuple(tensor.shape), tuple(value.shape)
    tail = ours[len(ours) - len(theirs) :]
    if len(theirs) > len(ours) or any(
        there not in (1, here) for there, here in zip(theirs, tail, strict=True)
    ):
        raise FlagsError(f"expected {name} to have (or broadcast to) shape {ours}, got {theirs}")


def _chosen(mask: Tensor, value: Tensor, tensor: Tensor, name: str) -> Tensor:
    """value where mask, else tensor; value is what a user's function returned."""
    if not isinstance(value, Tensor):
        raise FlagsError(f"expected {name} to be a tensor, got {type(value).__name__}")
    _fits(value, tensor, name)
    return torch.where(mask, value, tensor)


def _tensor(flags: Tensor, tensor: Any, name: str) -> Any:
    """``tensor``; the GuardedTensor in the place of the flags where it was left out."""
    if tensor is None:
        if isinstance(flags, GuardedTensor):
            return flags
        raise TypeError(
            f"expected {name} to get flags and a tensor, or one GuardedTensor, got"
            f" {type(flags).__name__} alone"
        )
    return tensor


def _rows(mask: Tensor, tensor: Tensor) -> Tensor:
    """mask (N,) with the dimensions of tensor (N, ...), so that it broadcasts over its samples."""
    if isinstance(tensor, GuardedTensor):
        return _record.spread(tensor, mask)
    samples = tensor.shape[0] if tensor.dim() else 1
    if samples != mask.shape[0]:
        raise BatchMismatchError(
            f"expected a tensor of the {mask.shape[0]} samples of the flags, got {samples} (shape"
            f" {tuple(tensor.shape)})"
        )
    return mask.reshape(mask.shape[:1] + (1,) * (tensor.dim() - 1) if tensor.dim() else ())


def _taken(mask: Tensor, tensor: Tensor) -> Tensor:
    if isinstance(tensor, GuardedTensor):
        return _record.rows_first(tensor)[mask]
    _rows(mask, tensor)
    return (tensor if tensor.dim() else tensor.reshape(1))[mask]


def _flags_taken(flags: Tensor, mask: Tensor) -> Tensor:
    flags = _record.flags_of(flags)
    return as_words(flags)[mask].view(flags.dtype)


def get_ok(flags: Tensor) -> Tensor:
    """The flags of the samples without errors, ``(number of them, words)``."""
    return _flags_taken(flags, _engine.is_ok(flags))


def get_err(flags: Tensor) -> Tensor:
    """The flags of the samples with errors, ``(number of them, words)``."""
    return _flags_taken(flags, _engine.is_err(flags))


def take_ok(flags: Tensor, tensor: Tensor | None = None) -> Tensor:
    """The samples of ``tensor`` without errors."""
    return _taken(_engine.is_ok(flags), _tensor(flags, tensor, "take_ok"))


def take_err(flags: Tensor, tensor: Tensor | None = None) -> Tensor:
    """The samples of ``tensor`` with errors."""
    return _taken(_engine.is_err(flags), _tensor(flags, tensor, "take_err"))


def partition(flags: Tensor, tensor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`take_ok` and :func:`take_err` of one tensor."""
    bad = _engine.is_err(flags)
    tensor = _tensor(flags, tensor, "partition")
    return _taken(~bad, tensor), _taken(bad, tensor)


def partition_many(
    flags: Tensor, *tensors: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The samples without errors of each tensor, then those with errors of each."""
    bad = _engine.is_err(flags)
    if not tensors and isinstance(flags, GuardedTensor):
        tensors = (flags,)
    ok = ~bad
    return tuple(_taken(ok, t) for t in tensors), tuple(_taken(bad, t) for t in tensors)


def _and_fill(flags: Tensor, tensor: Any, fill: Any, name: str) -> tuple[Any, Any]:
    """The tensor and the fill; of a GuardedTensor the fill comes second."""
    if tensor is not None and not isinstance(tensor, Tensor):
        return _tensor(flags, None, name), tensor
    return _tensor(flags, tensor, name), fill


def take_ok_p(
    flags: Tensor, tensor: Tensor | complex | None = None, fill: Tensor | complex = 0.0
) -> Tensor:
    """``tensor`` with ``fill`` in the samples with errors: the shape stays."""
    x, fill = _and_fill(flags, tensor, fill, "take_ok_p")
    return _filled(x, _rows(_engine.is_err(flags), x), fill, "fill")


def take_err_p(
    flags: Tensor, tensor: Tensor | complex | None = None, fill: Tensor | complex = 0.0
) -> Tensor:
    """``tensor`` with ``fill`` in the samples without errors: the shape stays."""
    x, fill = _and_fill(flags, tensor, fill, "take_err_p")
    return _filled(x, _rows(_engine.is_ok(flags), x), fill, "fill")


def _of_both(flags: Tensor, tensor: Any, fn: Any, name: str) -> tuple[Any, Any]:
    """The tensor and the function; of a GuardedTensor the function comes second."""
    if fn is None and not isinstance(tensor, Tensor):
        return _tensor(flags, None, name), tensor
    return tensor, fn


def _mapped(flags: Tensor, tensor: Any, fn: Any, mask: Tensor, name: str) -> Tensor:
    x, fn = _of_both(flags, tensor, fn, name)
    value = fn(x)
    result = _chosen(_rows(mask, x), value, x, f"what {name}'s fn returns")
    if isinstance(result, GuardedTensor) and isinstance(value, GuardedTensor):
        return _record.choose(result, mask, value, x)
    return result


def map_ok(
    flags: Tensor,
    tensor: Tensor | Callable[[Tensor], Tensor],
    fn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``fn(tensor)``, of the whole batch, in the samples without errors; the others as they are."""
    return _mapped(flags, tensor, fn, _engine.is_ok(flags), "map_ok")


def map_err(
    flags: Tensor,
    tensor: Tensor | Callable[[Tensor], Tensor],
    fn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``fn(tensor)``, of the whole batch, in the samples with errors; the others as they are."""
    return _mapped(flags, tensor, fn, _engine.is_err(flags), "map_err")


def _flags_where(mask: Tensor, flags: Tensor, otherwise: Tensor | None) -> Tensor:
    """Rows of ``flags`` where mask, else of ``otherwise`` (None: no errors), in flags' dtype."""
    words = as_words(flags)
    if words.shape[0] != mask.shape[0]:
        raise BatchMismatchError(
            f"expected flags of {mask.shape[0]} samples from the function, got {words.shape[0]}"
        )
    if otherwise is None:
        rest = torch.zeros((), dtype=words.dtype, device=words.device)
    else:
        rest = as_words(otherwise)
    return torch.where(mask.unsqueeze(-1), words, rest).view(flags.dtype)


def map_err_flags(flags: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(flags)`` in the samples with errors; the others stay without."""
    if isinstance(flags, GuardedTensor):
        return flags.with_flags(map_err_flags(flags.flags, fn))
    changed = fn(flags)
    if changed.dtype is not flags.dtype or changed.shape != flags.shape:
        raise FlagsError(
            f"expected map_err_flags' fn to return flags of shape {tuple(flags.shape)} and"
            f" {flags.dtype}, got {tuple(changed.shape)} and {changed.dtype}"
        )
    return _flags_where(_engine.is_err(flags), changed, flags)


Chained: TypeAlias = "Callable[[Tensor], tuple[Tensor, Tensor]] | Callable[[Tensor], Tensor]"


def and_then(
    flags: Tensor,
    tensor: Tensor | Chained,
    fn: Chained | None = None,
    config: ErrorConfig | None = None,
) -> Any:
    """``fn(tensor)`` gives values and flags: both count in samples without errors so far.

    A sample with errors keeps its value, and nothing is added to its flags. Of a GuardedTensor,
    ``and_then(g, fn)``: fn gets it without flags and gives one, or values and flags; what comes out
    is one GuardedTensor.
    """
    return _chained(flags, tensor, fn, config, "and_then")


def bind(
    flags: Tensor,
    tensor: Tensor | Chained,
    fn: Chained | None = None,
    config: ErrorConfig | None = None,
) -> Any:
    """``fn(tensor)`` gives values and flags: its errors count in every sample.

    Its value counts in samples without errors so far. ``bind(g, fn)`` as for :func:`and_then`.
    """
    return _chained(flags, tensor, fn, config, "bind")


def _chained(flags: Tensor, tensor: Any, fn: Any, config: ErrorConfig | None, name: str) -> Any:
    x, fn = _of_both(flags, tensor, fn, name)
    key = _key(config)
    if isinstance(x, GuardedTensor):
        g = x if x is flags else _record.merge((x, flags), key)
        result = _chained_guarded(g, fn, key, name)
        return result if x is flags else (result, _record.flags_of(result))
    flags = _record.flags_of(flags)
    ok = _engine.is_ok(flags)
    value, more = fn(x)
    if name == "and_then":
        more = _flags_where(ok, more, None)
    result = _chosen(_rows(ok, x), value, x, f"the value of {name}'s fn")
    return result, _engine.merge((flags, more), key)


def _chained_guarded(g: Tensor, fn: Any, key: int, name: str) -> Tensor:
    clean = _record.with_flags(g, torch.zeros_like(_record.flags_of(g)))
    ok = _engine.is_ok(g)
    value = fn(clean)
    found = []
    if isinstance(value, tuple):
        value, more = value
        found = [_record.flags_of(more)]
    if isinstance(value, GuardedTensor):
        found = [value.flags, *found]
    result = _chosen(_rows(ok, g), _record.data_of(value), g, f"the value of {name}'s fn")
    if name == "and_then":
        found = [_flags_where(ok, each, None) for each in found]
    return _record.merge([result, *found], key)


def _key(config: ErrorConfig | None) -> int:
    return (get_config() if config is None else config).key


def ensure_mask(  # noqa: PLR0917 - as documented
    flags: Tensor,
    ok_mask: Tensor,
    code: int,
    location: Location,
    severity: int | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """Records ``code`` in the samples where ``ok_mask`` ``(N,)`` is false."""
    if not isinstance(ok_mask, Tensor):
        raise FlagsError(
            "expected ok_mask, or what guard's predicate returns, to be a mask of shape (N,) in"
            f" bool, got {type(ok_mask).__name__}"
        )
    config = get_config() if config is None else config
    bad = ok_mask.logical_not()
    return _engine.push(flags, bad, code, location, severity, config.key, config.default_severity)


def guard(  # noqa: PLR0917
    flags: Tensor,
    tensor: Any,
    predicate: Any,
    code: Any = None,
    location: Any = None,
    severity: int | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """Records ``code`` in the samples where ``predicate(tensor)``, a mask ``(N,)``, is false.

    Of a GuardedTensor: ``guard(g, predicate, code, location)``.
    """
    if isinstance(flags, GuardedTensor) and not isinstance(tensor, Tensor):
        place, how = (location, severity) if code is None else (code, severity or location)
        return ensure_mask(flags, tensor(flags), predicate, place, how, config)
    return ensure_mask(flags, predicate(tensor), code, location, severity, config)


def recover_with_fallback(
    flags: Tensor,
    tensor: Tensor | complex,
    fallback: Any,
    location: Any = _MISSING,
    *,
    config: ErrorConfig | None = None,
    codes: int | Iterable[int] | None = None,
) -> Any:
    """``fallback`` in the samples with errors, and FALLBACK_VALUE recorded in their flags.

    ``codes``: only in samples with an error of one of these. Of a GuardedTensor:
    ``recover_with_fallback(g, fallback, location)``, which gives one back.
    """
    config = get_config() if config is None else config
    if location is _MISSING:
        g = _tensor(flags, None, "recover_with_fallback")
        return _recovered(g, _with_code(g, codes), tensor, fallback, config)
    if isinstance(tensor, GuardedTensor):
        g = _record.merge((tensor, flags), config.key)
        result = _recovered(g, _with_code(g, codes), fallback, location, config)
        return result, _record.flags_of(result)
    bad = _with_code(flags, codes)
    x: Any = tensor
    values = _filled(x, _rows(bad, x), fallback, "fallback")
    code = ErrorCode.FALLBACK_VALUE
    return values, _engine.push(
        flags, bad, code, location, None, config.key, config.default_severity
    )


def _with_code(flags: Tensor, codes: int | Iterable[int] | None) -> Tensor:
    """(N,) bool: samples with an error of one of these codes, with any for None."""
    if codes is None:
        return _engine.is_err(flags)
    found = None
    for code in (codes,) if isinstance(codes, int) else codes:
        has = _engine.find(flags, _CODE_BITS, code_bits(code))
        found = has if found is None else found | has
    return torch.zeros_like(_engine.is_err(flags)) if found is None else found


def _recovered(
    g: Tensor, bad: Tensor, fallback: Any, location: Location, config: ErrorConfig
) -> Tensor:
    """``fallback`` in the samples of a GuardedTensor where ``bad`` (n,), and flags that say so."""
    values = _filled(g, _rows(bad, g), fallback, "fallback")
    code = ErrorCode.FALLBACK_VALUE
    return _record.push(values, bad, code, location, None, config.key, config.default_severity)


ReplaceTarget: TypeAlias = "int | float | str"

_NAMED_TARGETS = ("nan", "inf", "posinf", "neginf")


def _is_real(target: Any) -> bool:
    return isinstance(target, int | float)


def _target_mask(t: Tensor, target: ReplaceTarget) -> Tensor | None:
    """Where t is the target, None for nowhere."""
    if target not in _NAMED_TARGETS if isinstance(target, str) else not _is_real(target):
        raise FlagsError(
            f"expected each of replace's targets to be err.NAN, err.INF, a number or one of"
            f" {', '.join(map(repr, _NAMED_TARGETS))}, got {target!r}"
        )
    inexact = t.is_floating_point() or t.is_complex()
    # An int 1 or 2 is err.NAN or err.INF; the numbers are 1.0 and 2.0.
    if type(target) is int and target in (ErrorCode.NAN, ErrorCode.INF):
        target = "nan" if target == ErrorCode.NAN else "inf"
    if isinstance(target, str) or _is_nan(target):
        if not inexact:
            return None
        if target == "posinf":
            return t == math.inf
        if target == "neginf":
            return t == -math.inf
        return t.isinf() if target == "inf" else t.isnan()
    if inexact:
        return t == target
    # Exactly: as a float, a large integer would equal its neighbours.
    return t == int(target) if _holds(t.dtype, target) else None


def replace(t: Tensor, value: complex = 0.0, *, targets: Iterable[ReplaceTarget]) -> Tensor:
    """``t`` with ``value`` in place of every element that is one of ``targets``.

    A target is ``err.NAN`` or ``"nan"``, ``err.INF`` or ``"inf"`` (both infinities), ``"posinf"``,
    ``"neginf"``, or a number. Since ``err.NAN`` and ``err.INF`` are the ints 1 and 2, the numbers
    one and two are written ``1.0`` and ``2.0``. The gradient is 0 where an element was replaced.
    """
    wanted = [targets] if isinstance(targets, str | int | float) else list(targets)
    if not wanted:
        raise FlagsError(
            "expected replace to get what to replace, got no targets; pass for instance"
            " targets=[err.NAN, err.INF]"
        )
    mask = None
    for target in wanted:
        found = _target_mask(t, target)
        if found is not None:
            mask = found if mask is None else mask | found
    if mask is None:
        mask = torch.zeros_like(t, dtype=torch.bool)
    return _filled(t, mask, value, "replace's value")
