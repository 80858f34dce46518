"""Exceptions that go on without what they held alive.

The work is done in C; every guard does it on its way out. Use :func:`sanitize_exception` for
exceptions that no guard has seen.
"""

from __future__ import annotations

import sys
from typing import TypeVar

from opguard._C import ObjectSummary, TensorSummary
from opguard._C import sanitize_exception as _sanitize

__all__ = ["ObjectSummary", "TensorSummary", "sanitize_exception"]

E = TypeVar("E", bound=BaseException)


def sanitize_exception(
    exc: E,
    *,
    keep: tuple[type[BaseException], ...] = (),
    deep: bool = True,
    handled: BaseException | None = None,
) -> E:
    """Free ``exc`` of the frames and tensors it holds alive; returns the same object.

    Tracebacks become equal ones of empty frames (file, line, function and carets stay, locals go),
    finished frames are cleared, tensors in ``args`` and attributes become :class:`TensorSummary`,
    and one note of at most 32 tensors and 4 KiB says which tensors were alive in which frame.

    Parameters
    ----------
    keep
        Exception types whose payload stays as it is.
    deep
        Also walk ``__cause__``, ``__context__`` and the members of groups.
    handled
        An exception to leave alone with all it chains to. By default what ``sys.exception()``
        gives, unless ``exc`` belongs to it.

    Raises
    ------
    TypeError
        When ``exc`` is no exception, or ``keep`` no tuple of exception types.

    Nothing is done when the environment has ``OPGUARD_KEEP_FRAMES=1``.
    """
    if handled is None:
        current = sys.exception()
        if current is not None and not _belongs(exc, current):
            handled = current
    _sanitize(exc, handled, keep, deep)
    return exc


def _belongs(exc: BaseException, whole: BaseException) -> bool:
    queue, seen = [whole], {id(whole)}
    while queue:
        at = queue.pop()
        if at is exc:
            return True
        linked = [at.__cause__, at.__context__]
        if isinstance(at, BaseExceptionGroup):
            linked.extend(at.exceptions)
        for other in linked:
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                queue.append(other)
    return False
