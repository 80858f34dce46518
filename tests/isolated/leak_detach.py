"""Memory blocks that detach_to_cpu keeps, by slope over two numbers of turns; exits 1 on a leak."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import sys
from types import SimpleNamespace

import torch
from torch import nn

from opguard import _C
from opguard.detaching import detach_to_cpu, register_detach


@dataclasses.dataclass
class Result:
    tensor: torch.Tensor
    rest: object = None


class Holder:
    def __init__(self, content: object) -> None:
        self.content = content


class Fails:
    pass


def fails(value: Fails, detach: object) -> None:
    raise ZeroDivisionError


register_detach(Holder, lambda value, detach: Holder(detach(value.content)))
register_detach(Fails, fails)

GRAD = torch.ones(3, requires_grad=True) * 2
MODEL = nn.Linear(2, 2)
RING: list[object] = [GRAD]
RING.append((RING, {"k": GRAD}, {GRAD}, collections.deque([GRAD]), SimpleNamespace(a=GRAD)))
VALUES = [
    RING,
    [Result(GRAD), Holder([GRAD]), collections.OrderedDict(a=GRAD), {GRAD: 1}],
    [torch.ones(4)[:2], nn.Parameter(torch.ones(2)), MODEL.weight.data],
    [GRAD, Fails()],
]


def turn() -> None:
    for value in VALUES:
        for run in (
            lambda v: detach_to_cpu(v, models=MODEL),
            lambda v: detach_to_cpu(v, copy=True),
            lambda v: _C.detach(v, False, (), True),
        ):
            with contextlib.suppress(ZeroDivisionError):
                run(value)


def blocks(turns: int) -> int:
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(turns):
        turn()
    gc.collect()
    return sys.getallocatedblocks() - before


def main() -> int:
    gc.disable()
    blocks(600)  # what the interpreter keeps for itself has come by then
    few, many = blocks(50), blocks(350)
    slope = (many - few) / 300
    print(f"leak_detach: {slope:+.2f} blocks a turn")
    return 1 if slope > 0.5 else 0


if __name__ == "__main__":
    sys.exit(main())
