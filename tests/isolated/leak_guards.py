"""Whether guards leak: blocks allocated per entry, call, failure, step and lease, by slope."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable

import torch

from opguard.guards.calling import call_guard

MODEL = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
X = torch.ones(1, 2)
LOOP = asyncio.new_event_loop()


def enter() -> None:
    with call_guard():
        pass


def call() -> None:
    with call_guard(models=MODEL, device_list="cpu") as g:
        g(MODEL, X)
        g({"a": X})


def bad(x: object) -> None:
    raise ValueError(x)


def fail() -> None:
    with contextlib.suppress(ValueError), call_guard(models=MODEL, on_oom="retry") as g:
        g(bad, X)


@call_guard()
def body(n: int):
    for i in range(n):
        with torch.enable_grad():
            yield i


def steps() -> None:
    list(body(3))
    iterator = body(3)
    next(iterator)
    with contextlib.suppress(KeyError):
        iterator.throw(KeyError("x"))
    iterator = body(3)
    next(iterator)
    iterator.close()


@call_guard()
async def coroutine() -> None:
    await asyncio.sleep(0)


def awaited() -> None:
    LOOP.run_until_complete(coroutine())


def refused() -> None:
    with contextlib.suppress(TypeError), call_guard(models=MODEL, keep=(3,)):
        pass


def slope(function: Callable[[], None], small: int = 200, large: int = 1000) -> float:
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


def main() -> int:
    found = {f.__name__: slope(f) for f in (enter, call, fail, steps, awaited, refused)}
    for name, each in found.items():
        print(f"{name}: {each:+.3f} blocks a call")
    return 1 if any(each > 0.1 for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
