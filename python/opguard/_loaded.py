"""Looking for what belongs to a module without importing it."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["loaded"]


def loaded(module: str, name: str) -> Any:
    """What a module has by this name, if it is imported already; else (), of which nothing is.

    Another thread may be importing it just now: then it has not all of its names yet.
    """
    return getattr(sys.modules.get(module), name, ())
