"""What reads flags as Python values, and so stays outside compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from opguard.flags._tracing import never_a_frame

__all__ = ["boundary"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def boundary(fn: _Function) -> _Function:
    """Says to torch.compile what torch.compiler.disable does, at no cost to each call.

    Nothing that ``fn`` calls is compiled either, where a broken graph goes on in Python.
    """
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    fn._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "it reads flags as Python values; call it outside the compiled function"
    )
    never_a_frame(fn)
    return fn
