"""Which tensors are flags: those that a flag function made, noted while somebody asks.

A tensor of features may have the dtype and the shape of flags, so neither says what a tensor is.
Between :func:`start` and :func:`stop` the flag functions say which tensors they made or recorded
in; the short road in C, which is told to only while somebody asks, as well as the long one.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

from torch.compiler import is_dynamo_compiling

from opguard import _C

__all__ = ["noted", "start", "stop"]

_T = TypeVar("_T")

# Thread -> what was noted in it. Dynamo traces no thread's number, and compiles in one at a time.
_live: dict[int, list[Any]] = {}
_asking: dict[int, int] = {}
_traced: list[list[Any]] = []
_lock = threading.Lock()
_ever_traced = False


def _begin_traced() -> bool:
    global _ever_traced  # noqa: PLW0603  (set at trace time; never taken back, a trace may break off)
    _ever_traced = True
    return True


def _is_traced() -> bool:
    return _ever_traced


# What torch.compiler.assume_constant_result sets: run once, at trace time, so that compiled code of
# programs without a traced asker has no guard on _traced.
for _function in (_begin_traced, _is_traced):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def noted(result: _T) -> _T:
    """``result``, flags, noted for whoever asks in this thread."""
    if is_dynamo_compiling():
        if _is_traced() and _traced:
            _traced[-1].append(result)
    elif _live:
        mine = _live.get(threading.get_ident())
        if mine is not None:
            mine.append(result)
    return result


def start() -> int:
    """Begins to note; the number to give to :func:`stop`. They nest."""
    if is_dynamo_compiling():
        _begin_traced()
        _traced.append([])
        return 0
    thread = threading.get_ident()
    with _lock:
        mine = _live.setdefault(thread, [])
        _asking[thread] = _asking.get(thread, 0) + 1
        _C.flags_bind(noted=noted)
    return len(mine)


def stop(begin: int) -> list[Any]:
    """Ends what :func:`start` began; the flags noted since, oldest first."""
    if is_dynamo_compiling():
        seen = _traced.pop()
        if _traced:
            _traced[-1].extend(seen)
        return seen
    thread = threading.get_ident()
    seen = _live[thread][begin:]
    with _lock:
        _asking[thread] -= 1
        if not _asking[thread]:  # coroutines of one thread end in any order
            del _live[thread], _asking[thread]
            if not _live:
                _C.flags_bind(noted=None)
    return seen
