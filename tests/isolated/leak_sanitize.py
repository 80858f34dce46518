"""Does sanitizing leak? Prints blocks a run over two lengths; exits 1 on a slope.

One difference is noise; a leak grows with the number of runs.
"""

from __future__ import annotations

import gc
import sys

import torch

from opguard import _C


def failing(depth: int, held: list[torch.Tensor]) -> None:
    mine = torch.ones(2)
    if depth == 0:
        error = ValueError("deep", mine, {"in": [held, (mine,)]})
        error.more = [held]
        raise error from KeyError(mine)
    failing(depth - 1, held)


def once() -> None:
    try:
        failing(3, [torch.ones(1)])
    except ValueError as error:
        _C.sanitize_exit(error, None, ())
        group = ExceptionGroup("many", [error])
    try:
        exec("def g(x):\n    __tracebackhide__ = True\n    raise KeyError(x)\ng(1)", {})
    except KeyError as error:
        _C.sanitize_exception(group)
        _C.sanitize_exception(error)


def blocks_after(runs: int) -> int:
    for _ in range(runs):
        once()
    gc.collect()
    return sys.getallocatedblocks()


def main() -> int:
    # The cache of code objects fills first: it is bounded, so its growth ends.
    blocks_after(3000)
    start = blocks_after(500)
    short = blocks_after(500) - start
    long = blocks_after(2000) - start - short
    slope = (long - short) / 1500
    print(f"blocks a run: {slope:.3f} (500 runs {short:+}, 2000 runs {long:+})")
    return int(slope > 0.2)


sys.exit(main())
