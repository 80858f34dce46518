"""Where rows go in ops that see a tensor's storage: in the few cases where that can be told."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from opguard.flags._rows.axes import product
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import lost, rule
from opguard.flags._rows.windows import windowed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opguard.flags._rows.rules import Call

__all__: list[str] = []


@rule("aten::as_strided", "aten::as_strided_copy")
def _as_strided(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    found = _strided(rows, call)
    if found is None:
        return lost(
            call,
            "these sizes and strides step from sample to sample in no plain way",
        )
    return found


def _strided(rows: Rows, call: Call) -> Rows | None:
    """The rows where the new sizes and strides step through each row dim by one dim or none.

    What steps are shorter must stay within one index of the row dim, longer ones must be whole
    turns of it; None where they are not.
    """
    steps = tuple(call["self"].stride())
    size, new = tuple(call["size"]), tuple(call["stride"])
    offset = call["storage_offset"]
    ahead = 0 if offset is None else offset - call["self"].storage_offset()
    if size == rows.shape and new == steps and ahead == 0:
        return rows
    count = product(rows.shape)
    last = ahead + sum((n - 1) * step for n, step in zip(size, new, strict=True))
    dense = sum((n - 1) * step for n, step in zip(rows.shape, steps, strict=True)) + 1 == count
    if ahead < 0 or 0 in size or last >= count or not dense or not _nested(rows.shape, steps):
        # Too little to go by, unless each row is a run of memory of its own.
        return windowed(rows, size, new, steps, ahead)
    home: dict[int, int] = {}
    for d in sorted(rows.dims, reverse=True):
        if rows.shape[d] == 1 and d < len(size) and size[d] == 1:
            home[d] = d
            continue
        found = _walked(ahead, list(zip(size, new, strict=True)), steps[d], rows.shape[d])
        if found is None:
            return None
        start, k, step = found
        if k is None:
            rows = rows.sliced(d, start, start + 1)
        else:
            rows = rows.sliced(d, start, start + (size[k] - 1) * step + 1, step)
            home[d] = k
    gone = [d for d in rows.dims if d not in home]
    rows = rows.mixed(gone)
    axes = tuple(axis._replace(dim=home[axis.dim]) for axis in rows.axes if axis.dim in home)
    return Rows(size, axes, rows.payload)


def _nested(shape: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether no two indices name one element, by the strides alone."""
    found = sorted((step, n) for step, n in zip(steps, shape, strict=True) if n > 1)
    return all(a > 0 and a * n <= b for (a, n), (b, _) in pairwise([*found, (1 << 62, 1)]))


def _walked(
    ahead: int, new: list[tuple[int, int]], step: int, size: int
) -> tuple[int, int | None, int] | None:
    """(first index of a dim, the new dim that walks along it, by how many); None: not so simply."""
    turn = step * size
    short = ahead % step
    along: int | None = None
    for k, (count, stride) in enumerate(new):
        if count == 1 or stride % turn == 0:
            continue
        if stride < step:
            short += (count - 1) * stride
        elif along is None and stride % step == 0 and stride < turn:
            along = k
        else:
            return None
    start = ahead // step % size
    by = 1 if along is None else new[along][1] // step
    last = start if along is None else start + (new[along][0] - 1) * by
    return (start, along, by) if short < step and last < size else None


@rule(
    "aten::resize", "aten::resize_as", "aten::set", "aten::resize_as_sparse", "aten::_resize_output"
)
def _resized(call: Call) -> Rows | None:
    return lost(call, "what the tensor holds after it comes from no known row")
