"""Numbers of bytes in words, the same wherever somebody is told of memory."""

from __future__ import annotations

__all__ = ["readable"]


def readable(nbytes: float) -> str:
    """``"12.5 MiB"`` for a number of bytes."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        digits = 0 if unit == "B" else 1
        if round(abs(size), digits) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
