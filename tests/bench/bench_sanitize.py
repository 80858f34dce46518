"""What sanitizing an exception costs, a frame and a listed tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Row

from opguard import _C

DEPTH = 50
TENSORS = 32


def _fall(depth: int) -> None:
    if depth == 0:
        raise ValueError("deep")
    _fall(depth - 1)


def _many() -> Callable[[], None]:
    names = [f"t{i}" for i in range(TENSORS)]
    values = tuple(torch.ones(2, 3) for _ in names)
    space: dict[str, object] = {"values": values}
    exec(f"def fail():\n    {', '.join(names)} = values\n    raise ValueError('deep')", space)
    return space["fail"]  # type: ignore[return-value]


def _caught(fail: Callable[[], None], sanitize: bool) -> Callable[[], None]:
    def run() -> None:
        try:
            fail()
        except ValueError as error:
            if sanitize:
                _C.sanitize_exception(error)

    return run


def rows() -> list[Row]:
    deep = partial(_fall, DEPTH)
    many = _many()
    return [
        Row(
            "sanitize, a frame",
            _caught(deep, True),
            _caught(deep, False),
            extra_us=1.0,
            per=DEPTH + 2,
        ),
        Row(
            "sanitize, a tensor listed",
            _caught(many, True),
            _caught(many, False),
            extra_us=1.5,
            per=TENSORS,
        ),
    ]
