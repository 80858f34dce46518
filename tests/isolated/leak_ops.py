"""Does a call of the ops keep memory? Resident size and blocks by slope over two numbers of calls.

Prints the slopes and exits 1 on a leak.
"""

from __future__ import annotations

import gc
import os
import sys

import torch

import opguard  # noqa: F401  (registers the ops)

LEAVES = [torch.randn(64), torch.zeros(8, dtype=torch.uint8), torch.randn(3, 4)]
GAPS = [torch.zeros(4, 4)[:, ::2]]


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def once() -> None:
    packed = torch.ops.opguard.pack(LEAVES)
    torch.ops.opguard.unpack(packed, LEAVES)


def failing() -> None:
    try:
        torch.ops.opguard.pack(GAPS)
    except RuntimeError:
        return
    raise AssertionError("expected a leaf with gaps to be refused")


def grown(function: object, calls: int) -> tuple[int, int]:
    gc.collect()
    blocks, size = sys.getallocatedblocks(), resident()
    for _ in range(calls):
        function()  # type: ignore[operator]
    gc.collect()
    return sys.getallocatedblocks() - blocks, resident() - size


def main() -> int:
    bad = 0
    for function, calls in ((once, 4000), (failing, 1000)):
        grown(function, calls)
        few, _ = grown(function, calls)
        many, size = grown(function, 3 * calls)
        blocks_a_call = (many - few) / (2 * calls)
        bytes_a_call = size / (3 * calls)
        print(f"{function.__name__}: {blocks_a_call:.4f} blocks, {bytes_a_call:.1f} bytes a call")
        bad += blocks_a_call > 0.05 or bytes_a_call > 64
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
