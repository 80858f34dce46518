"""Where the rows of a tensor lie: which dimension, in which digits of its index.

The row coordinate of an element along an axis is ``(index[dim] // inner) % size``. So reshapes,
repeats and expands of a batch move no flags: they renumber digits. Sizes may be ``SymInt``; what
cannot be proven about them without a new guard counts as untrue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = [
    "Axis",
    "below",
    "bounds",
    "by_digits",
    "divides",
    "is_whole",
    "product",
    "same",
    "same_shape",
    "strides",
]


class Axis(NamedTuple):
    """One coordinate of a row number.

    ``inner * size`` divides the dimension's size. A whole dimension is ``(dim, 1, shape[dim])``.
    An axis of size 1 says that all of the dimension is one row.
    """

    dim: int
    inner: Any
    size: Any


def _proven(condition: Any) -> bool:
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, as far as that is known."""
    return a is b or _proven(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal, as far as that is known."""
    if len(a) != len(b):
        return False
    for one, other in zip(a, b):  # noqa: B905, SIM110 - on the way of every op
        if one is not other and not _proven(one == other):
            return False
    return True


def divides(a: Any, b: Any) -> bool:
    """Whether ``b`` is a multiple of ``a``, as far as that is known."""
    if type(a) is int and type(b) is int:
        return b % a == 0 if a else b == 0
    return same(a, 1) or same(a, b) or _proven(b % a == 0)


def below(a: Any, b: Any) -> bool:
    """Whether the digits below ``a`` are among those below ``b``, as far as that is known."""
    if type(a) is int and type(b) is int:
        return a <= b
    return divides(a, b)


def product(sizes: Iterable[Any]) -> Any:
    """The product; 1 of none."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def strides(shape: Sequence[Any]) -> list[Any]:
    """Of each dimension, how many elements one step along it passes over in a contiguous tensor."""
    result: list[Any] = []
    step: Any = 1
    for size in reversed(shape):
        result.append(step)
        step = step * size
    result.reverse()
    return result


class _Digits:
    """Sorts the axes of one dimension by their digits, the highest first."""

    __slots__ = ("axis",)

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __lt__(self, other: _Digits) -> bool:
        return below(other.axis.inner * other.axis.size, self.axis.inner)


def by_digits(ks: Sequence[int], axes: Sequence[Axis]) -> list[int]:
    """Axes ``ks`` of one dimension, the one of the highest digits first."""
    return sorted(ks, key=lambda k: _Digits(axes[k]))


def is_whole(axis: Axis, size: Any) -> bool:
    """Whether each index of a dimension of ``size`` is a coordinate of its own."""
    return same(axis.inner, 1) and same(axis.size, size)


def _smaller(a: Any, b: Any) -> Any:
    return torch.sym_min(a, b)  # type: ignore[no-untyped-call]


def bounds(start: Any, end: Any, size: Any) -> tuple[Any, Any]:
    """A slice's start and end in 0..size, as Python reads them."""
    if start is None:
        start = 0
    if end is None or (type(end) is int and end >= 0x7FFFFFFFFFFFFFFF):
        end = size
    if all(type(number) is int for number in (start, end, size)):
        start, end, _ = slice(start, end).indices(size)
        return start, max(start, end)
    start = start + size if type(start) is int and start < 0 else start
    end = end + size if type(end) is int and end < 0 else end
    start = start if _at_most(start, size) else _smaller(start, size)
    end = end if _at_most(end, size) else _smaller(end, size)
    return start, end


def _at_most(a: Any, b: Any) -> bool:
    """Whether a <= b, as far as that is known."""
    if type(a) is int and type(b) is int:
        return a <= b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a <= b)
