"""Whether guards leak: blocks allocated per entry, call, failure, step and lease, by slope."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import torch
from slope import report

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


if __name__ == "__main__":
    sys.exit(report(200, 1000, enter, call, fail, steps, awaited, refused))
