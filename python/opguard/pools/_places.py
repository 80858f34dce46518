"""Source lines of the programs that use pools, in words."""

from __future__ import annotations

import threading
from types import CodeType, FrameType

__all__ = ["is_ours", "line_outside", "name_of_thread", "place"]

_PACKAGE = __file__.rpartition("/pools/")[0]


def is_ours(code: CodeType) -> bool:
    """Whether this is code of the package, which nobody wants to be told of."""
    return code.co_filename.startswith(_PACKAGE)


def place(code: CodeType, line: int) -> str:
    """``"app.py:57 in serve"``."""
    return f"{code.co_filename.rpartition('/')[2]}:{line} in {code.co_name}"


def line_outside(frame: FrameType | None) -> str | None:
    """Where a stack is now in its innermost frame that is neither ours nor torch's."""
    while frame is not None:
        if not is_ours(frame.f_code) and "/torch/" not in frame.f_code.co_filename:
            return place(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return None


def name_of_thread(ident: int) -> str | None:
    """What a running thread is called."""
    return next((t.name for t in threading.enumerate() if t.ident == ident), None)
