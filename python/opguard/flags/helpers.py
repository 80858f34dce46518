"""What a model calls on its own tensors: detect, record, ask and repair, in one call each.

``module`` says where: an ``nn.Module``, a name, an id 0..1023, or None for "Unknown". Detection
returns flags ``(N, words)``; without ``flags`` they are new, in the dtype and width of ``config``
(default: the current configuration). A name that ends in an underscore writes into ``flags`` and
returns it; no other changes what it is given.

A :class:`GuardedTensor` needs no ``flags`` and comes back with more of its own, as in
``flag_nan(g, loc)`` or ``fix(g)``. In the place of ``flags`` it stands for its flags. What is
written in place are its own flags, unless some are given; its data is never written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from torch.compiler import is_dynamo_compiling

from opguard import _C
from opguard.flags import _engine, _traced
from opguard.flags import config as _config
from opguard.flags._compiled import check as compiled_check
from opguard.flags._compiled import checks_of
from opguard.flags._compiled import push as compiled_push
from opguard.flags._traced import code_bits
from opguard.flags.combinators import recover_with_fallback
from opguard.flags.constants import CODE_MASK, CODE_SHIFT
from opguard.flags.errors import FlagsError
from opguard.flags.guarded import GuardedTensor
from opguard.flags.indexing import guarded_embedding, guarded_gather, guarded_index_select
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
    "flag_nan_inf",
    "flag_oob_indices",
    "guarded_embedding",
    "guarded_gather",
    "guarded_index_select",
    "has_err",
    "push",
    "push_",
    "resolve_location",
]

Codes: TypeAlias = "int | Iterable[int] | None"
Fallback: TypeAlias = "complex | Tensor | Callable[[], complex | Tensor]"


# Codes without a severity of their own. A set: what is no number is looked up in it as well.
_WITHOUT_SEVERITY = frozenset((4, 8, 12, 15))


def _place(module: Location, location: Location) -> Location:
    if module is not None:
        raise FlagsError(f"expected module or location, got both: {module!r} and {location!r}")
    return location


# The functions below are the outermost of the hot path, so each goes into C by itself.


def flag_nan(
    tensor: Tensor, module: Location, flags: Tensor | None = None, config: ErrorConfig | None = None
) -> Tensor:
    """Flags with NAN (CRITICAL) for every sample of ``tensor`` (N, ...) that holds a NaN."""
    if is_dynamo_compiling():
        return compiled_check(tensor, module, flags, 1, config)
    key = (_config._current if config is None else config).key
    return _C.flags_check(tensor, module, flags, 1, key)


def flag_nan_(
    tensor: Tensor, module: Location, flags: Tensor | None = None, config: ErrorConfig | None = None
) -> Tensor:
    """:func:`flag_nan` written into ``flags``, which is returned."""
    key = (_config._current if config is None else config).key
    if is_dynamo_compiling():
        return _traced.check_(tensor, module, flags, 1, key)
    return _C.flags_check_(tensor, module, flags, 1, key)


def flag_inf(
    tensor: Tensor,
    module: Location,
    flags: Tensor | None = None,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """Flags with INF (CRITICAL) for every sample of ``tensor`` (N, ...) that holds an infinity.

    ``inf``: ``"both"``, ``"pos"`` (-inf is a legal value of masked logits) or ``"none"``.
    """
    if is_dynamo_compiling():
        return compiled_check(tensor, module, flags, checks_of(inf, 0), config)
    key = (_config._current if config is None else config).key
    checks = 6 if inf == "both" else checks_of(inf, 0)
    return _C.flags_check(tensor, module, flags, checks, key)


def flag_inf_(
    tensor: Tensor,
    module: Location,
    flags: Tensor | None = None,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """:func:`flag_inf` written into ``flags``, which is returned."""
    key = (_config._current if config is None else config).key
    checks = 6 if inf == "both" else checks_of(inf, 0)
    if is_dynamo_compiling():
        return _traced.check_(tensor, module, flags, checks, key)
    return _C.flags_check_(tensor, module, flags, checks, key)


def flag_nan_and_inf(
    tensor: Tensor,
    module: Location,
    flags: Tensor | None = None,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """:func:`flag_nan` and then :func:`flag_inf`, in one pass over ``tensor``."""
    if is_dynamo_compiling():
        return compiled_check(tensor, module, flags, checks_of(inf, 1), config)
    key = (_config._current if config is None else config).key
    checks = 7 if inf == "both" else checks_of(inf, 1)
    return _C.flags_check(tensor, module, flags, checks, key)


def flag_nan_and_inf_(
    tensor: Tensor,
    module: Location,
    flags: Tensor | None = None,
    config: ErrorConfig | None = None,
    *,
    inf: str = "both",
) -> Tensor:
    """:func:`flag_nan_and_inf` written into ``flags``, which is returned."""
    key = (_config._current if config is None else config).key
    checks = 7 if inf == "both" else checks_of(inf, 1)
    if is_dynamo_compiling():
        return _traced.check_(tensor, module, flags, checks, key)
    return _C.flags_check_(tensor, module, flags, checks, key)


flag_nan_inf = flag_nan_and_inf


def flag_oob_indices(
    indices: Tensor,
    num_embeddings: int,
    module: Location,
    flags: Tensor | None = None,
    config: ErrorConfig | None = None,
) -> Tensor:
    """Flags with OUT_OF_BOUNDS (ERROR) where a sample of ``indices`` leaves 0..num_embeddings-1.

    ``indices`` (N, ...) of any integer dtype; nothing is looked up and nothing raised.
    """
    key = (_config._current if config is None else config).key
    return _engine.index(indices, num_embeddings, module, flags, key)


def push(
    flags: Tensor,
    code: int,
    module: Location = None,
    *,
    where: Tensor | None = None,
    severity: int | None = None,
    config: ErrorConfig | None = None,
    location: Location = None,
) -> Tensor:
    """``flags`` with one error more, in the samples where ``where`` (N,) bool says so, or in all.

    ``severity`` None: the code's own (``ErrorConfig.default_severity`` for codes without one).
    ``location`` is another name of ``module``.
    """
    if location is not None:
        module = _place(module, location)
    if is_dynamo_compiling():
        return compiled_push(flags, where, code, module, severity, config)
    using = _config._current if config is None else config
    if severity is None and code in _WITHOUT_SEVERITY:
        severity = int(using.default_severity)
    return _C.flags_push(flags, where, code, module, severity, using.key)


def push_(
    flags: Tensor,
    code: int,
    module: Location = None,
    *,
    where: Tensor | None = None,
    severity: int | None = None,
    config: ErrorConfig | None = None,
    location: Location = None,
) -> Tensor:
    """:func:`push` written into ``flags``, which is returned."""
    if location is not None:
        module = _place(module, location)
    using = _config._current if config is None else config
    if is_dynamo_compiling():
        return _traced.push_(
            flags, where, code, module, severity, using.key, int(using.default_severity)
        )
    if severity is None and code in _WITHOUT_SEVERITY:
        severity = int(using.default_severity)
    return _C.flags_push_(flags, where, code, module, severity, using.key)


def find(code: int, flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
    """(N,) bool: the sample holds an error of this code, in whichever slot of ``flags``."""
    return _engine.find(flags, CODE_MASK << CODE_SHIFT, code_bits(code))


def has_err(flags: Tensor) -> bool:
    """Whether any sample holds an error, as a Python bool, for the boundary: it waits."""
    return bool(_engine.is_err(flags).any())


# Whether an argument was given at all.
_NOT_GIVEN: Any = object()


@overload
def fix(
    tensor: GuardedTensor,
    fallback: Fallback = 0.0,
    location: Location = None,
    codes: Codes = None,
    config: ErrorConfig | None = None,
    *,
    module: Location = None,
) -> GuardedTensor: ...
@overload
def fix(
    tensor: Tensor,
    flags: Tensor,
    module: Location,
    fallback: Fallback = 0.0,
    config: ErrorConfig | None = None,
    *,
    location: Location = None,
    codes: Codes = None,
) -> tuple[Tensor, Tensor]: ...
def fix(tensor: Any, *args: Any, **options: Any) -> Any:
    """``tensor`` with every sample that has an error replaced whole, and ``flags`` that says so.

    Two ways to call it: ``fix(tensor, flags, module, fallback=0.0, config=None)`` gives values and
    flags; ``fix(g, fallback=0.0, location=None, codes=None, config=None)`` of a GuardedTensor gives
    one back. ``location`` is another name of ``module``.

    Args:
        tensor: the values (N, ...).
        flags: (N, words); beside a GuardedTensor, another one or by keyword: further flags.
        module: where the replacement is recorded, as FALLBACK_VALUE (WARN) in each such sample.
        fallback: a number, a tensor that broadcasts to ``tensor``'s shape, or a function without
            arguments that makes one of these. The dtype stays, so a number that it cannot hold is
            an error. ``err.replace`` is for single values.
        codes: an error code or several: only samples with one of these are replaced. None: any.
    """
    pair = not isinstance(tensor, GuardedTensor) or "flags" in options
    pair = pair or (len(args) > 0 and isinstance(args[0], GuardedTensor))
    if pair:
        return _fix_pair(tensor, *args, **options)
    return _fix_guarded(tensor, *args, **options)


def _fix_pair(
    tensor: Tensor,
    flags: Tensor,
    module: Location = _NOT_GIVEN,
    fallback: Fallback = 0.0,
    config: ErrorConfig | None = None,
    *,
    location: Location = None,
    codes: Codes = None,
) -> Any:
    if module is _NOT_GIVEN or location is not None:
        module = _place(None if module is _NOT_GIVEN else module, location)
    value = fallback() if callable(fallback) else fallback
    if codes is None:
        return recover_with_fallback(flags, tensor, value, module, config=config)
    return recover_with_fallback(flags, tensor, value, module, config=config, codes=codes)


def _fix_guarded(
    tensor: GuardedTensor,
    fallback: Fallback = 0.0,
    location: Location = None,
    codes: Codes = None,
    config: ErrorConfig | None = None,
    *,
    module: Location = None,
) -> Any:
    if module is not None:
        location = _place(location, module) if location is not None else module
    value = fallback() if callable(fallback) else fallback
    return recover_with_fallback(tensor, value, location, config=config, codes=codes)


# To whoever asks: the more usual of the two.
vars(fix)["__signature__"] = inspect.signature(_fix_pair)
