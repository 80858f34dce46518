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


KEY = 16 | 3 << 19
X = torch.randn(6, 40)
FLAGS = torch.zeros(6, 4, dtype=torch.int64)
APART = torch.zeros(4, 6, dtype=torch.int64).t()  # copied aside and back
IDS = torch.arange(12).reshape(6, 2)


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def once() -> None:
    packed = torch.ops.opguard.pack(LEAVES)
    torch.ops.opguard.unpack(packed, LEAVES)


def flags() -> None:
    ops = torch.ops.opguard
    made = ops.flags_check_new(X, 1, 7, KEY)
    made, _ = ops.flags_index_clamp(ops.flags_check(made, X, 2, 7, KEY), IDS, 5, 3, KEY)
    ops.flags_push_(APART, ops.flags_err(made), 7, KEY)
    merged = ops.flags_merge([made, APART, FLAGS] * 5, KEY)
    ops.flags_merge_(APART, APART, KEY)
    ops.flags_push_codes(merged, ops.flags_count(merged), 1, -1, 2, KEY)
    ops.flags_clear(APART, 1)
    ops.flags_gather(APART, IDS % 6, KEY)
    ops.flags_gather(APART, IDS.view(1, 12).expand(3, 12).repeat(1, 5) % 6, KEY)
    ops.flags_max_severity(APART)
    ops.row_findings(X)


def flags_refused() -> None:
    ops, few = torch.ops.opguard, FLAGS[:2]
    huge = FLAGS[:1].expand(2**44, 4)
    for call in (
        lambda: ops.flags_check(FLAGS, X, 5000, 7, KEY),
        lambda: ops.flags_check_(APART, X[:2], 1, 7, KEY),
        lambda: ops.flags_index_clamp(FLAGS, IDS[:2], 5, 3, KEY),
        lambda: ops.flags_merge([APART] * 12 + [few], KEY),
        lambda: ops.flags_push_codes(FLAGS, IDS[:, 0] + 90, 1, -1, 2, KEY),
        lambda: ops.flags_gather(FLAGS, IDS, KEY),
        lambda: ops.flags_gather(FLAGS, IDS[:1, 0].expand(2**44), KEY),
        lambda: ops.flags_push_all(huge, 7, KEY),  # torch has no memory for it
        lambda: ops.flags_merge([huge] * 12, KEY),
    ):
        try:
            call()
        except RuntimeError:
            continue
        raise AssertionError("expected this call to be refused")


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
    for function, calls in ((once, 4000), (flags, 2000), (failing, 1000), (flags_refused, 150)):
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
