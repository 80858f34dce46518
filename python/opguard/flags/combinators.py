"""Values and flags together: filter, transform, chain, guard, recover. ``err`` has them all.

``flags`` are ``(N, words)``, ``tensor`` is ``(N, ...)`` (or 0-d with N = 1). What is chosen per
sample is chosen by ``torch.where``, so its gradients are where's. A tensor keeps its dtype: a fill
that the dtype cannot hold is an error. Except for ``take_ok``, ``take_err``, ``get_ok``,
``get_err`` and the partitions, whose results have as many rows as there are such samples, shapes
stay, as a compiled graph wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opguard.flags import _engine
from opguard.flags._traced import Location
from opguard.flags._words import as_words
from opguard.flags.codes import ErrorCode
from opguard.flags.config import ErrorConfig, get_config
from opguard.flags.errors import BatchMismatchError, FlagsError

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


def _rows(mask: Tensor, tensor: Tensor) -> Tensor:
    """mask (N,) with the dimensions of tensor (N, ...), so that it broadcasts over its samples."""
    samples = tensor.shape[0] if tensor.dim() else 1
    if samples != mask.shape[0]:
        raise BatchMismatchError(
            f"expected a tensor of the {mask.shape[0]} samples of the flags, got {samples} (shape"
            f" {tuple(tensor.shape)})"
        )
    return mask.reshape(mask.shape[:1] + (1,) * (tensor.dim() - 1) if tensor.dim() else ())


def _taken(mask: Tensor, tensor: Tensor) -> Tensor:
    _rows(mask, tensor)
    return (tensor if tensor.dim() else tensor.reshape(1))[mask]


def _flags_taken(flags: Tensor, mask: Tensor) -> Tensor:
    return as_words(flags)[mask].view(flags.dtype)


def get_ok(flags: Tensor) -> Tensor:
    """The flags of the samples without errors, ``(number of them, words)``."""
    return _flags_taken(flags, _engine.is_ok(flags))


def get_err(flags: Tensor) -> Tensor:
    """The flags of the samples with errors, ``(number of them, words)``."""
    return _flags_taken(flags, _engine.is_err(flags))


def take_ok(flags: Tensor, tensor: Tensor) -> Tensor:
    """The samples of ``tensor`` without errors."""
    return _taken(_engine.is_ok(flags), tensor)


def take_err(flags: Tensor, tensor: Tensor) -> Tensor:
    """The samples of ``tensor`` with errors."""
    return _taken(_engine.is_err(flags), tensor)


def partition(flags: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`take_ok` and :func:`take_err` of one tensor."""
    bad = _engine.is_err(flags)
    return _taken(~bad, tensor), _taken(bad, tensor)


def partition_many(
    flags: Tensor, *tensors: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The samples without errors of each tensor, then those with errors of each."""
    bad = _engine.is_err(flags)
    ok = ~bad
    return tuple(_taken(ok, t) for t in tensors), tuple(_taken(bad, t) for t in tensors)


def take_ok_p(flags: Tensor, tensor: Tensor, fill: Tensor | complex = 0.0) -> Tensor:
    """``tensor`` with ``fill`` in the samples with errors: the shape stays."""
    return _filled(tensor, _rows(_engine.is_err(flags), tensor), fill, "fill")


def take_err_p(flags: Tensor, tensor: Tensor, fill: Tensor | complex = 0.0) -> Tensor:
    """``tensor`` with ``fill`` in the samples without errors: the shape stays."""
    return _filled(tensor, _rows(_engine.is_ok(flags), tensor), fill, "fill")


def map_ok(flags: Tensor, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(tensor)``, of the whole batch, in the samples without errors; the others as they are."""
    ok = _rows(_engine.is_ok(flags), tensor)
    return _chosen(ok, fn(tensor), tensor, "what map_ok's fn returns")


def map_err(flags: Tensor, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(tensor)``, of the whole batch, in the samples with errors; the others as they are."""
    bad = _rows(_engine.is_err(flags), tensor)
    return _chosen(bad, fn(tensor), tensor, "what map_err's fn returns")


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
    changed = fn(flags)
    if changed.dtype is not flags.dtype or changed.shape != flags.shape:
        raise FlagsError(
            f"expected map_err_flags' fn to return flags of shape {tuple(flags.shape)} and"
            f" {flags.dtype}, got {tuple(changed.shape)} and {changed.dtype}"
        )
    return _flags_where(_engine.is_err(flags), changed, flags)


Chained: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


def and_then(
    flags: Tensor, tensor: Tensor, fn: Chained, config: ErrorConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``fn(tensor)`` gives values and flags: both count in samples without errors so far.

    A sample with errors keeps its value, and nothing is added to its flags.
    """
    ok = _engine.is_ok(flags)
    value, more = fn(tensor)
    more = _flags_where(ok, more, None)
    result = _chosen(_rows(ok, tensor), value, tensor, "the value of and_then's fn")
    return result, _engine.merge((flags, more), _key(config))


def bind(
    flags: Tensor, tensor: Tensor, fn: Chained, config: ErrorConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``fn(tensor)`` gives values and flags: its errors count in every sample.

    Its value counts in samples without errors so far.
    """
    ok = _engine.is_ok(flags)
    value, more = fn(tensor)
    result = _chosen(_rows(ok, tensor), value, tensor, "the value of bind's fn")
    return result, _engine.merge((flags, more), _key(config))


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
    tensor: Tensor,
    predicate: Callable[[Tensor], Tensor],
    code: int,
    location: Location,
    severity: int | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """Records ``code`` in the samples where ``predicate(tensor)``, a mask ``(N,)``, is false."""
    return ensure_mask(flags, predicate(tensor), code, location, severity, config)


def recover_with_fallback(
    flags: Tensor,
    tensor: Tensor,
    fallback: Tensor | complex,
    location: Location,
    *,
    config: ErrorConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``fallback`` in the samples with errors, and FALLBACK_VALUE recorded in their flags."""
    config = get_config() if config is None else config
    bad = _engine.is_err(flags)
    values = _filled(tensor, _rows(bad, tensor), fallback, "fallback")
    code = ErrorCode.FALLBACK_VALUE
    return values, _engine.push(
        flags, bad, code, location, None, config.key, config.default_severity
    )


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
