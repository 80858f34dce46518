"""What a forked child must know: that it is one, and that no other thread holds its locks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ForkLock", "forks"]


class _Forks:
    count = 0
    children = 0  # between the first process and this one


def forks() -> int:
    """How often this process has forked: a child reads the files that were mapped then."""
    return _Forks.count


def _forked() -> None:
    _Forks.count += 1


def _is_child() -> None:
    _forked()
    _Forks.children += 1


os.register_at_fork(after_in_parent=_forked, after_in_child=_is_child)


class ForkLock:
    """A lock that a forked child finds free, whoever held it in the parent.

    Args:
        kind: ``threading.RLock`` where a finalizer of the thread that has it may come again.
    """

    def __init__(self, kind: Callable[[], Any] = threading.Lock) -> None:
        self._kind = kind
        self._locks = {_Forks.children: kind()}

    @property
    def here(self) -> Any:
        """What a ``with`` takes. An ``__enter__`` of Python's own could be interrupted between
        taking the lock and having entered, and nobody would release it."""
        process = _Forks.children
        return self._locks.get(process) or self._locks.setdefault(process, self._kind())
