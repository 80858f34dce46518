"""How axes go through a reshape: as runs of digits of the flat element number.

In a contiguous tensor the coordinate along an axis is ``(flat // low) % (high // low)``, whatever
the shape is. A reshape keeps these runs; the new sizes say which dimensions each one lies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any, NamedTuple

from opguard.flags._rows.axes import Axis, below, divides, product, same, strides

__all__ = [
    "Run",
    "axes_of",
    "few_enough",
    "marks_of",
    "refined",
    "runs_of",
    "without_needless_marks",
]

_MUCH = 1024  # rows that a reshape may make of one without counting them
_TIMES = 8  # how many rows it may make of each


class Run(NamedTuple):
    """The digits of one axis: those from ``low`` to below ``high``.

    ``mark``: of an axis of size 1, the digits of its whole dimension.
    """

    low: Any
    high: Any
    mark: bool = False

    @property
    def size(self) -> Any:
        """Of the axis."""
        return 1 if self.mark else self.high // self.low


def runs_of(axes: Sequence[Axis], shape: Sequence[Any]) -> list[Run]:
    """The axes as runs in the same order, those that follow each other without a gap as one."""
    steps = strides(shape)
    found: list[Run] = []
    for axis in axes:
        step = steps[axis.dim]
        if same(axis.size, 1):
            found.append(Run(step, step * shape[axis.dim], True))
            continue
        low = axis.inner * step
        high = low * axis.size
        if found and not found[-1].mark and same(found[-1].low, high):
            found[-1] = Run(low, found[-1].high)
        else:
            found.append(Run(low, high))
    return found


def axes_of(run: Run, shape: Sequence[Any]) -> list[Axis] | None:
    """The run in the dimensions of ``shape``, its highest digits first; None if they cut it."""
    steps = strides(shape)
    if run.mark:
        return marks_of(run, shape)
    low, high = run.low, run.high
    found: list[Axis] = []
    for dim, (size, bottom) in enumerate(zip(shape, steps, strict=True)):
        top = bottom * size
        if below(top, low) or below(high, bottom):
            continue
        last = bottom if divides(low, bottom) else low
        first = top if divides(top, high) else high
        if not (divides(bottom, last) and divides(last, first) and divides(first, top)):
            return None
        if not divides(low, last) or not divides(first, high):
            return None
        found.append(Axis(dim, last // bottom, first // last))
    return found if same(product(piece.size for piece in found), run.size) else None


def marks_of(run: Run, shape: Sequence[Any]) -> list[Axis]:
    """Axes of size 1 in the dimensions of ``shape`` where these digits lie."""
    low, high = run.low, run.high
    return [
        Axis(dim, 1, 1)
        for dim, (size, bottom) in enumerate(zip(shape, strides(shape), strict=True))
        if (not below(bottom * size, low) and not below(high, bottom))
        or (same(bottom * size, high) and (same(low, high) or same(size, 1)))
    ]


def refined(run: Run, others: Sequence[Run], shape: Sequence[Any]) -> Run | None:
    """A longer run which ``shape`` does not cut and that says as much; None if it is too long.

    Its low digits tell copies of a row apart, and so do its high ones.
    """
    sizes = [*shape, run.low, run.high]
    if not all(type(size) is int for size in sizes):
        return None
    edges = strides(shape)
    for high in sorted({run.high, prod(shape)}):
        longer = Run(_lowest(run.low, high, edges), high)
        if longer.size > max(_MUCH, _TIMES * run.size) or axes_of(longer, shape) is None:
            continue
        apart = (o.mark or o.high <= longer.low or high <= o.low for o in others if o is not run)
        if all(apart):
            return longer
    return None


def few_enough(shape: Sequence[Any]) -> bool:
    """Whether each element of ``shape`` may be a row."""
    count = product(shape)
    return type(count) is int and count <= _MUCH


def _lowest(low: int, high: int, edges: Sequence[int]) -> int:
    """The largest part of ``low`` that goes into every edge below ``high`` and above itself."""
    while True:
        under = max(edge for edge in edges if edge <= low)
        smaller = gcd(low, under, *(edge for edge in edges if low < edge < high))
        if smaller == low:
            return low
        low = smaller


def without_needless_marks(axes: list[Axis]) -> tuple[Axis, ...]:
    """At most one axis of size 1 in a dimension, and none beside another."""
    real = {axis.dim for axis in axes if not same(axis.size, 1)}
    kept: list[Axis] = []
    marked: set[int] = set()
    for axis in axes:
        mark = same(axis.size, 1)
        if mark and (axis.dim in real or axis.dim in marked):
            continue
        if mark:
            marked.add(axis.dim)
        kept.append(axis)
    return tuple(kept)
