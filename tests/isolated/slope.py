"""Memory blocks kept per call: what every leak script measures, in one place."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

__all__ = ["blocks_per_call", "report"]


def blocks_per_call(function: Callable[[], None], small: int, large: int) -> float:
    """Blocks kept per call, from two sizes, so that what is kept once does not count."""
    for _ in range(small):
        function()
    kept = []
    for count in (small, large):
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(count):
            function()
        gc.collect()
        kept.append(sys.getallocatedblocks() - before)
    return (kept[1] - kept[0]) / (large - small)


def _least(function: Callable[[], None], small: int, large: int, most: float) -> float:
    """Measured up to three times: a leak is there each time, what a cache keeps is not."""
    least = blocks_per_call(function, small, large)
    for _ in range(2):
        if least <= most:
            break
        least = min(least, blocks_per_call(function, small, large))
    return least


def report(small: int, large: int, *functions: Callable[[], None], most: float = 0.1) -> int:
    """Prints a line a function; the script's exit status, 1 where one keeps more than ``most``."""
    found = {function.__name__: _least(function, small, large, most) for function in functions}
    for name, each in found.items():
        print(f"{name}: {each:+.3f} blocks a call")
    return 1 if any(each > most for each in found.values()) else 0
