"""Guards against torch's own: entering, steps of generators and coroutines."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import torch
from harness import Row

from opguard.guards.calling import call_guard

STEPS = 1000


def guarded() -> None:
    with call_guard():
        pass


def inference() -> None:
    with torch.inference_mode():
        pass


def autocast_asked() -> None:
    with call_guard(effective_dtype=torch.bfloat16, device_list="cpu"):
        pass


def torch_autocast() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        pass


def steps(count: int) -> Iterator[None]:
    for _ in range(count):
        yield None


async def awaits(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def numbers(count: int) -> AsyncIterator[int]:
    for i in range(count):
        yield i


def drained(generator: Callable[[int], Iterator[None]]) -> Callable[[], object]:
    return lambda: deque(generator(STEPS), 0)


def driven(coroutine: Callable[[int], Coroutine[Any, Any, None]]) -> Callable[[], object]:
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(coroutine(STEPS))


def rows() -> list[Row]:
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(199))).eval()
    small = torch.nn.Linear(4, 4).eval()
    x = torch.ones(1, 4)

    def with_model() -> None:
        with call_guard(models=model):
            pass

    def guarded_call() -> None:
        with call_guard() as g:
            g(small, x)

    def plain_call() -> None:
        with torch.inference_mode():
            small(x).clone()

    guarded_steps, torch_steps = call_guard()(steps), torch.inference_mode()(steps)
    return [
        Row("enter and exit, no argument / torch.inference_mode", guarded, inference, limit=0.7),
        Row("enter and exit, 200 modules in eval", with_model, inference, extra_us=5.0),
        Row("enter and exit, autocast asked", autocast_asked, torch_autocast),
        Row("with g(model, x)", guarded_call, plain_call),
        Row(
            "step of a generator / torch.inference_mode as decorator",
            drained(guarded_steps),
            drained(torch_steps),
            limit=0.6,
            per=STEPS,
        ),
        Row(
            "await in a coroutine / undecorated",
            driven(call_guard()(awaits)),
            driven(awaits),
            extra_us=1.0,
            per=STEPS,
        ),
    ]
