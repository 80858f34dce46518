"""Which tensors are flags: those that a flag function made, noted while somebody asks.

A tensor of features may have the dtype and the shape of flags, so neither says what a tensor is.
Between :func:`start` and :func:`stop` the flag functions say which tensors they made or recorded
in; the short road in C, which is told to only while somebody asks, as well as the long one. A graph
that is called in between says nothing. Tensors are held until :func:`stop` and no longer.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any, TypeVar

from torch.compiler import is_dynamo_compiling

from opguard import _C
from opguard.flags._tracing import never_a_frame

__all__ = ["is_traced", "noted", "start", "stop"]

_T = TypeVar("_T")


class _Asker:
    """One who asks: what was noted for it, None once it has its answer, and who asked before."""

    __slots__ = ("before", "flags")

    def __init__(self, before: _Asker | None) -> None:
        self.flags: list[Any] | None = []
        self.before = before


# Who asks last where this code runs: each thread and each asyncio task has its own, and a task or
# thread that was begun by one who asks notes for that one.
_asker: ContextVar[_Asker | None] = ContextVar("opguard_flags_asker", default=None)
_lock = threading.Lock()
_asking = 0  # how many ask in the process

# The same of the code that Dynamo traces: it traces no context, and one frame at a time.
_traced: list[list[Any]] = []
_ever_traced = False


def _begin_traced() -> bool:
    global _ever_traced  # noqa: PLW0603  (set at trace time; never taken back, a trace may break off)
    _ever_traced = True
    return True


def is_traced() -> bool:
    """Whether traced code ever asked: if not, compiled code need not say what it made."""
    return _ever_traced


# What torch.compiler.assume_constant_result sets: run once, at trace time, so that compiled code of
# programs without a traced asker has no guard on _traced.
for _function in (_begin_traced, is_traced):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def noted(result: _T) -> _T:
    """``result``, flags, noted for whoever asks where this code runs."""
    if is_dynamo_compiling():
        if is_traced() and _traced:
            _traced[-1].append(result)
    elif _asking:
        asker = _asker.get()
        while asker is not None and asker.flags is None:
            asker = asker.before  # a task may live longer than the one that began it
        if asker is not None and asker.flags is not None:
            asker.flags.append(result)
    return result


def _count(change: int) -> None:
    global _asking  # noqa: PLW0603  (how many, for the short road in C to be told by the first)
    with _lock:
        _asking += change
        if _asking == max(change, 0):  # the first who asks, or nobody any more
            _C.flags_bind(noted=noted if _asking else None)


def start() -> _Asker | None:
    """Begins to note; what to give to :func:`stop`. They nest."""
    if is_dynamo_compiling():
        _begin_traced()
        _traced.append([])
        return None
    asker = _Asker(_asker.get())
    _asker.set(asker)
    _count(1)
    return asker


def stop(asker: _Asker | None) -> list[Any]:
    """Ends what :func:`start` began; the flags noted since, oldest first.

    Also in another thread than it began in, where a coroutine may end.
    """
    if is_dynamo_compiling() or asker is None:
        seen = _traced.pop()
        if _traced:
            _traced[-1].extend(seen)
        return seen
    seen, asker.flags = asker.flags or [], None
    if _asker.get() is asker:
        _asker.set(asker.before)
    before = asker.before
    if before is not None and before.flags is not None:
        before.flags.extend(seen)
    _count(-1)
    return seen


# Called from code that no graph contains, these are no graphs of their own: what is asked for there
# is in the context, of which compiled code knows nothing.
never_a_frame(noted, start, stop)
