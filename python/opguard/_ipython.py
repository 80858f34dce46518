"""What is left to do after a failing cell.

A guard cannot empty the frames above it: they still run. When the cell is over they have
finished, so a ``post_run_cell`` handler empties them then. Guards register it at the first
exception that passes one; ``%load_ext opguard`` makes it look after every failing cell.
"""

from __future__ import annotations

import sys
from typing import Any

from opguard._C import sanitize_exception as _sanitize

__all__ = ["load_ipython_extension", "register", "unload_ipython_extension"]

MARK = "_opguard_guarded"


class _Handler:
    """One per shell; ``every`` is what ``%load_ext opguard`` asks for."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.every = False

    def post_run_cell(self, result: Any) -> None:
        """Sanitize the failure of the cell that has just ended, if it is ours to do."""
        for name in ("error_in_exec", "error_before_exec"):
            error = getattr(result, name, None)
            if isinstance(error, BaseException) and (self.every or _is_marked(error)):
                _sanitize(error)
                _renew_last(self.shell, error)


def _linked(error: BaseException) -> list[BaseException]:
    linked = [error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        linked.extend(error.exceptions)
    return [other for other in linked if other is not None]


def _is_marked(error: BaseException) -> bool:
    queue, seen = [error], {id(error)}
    while queue:
        at = queue.pop()
        if MARK in vars(at):
            return True
        for other in _linked(at):
            if id(other) not in seen:
                seen.add(id(other))
                queue.append(other)
    return False


def _renew_last(shell: Any, error: BaseException) -> None:
    """Give the places that remember the failure's traceback the emptied one."""
    if getattr(sys, "last_value", None) is error:
        sys.last_traceback = error.__traceback__
    for owner in (getattr(shell, "InteractiveTB", None), getattr(shell, "SyntaxTB", None)):
        if owner is not None and getattr(owner, "tb", None) is not None:
            owner.tb = error.__traceback__


def _handler_of(shell: Any) -> _Handler | None:
    for callback in shell.events.callbacks.get("post_run_cell", ()):
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, _Handler):
            return owner
    return None


def _register_on(shell: Any) -> _Handler:
    handler = _handler_of(shell)
    if handler is None:
        handler = _Handler(shell)
        shell.events.register("post_run_cell", handler.post_run_cell)
    return handler


def register() -> bool:
    """Register the handler on the running shell; False when none runs in this process.

    Called from C by a guard that an exception leaves, at most until it has worked once.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None:
        return False
    _register_on(shell)
    return True


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext opguard``: from now on every failing cell is freed of what it held."""
    _register_on(shell).every = True


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext opguard``: only exceptions that passed a guard are looked after."""
    handler = _handler_of(shell)
    if handler is not None:
        handler.every = False
