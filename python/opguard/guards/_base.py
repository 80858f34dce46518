"""The base of the guards written in Python: entered, nested, shared between threads, decorating.

A subclass says what entering and leaving do, on an object of its own for each entry, so one guard
object may be entered again while it is entered, and from several threads and tasks at once.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

import torch

from opguard.guards._decorate import decorate

_is_compiling = torch.compiler.is_compiling

__all__ = ["Guard"]

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _here() -> tuple[int, int]:
    """Names the running thread and asyncio task."""
    task = 0
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        task = id(asyncio.current_task())
    return threading.get_ident(), task


class Guard:
    """Context manager and decorator; a subclass gives ``_enter`` and ``_exit``.

    ``_enter(self) -> value`` and ``_exit(self, error) -> None`` run on a fresh shallow copy for
    each entry and keep what they need on ``self``; ``value`` is what ``with ... as`` binds. When
    ``_enter`` raises, ``_exit`` is not called. An ``_exit`` that raises while the user's exception
    is under way is reported as unraisable and never hides that exception.

    As a decorator of generators and coroutines a guard is exited and entered anew around every
    suspension; where that is wrong (a seed would start again), the subclass gives ``suspend`` and
    ``resume``, and is then entered once (see opguard.guards._decorate.Step).

    ``in_graph`` says that the guard may stand in code that torch.compile traces: there it does
    nothing, because what it does is no part of a graph. Any other is refused by torch.compile.

    ``sanitize_all_exceptions`` and ``keep`` say whether exceptions that leave are sanitized, and
    which types are not.
    """

    sanitize_all_exceptions: bool = True
    keep: tuple[type[BaseException], ...] = ()
    in_graph: bool = False

    def _enter(self) -> Any:
        return self

    def _exit(self, error: BaseException | None) -> None:
        pass

    def _fresh(self) -> Guard:
        """A copy that has not been entered."""
        fresh = copy.copy(self)
        fresh.__dict__.pop("_entries", None)
        return fresh

    def __enter__(self) -> Any:
        if self.in_graph and _is_compiling():
            return self
        entries = self.__dict__.setdefault("_entries", [])
        fresh = self._fresh()
        handled = sys.exception()
        value = fresh._enter()
        entries.append((_here(), fresh, handled))
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.in_graph and _is_compiling():
            return
        fresh, handled = self._pop()
        try:
            fresh._exit(error)
        except BaseException as failure:
            if error is None:
                raise
            sys.unraisablehook(cast(Any, _Unraisable(failure, fresh)))
        if error is not None and fresh.sanitize_all_exceptions:
            _sanitize(error, handled, fresh.keep)

    def _moved(self) -> Any:
        """The one entry of a suspended body, which from here on is the running thread's and task's.

        A generator is often consumed by another thread than the one that began it.
        """
        entries: list[Any] = self.__dict__["_entries"]
        fresh = entries[-1][1]
        entries[-1] = (_here(), fresh, sys.exception())
        return fresh

    def _pop(self) -> tuple[Guard, BaseException | None]:
        entries: list[Any] = self.__dict__.get("_entries", [])
        here = _here()
        for index in range(len(entries) - 1, -1, -1):
            if entries[index][0] == here:
                _, fresh, handled = entries.pop(index)
                return fresh, handled
        raise RuntimeError(
            f"{type(self).__name__} is exited where it was not entered; "
            f"exit it in the thread and task that entered it"
        )

    def __call__(self, function: Decorated) -> Decorated:
        decorated: Decorated = decorate(self._fresh, function)
        return decorated


class _Unraisable:
    """What sys.unraisablehook wants to be told."""

    def __init__(self, failure: BaseException, source: object) -> None:
        self.exc_type = type(failure)
        self.exc_value = failure
        self.exc_traceback = failure.__traceback__
        self.err_msg = "Exception ignored while leaving a guard"
        self.object = source


def _sanitize(
    error: BaseException,
    handled: BaseException | None,
    keep: tuple[type[BaseException], ...],
) -> None:
    from opguard import _C

    _C.guard_sanitize(error, handled, keep or None)
