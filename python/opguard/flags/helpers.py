"""What a model calls on its own tensors: detect, record, ask and repair, in one call each.

``module`` says where: an ``nn.Module``, a name, an id 0..1023, or None for "Unknown". Detection
returns flags ``(N, words)``; without ``f`` they are new, in the dtype and width of ``config``
(default: the current configuration). A name that ends in an underscore writes into ``f`` and
returns it; no other changes what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.compiler import is_dynamo_compiling

from opguard import _C
from opguard.flags import _engine, _traced
from opguard.flags import config as _config
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.constants import CODE_MASK, CODE_SHIFT
from opguard.flags.errors import BatchMismatchError, CodeError, FlagsError
from opguard.flags.locations import clear_location_cache, clear_warn_cache, resolve_location

if TYPE_CHECKING:
    from torch import Tensor

    from opguard.flags._traced import Location
    from opguard.flags.config import ErrorConfig

__all__ = [
    "clear_location_cache",
    "clear_warn_cache",
    "find",
    "fix",
    "flag_inf",
    "flag_inf_",
    "flag_nan",
    "flag_nan_",
    "flag_nan_and_inf",
    "flag_nan_and_inf_",
    "flag_oob_indices",
    "has_err",
    "push",
    "push_",
    "resolve_location",
]

Fallback: TypeAlias = "float | Tensor | Callable[[Tensor], Tensor]"

# Bits of the checks: 1 NaN, 2 +Inf, 4 -Inf.
_INFS = {"both": 6, "pos": 2, "none": 0}


def _infs(inf: str) -> int:
    checks = _INFS.get(inf) if isinstance(inf, str) else None
    if checks is None:
        raise FlagsError(f'expected inf to be "both", "pos" or "none", got {inf!r}')
    return checks


# The functions below are the outermost of the hot path, so each goes into C by itself.


def flag_nan(
    tensor: Tensor, module: Location, f: Tensor | None = None, config: ErrorConfig | None = None
) -> Tensor:
    """Flags with NAN (CRITICAL) for every sample of ``tensor`` (N, ...) that holds a NaN."""
    key = (_config._current if config is None else config).key
    if is_dynamo_compiling():
        return _traced.check(tensor, module, f, 1, key)
    return _C.flags_check(tensor, module, f, 1, key)


def flag_nan_(
    tensor: Tensor, module: Location, f: Tensor, config: ErrorConfig | None = None
) -> Tensor:
    """:func:`flag_nan` written into ``f``, which is returned."""
    key = (_config._current if config is None else config).key
    if is_dynamo_compiling():
        return _traced.check_(tensor, module, f, 1, key)
    return _C.flags_check_(tensor, module, f, 1, key)


def flag_inf(
    tensor: Tensor,
    module: Location,
    f: Tensor | None = None,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """Flags with INF (CRITICAL) for every sample of ``tensor`` (N, ...) that holds an infinity.

    ``inf``: ``"both"``, ``"pos"`` (-inf is a legal value of masked logits) or ``"none"``.
    """
    key = (_config._current if config is None else config).key
    checks = 6 if inf == "both" else _infs(inf)
    if is_dynamo_compiling():
        return _traced.check(tensor, module, f, checks, key)
    return _C.flags_check(tensor, module, f, checks, key)


def flag_inf_(
    tensor: Tensor,
    module: Location,
    f: Tensor,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """:func:`flag_inf` written into ``f``, which is returned."""
    key = (_config._current if config is None else config).key
    checks = 6 if inf == "both" else _infs(inf)
    if is_dynamo_compiling():
        return _traced.check_(tensor, module, f, checks, key)
    return _C.flags_check_(tensor, module, f, checks, key)


def flag_nan_and_inf(
    tensor: Tensor,
    module: Location,
    f: Tensor | None = None,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """:func:`flag_nan` and then :func:`flag_inf`, in one pass over ``tensor``."""
    key = (_config._current if config is None else config).key
    checks = 7 if inf == "both" else 1 | _infs(inf)
    if is_dynamo_compiling():
        return _traced.check(tensor, module, f, checks, key)
    return _C.flags_check(tensor, module, f, checks, key)


def flag_nan_and_inf_(
    tensor: Tensor,
    module: Location,
    f: Tensor,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """:func:`flag_nan_and_inf` written into ``f``, which is returned."""
    key = (_config._current if config is None else config).key
    checks = 7 if inf == "both" else 1 | _infs(inf)
    if is_dynamo_compiling():
        return _traced.check_(tensor, module, f, checks, key)
    return _C.flags_check_(tensor, module, f, checks, key)


def flag_oob_indices(
    indices: Tensor,
    num_embeddings: int,
    module: Location,
    f: Tensor | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """Flags with OUT_OF_BOUNDS (ERROR) where a sample of ``indices`` leaves 0..num_embeddings-1.

    ``indices`` (N, ...) of any integer dtype; nothing is looked up and nothing raised.
    """
    key = (_config._current if config is None else config).key
    return _engine.index(indices, num_embeddings, module, f, key)


def push(
    f: Tensor,
    code: int,
    module: Location,
    *,
    where: Tensor | None = None,
    severity: int | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """``f`` with one error recorded in the samples where ``where`` (N,) bool says so, or in all.

    ``severity`` None: the code's own (``ErrorConfig.default_severity`` for codes without one).
    """
    using = _config._current if config is None else config
    if is_dynamo_compiling():
        return _traced.push(
            f, where, code, module, severity, using.key, int(using.default_severity)
        )
    if severity is None and code in (4, 8, 12, 15):
        severity = int(using.default_severity)
    return _C.flags_push(f, where, code, module, severity, using.key)


def push_(
    f: Tensor,
    code: int,
    module: Location,
    *,
    where: Tensor | None = None,
    severity: int | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """:func:`push` written into ``f``, which is returned."""
    using = _config._current if config is None else config
    if is_dynamo_compiling():
        return _traced.push_(
            f, where, code, module, severity, using.key, int(using.default_severity)
        )
    if severity is None and code in (4, 8, 12, 15):
        severity = int(using.default_severity)
    return _C.flags_push_(f, where, code, module, severity, using.key)


def find(code: int, f: Tensor, config: ErrorConfig | None = None) -> Tensor:
    """(N,) bool: the sample holds an error of this code, in whichever slot of ``f``."""
    if not 0 <= code <= CODE_MASK >> CODE_SHIFT:
        raise CodeError(f"expected an error code from 0 to 15, got {code}")
    return _engine.find(f, CODE_MASK, code << CODE_SHIFT)


def has_err(f: Tensor) -> bool:
    """Whether any sample holds an error, as a Python bool, for the boundary: it waits."""
    return bool(_engine.is_err(f).any())


def _fallback(tensor: Tensor, fallback: Fallback) -> Tensor:
    value = fallback(tensor) if callable(fallback) else fallback
    if isinstance(value, torch.Tensor):
        return value.to(dtype=tensor.dtype, device=tensor.device)
    if isinstance(value, (int, float, complex)):
        return torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    raise FlagsError(
        "expected fallback to be a number, a tensor, or a function of the tensor that gives one,"
        f" got {type(value).__name__}"
    )


def fix(
    tensor: Tensor,
    f: Tensor,
    module: Location,
    fallback: Fallback = 0.0,
    config: ErrorConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``tensor`` with every sample that has an error replaced whole, and ``f`` that says so.

    ``fallback`` is a number, a tensor that broadcasts to ``tensor``'s shape, or a function that
    makes one of ``tensor``. Each replaced sample gets FALLBACK_VALUE (WARN). The dtype stays; for
    the single values that are not finite see ``err.replace``.
    """
    bad = _engine.is_err(f)
    samples = tensor.shape[0] if tensor.dim() else 1
    if bad.shape[0] != samples:
        raise BatchMismatchError(
            f"expected tensor to hold the {bad.shape[0]} samples of the flags, it holds {samples}"
        )
    rows = bad.view(-1, *[1] * (tensor.dim() - 1)) if tensor.dim() else bad[0]
    fixed = torch.where(rows, _fallback(tensor, fallback), tensor)
    if fixed.shape != tensor.shape:
        raise FlagsError(
            f"expected a fallback that broadcasts to {tuple(tensor.shape)}, it makes"
            f" {tuple(fixed.shape)} of it"
        )
    key = (_config._current if config is None else config).key
    code = ErrorCode.FALLBACK_VALUE
    return fixed, _engine.push(f, bad, code, module, Severity.WARN, key)
