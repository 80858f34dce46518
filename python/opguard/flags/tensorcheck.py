"""``@tensorcheck``: annotated tensors are checked, returned ones looked through for NaN and Inf.

**Checking** is of eager calls alone: not under torch.compile or torch.export, and not with
``python -O``. A single argument that does not fit raises the error of its kind, several raise one
error that is all of their kinds and an InvalidParameterError; a returned value likewise.

**Detection** needs flags among the returned values and holds in compiled code too. Which tensor is
flags is never read off its shape alone, because features may have it:

1. where the return annotation says ``Tensor[error_t, ...]``, that is where flags are;
2. else every tensor that one of opguard's flag functions made or recorded in, in this call;
3. else, where flags were made in this call and none of them is returned, the one tensor of exactly
   their dtype and shape, the last if there are more: ``f.clone()``, a ``torch.where`` of two.

What was made in a graph that is called inside is not known, and 2 and 3 go past it: so it is where
torch.compile breaks the graph in the decorated function. Without flags nothing is detected, and the
logger ``opguard.flags`` says so, once for each function whose last value looks like flags: annotate
it then. A returned GuardedTensor has its own, in which what is found in it is recorded.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any, TypeVar, get_args, get_origin, overload

import torch
from torch import Tensor, nn

from opguard.flags import _engine, _provenance
from opguard.flags._hints import Hints
from opguard.flags._tracing import never_a_frame
from opguard.flags._values import Checker
from opguard.flags.codes import ErrorCode
from opguard.flags.config import get_config
from opguard.flags.errors import CodeError
from opguard.flags.guarded import GuardedTensor
from opguard.flags.results import Err, Ok
from opguard.flags.typing.errors import InvalidReturnTypeError

__all__ = ["tensorcheck"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_log = logging.getLogger("opguard.flags")
_CHECKS = {ErrorCode.NAN: 1, ErrorCode.INF: 6}


@overload
def tensorcheck(func: _Function, /) -> _Function: ...
@overload
def tensorcheck(
    func: None = None, /, *, auto_detect: bool | Collection[int] | None = True
) -> Callable[[_Function], _Function]: ...
def tensorcheck(func: Any = None, /, *, auto_detect: bool | Collection[int] | None = True) -> Any:
    """Decorates a method or a function, also an async one; with or without parentheses.

    Args:
        auto_detect: True for NaN and Inf, False or None for neither, or a set of ``err.NAN`` and
            ``err.INF``. What is found in a returned floating tensor is recorded in the returned
            flags, sample by sample, at the module that the method belongs to, else under the
            function's name. A tensor without a batch dimension of the flags' size (a loss) counts
            for every sample.

    Raises:
        TypeError: on a class; on a generator function, whose values pass by, with detection.
        CodeError: a code in ``auto_detect`` that cannot be detected.
    """
    checks = _checks_of(auto_detect)
    if func is None:
        return lambda f: _decorate(f, checks, sys._getframe(1))
    return _decorate(func, checks, sys._getframe(1))


def _checks_of(auto_detect: bool | Collection[int] | None) -> int:
    if auto_detect is None or isinstance(auto_detect, bool):
        return 7 if auto_detect else 0
    checks = 0
    for code in auto_detect:
        if code not in _CHECKS:
            raise CodeError(
                "expected auto_detect to be a bool or codes that can be found in a tensor, err.NAN"
                f" and err.INF, got {ErrorCode.name(code)} ({code}); push others by hand"
            )
        checks |= _CHECKS[code]
    return checks


def _decorate(func: Any, checks: int, frame: FrameType) -> Any:
    if isinstance(func, staticmethod | classmethod):
        return type(func)(_decorate(func.__func__, checks, frame))
    if isinstance(func, type) or not callable(func):
        raise TypeError(f"expected @tensorcheck on a function or method, got {func!r}")
    if checks and (inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func)):
        raise TypeError(
            "expected @tensorcheck on a function that returns its tensors, got"
            f" {func.__qualname__}, which yields them; decorate what makes each value, or pass"
            " auto_detect=False"
        )
    call = _Call(func, checks, Hints(func, frame))
    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            checker = call.enter(args, kwargs)
            begin = _provenance.start()
            try:
                result = await func(*args, **kwargs)
            finally:
                seen = _provenance.stop(begin)
            return call.leave(result, seen, args, checker)

        return _own_code(run_async)

    if not checks:

        @functools.wraps(func)
        def run_validated(*args: Any, **kwargs: Any) -> Any:
            checker = call.enter(args, kwargs)
            return call.leave(func(*args, **kwargs), [], args, checker)

        return _own_code(run_validated)

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        checker = call.enter(args, kwargs)
        begin = _provenance.start()
        try:
            result = func(*args, **kwargs)
        finally:
            seen = _provenance.stop(begin)
        return call.leave(result, seen, args, checker)

    return _own_code(run)


def _own_code(run: Any) -> Any:
    # Dynamo keeps compiled code, and counts recompilations, by code object: without one of its own
    # every decorated function would count against the limit of all others.
    run.__code__ = run.__code__.replace(co_name=run.__name__)
    return run


class _Call:
    """What is known of a decorated function; :meth:`enter` and :meth:`leave` surround a call."""

    def __init__(self, func: Callable[..., Any], checks: int, hints: Hints) -> None:
        self.func = func
        self.name = func.__name__
        self.checks = checks
        self.hints = hints
        self.told = False

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Checker | None:
        """Checks the arguments; what goes on to the returned value, None where nothing is."""
        if not __debug__ or torch.compiler.is_compiling() or not self.hints.any():
            return None
        return Checker(self.name, self.hints, args, kwargs)

    def leave(
        self, result: Any, seen: list[Any], args: tuple[Any, ...], checker: Checker | None
    ) -> Any:
        """Records what is found in the result, checks it, and returns it."""
        if self.checks:
            if isinstance(result, Ok):
                result = Ok(self.detect(result.value, seen, args))
            elif not isinstance(result, Err):
                result = self.detect(result, seen, args)
        if checker is None:
            return result
        annotation = self.hints.returned()
        if _is_result(annotation):
            return self.check_result(result, annotation, checker)
        checker.check_return(result, annotation)
        return result

    def check_result(self, result: Any, annotation: Any, checker: Checker) -> Any:
        if isinstance(result, Err):
            if isinstance(result.error, BaseException):
                raise result.error
            return result
        if not isinstance(result, Ok):
            raise InvalidReturnTypeError(
                f"expected {self.name} to return Ok or Err, got {type(result).__qualname__}",
                expected="Result",
                actual=type(result).__qualname__,
                function=self.name,
            )
        inner = [a for a in get_args(annotation) if get_origin(a) is Ok or a is Ok]
        checker.check_return(result.value, next(iter(get_args(inner[0])), None) if inner else None)
        return result

    def detect(self, result: Any, seen: list[Any], args: tuple[Any, ...]) -> Any:
        guarded = []
        for tensor in _tensors(result):
            if isinstance(tensor, GuardedTensor):
                guarded.append(tensor)
        if guarded:
            result = self.record_guarded(result, guarded, args)
        places = self.hints.flag_places
        flags = None if places is False else _annotated(result, places)
        if flags is None:
            flags = _provenant(result, seen, not guarded)
        if not flags:
            if not guarded:
                self.tell(result)
            return result
        place = self.place(args)
        key = get_config().key
        last = recorded = flags[-1]
        for tensor in _tensors(result):
            if not _is_one_of(tensor, flags) and not isinstance(tensor, GuardedTensor):
                recorded = _record(recorded, tensor, place, self.checks, key)
        return result if recorded is last else _replaced(result, last, recorded)

    def record_guarded(
        self, result: Any, guarded: list[GuardedTensor], args: tuple[Any, ...]
    ) -> Any:
        """The result with what is found in its GuardedTensors in their flags."""
        place = self.place(args)
        key = get_config().key
        for tensor in guarded:
            checked = _engine.check(tensor, place, None, self.checks, key)
            result = _replaced(result, tensor, checked)
        return result

    def place(self, args: tuple[Any, ...]) -> Any:
        """Where errors are recorded: the module, by its class when it is of no tracked model."""
        if not args or not isinstance(args[0], nn.Module):
            return self.name
        values = args[0].__dict__
        tracked = "_opguard_location" in values or "_fx_path" in values
        return args[0] if tracked else type(args[0]).__name__

    def tell(self, result: Any) -> None:
        if self.told or torch.compiler.is_compiling() or not isinstance(result, tuple | list):
            return
        last = result[-1] if len(result) > 1 else None
        config = get_config()
        if (
            isinstance(last, Tensor)
            and last.dim() == 2
            and last.dtype == config.flag_dtype
            and last.shape[1] == config.num_words
        ):
            self.told = True
            _log.warning(
                "the last value that %s returns has the dtype and width of flags, and no flag"
                " function is known to have made it in that call (compiled code inside does not"
                " say): nothing was looked for; annotate it as Tensor[error_t, ...] if it is flags",
                self.name,
            )


# Around code that is compiled in parts these run in between, and say what could not be looked for.
never_a_frame(_Call.enter, _Call.leave)


def _is_result(annotation: Any) -> bool:
    origins = {get_origin(part) or part for part in get_args(annotation)}
    return bool(origins & {Ok, Err})


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists, dictionaries and dataclasses, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return []
    found: list[Tensor] = []
    for part in parts:
        found.extend(_tensors(part))
    return found


def _is_one_of(tensor: Any, tensors: list[Tensor]) -> bool:
    for other in tensors:  # noqa: SIM110  (traced by Dynamo, which has no generators here)
        if other is tensor:
            return True
    return False


def _annotated(value: Any, places: Any) -> list[Tensor] | None:
    """The tensors in the places (:func:`flag_places`) of flags; None where they do not fit."""
    if places is True:
        return [value] if isinstance(value, Tensor) else None
    if places is False:
        return []
    kind, inner = places
    if kind == "values":
        parts = list(value.values()) if isinstance(value, dict) else None
    else:
        parts = list(value) if isinstance(value, tuple | list) else None
    if parts is None or (kind == "tuple" and len(parts) != len(inner)):
        return None
    found: list[Tensor] = []
    for i in range(len(parts)):
        more = _annotated(parts[i], inner[i] if kind == "tuple" else inner)
        if more is None:
            return None
        found.extend(more)
    return found


def _provenant(value: Any, seen: list[Any], by_looks: bool) -> list[Tensor]:
    """The tensors in ``value`` that are known to be flags, or derived from such.

    ``by_looks``: where none is, the last that looks as flags that were made.
    """
    if not seen:
        return []
    tensors = _tensors(value)
    known = []
    for tensor in tensors:
        if _is_one_of(tensor, seen):
            known.append(tensor)
    if known or not by_looks:
        return known
    model = seen[-1]
    alike = []
    for tensor in tensors:
        if tensor.dtype == model.dtype and tensor.shape == model.shape:
            alike.append(tensor)
    return alike[-1:]


def _record(flags: Tensor, tensor: Tensor, place: Any, checks: int, key: int) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return flags
    if tensor.dim() > 0 and tensor.shape[0] == flags.shape[0]:
        return _engine.check(tensor, place, flags, checks, key)
    # Not a value for each sample: what is wrong with it is wrong with all of them.
    whole = _engine.check(tensor.reshape(1, -1), 0, None, checks, key)
    samples = flags.shape[0]
    for code, bits in ((ErrorCode.NAN, 1), (ErrorCode.INF, 6)):
        if checks & bits:
            where = _engine.find(whole, 0x3C, code << 2).expand(samples)
            flags = _engine.push(flags, where, code, place, None, key)
    return flags


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """``value`` with one tensor exchanged; containers on the way to it are new ones."""
    if value is old:
        return new
    if isinstance(value, Tensor) or not _is_one_of(old, _tensors(value)):
        return value
    if isinstance(value, tuple | list):
        parts = [_replaced(part, old, new) for part in value]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value):  # a dictionary too, with transformers' outputs
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(
            value,  # type: ignore[type-var]
            **{name: _replaced(getattr(value, name), old, new) for name in names},
        )
    changed = dict(value) if type(value) is dict else copy.copy(value)
    for name, part in value.items():
        changed[name] = _replaced(part, old, new)
    return changed
