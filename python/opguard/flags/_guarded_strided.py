"""Rows through as_strided, by which autograd and compiled code take views of views again.

Its rule knows the strides of other view ops. Any others are followed here element by element: where
in memory each row lies, and what of that the new strides see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opguard.flags._rows.axes import Axis, product, strides
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import plan
from opguard.flags.errors import RowsLost

__all__ = ["follow"]

_NAMES = {"aten::as_strided", "aten::as_strided_"}


def follow(func: Any, args: Sequence[Any], kwargs: dict[str, Any], rows_of: Any) -> Any:
    """:func:`opguard.flags._rows.rules.plan`, which also follows all strides."""
    try:
        return plan(func, args, kwargs, rows_of)
    except RowsLost:
        found = _strided(func, args, kwargs, rows_of) if func._schema.name in _NAMES else None
        if found is None:
            raise
        return found


def _strided(func: Any, args: Any, kwargs: Any, rows_of: Any) -> Callable[[Any], Any] | None:
    given = dict(zip(("self", "size", "stride", "storage_offset"), args, strict=False)) | kwargs
    base, size, step = given["self"], tuple(given["size"]), tuple(given["stride"])
    rows = rows_of(base)
    start = given.get("storage_offset")
    start = base.storage_offset() if start is None else start
    numbers = (*base.shape, *base.stride(), base.storage_offset(), *size, *step, start)
    if rows is None or not all(type(number) is int for number in numbers) or 0 in size:
        return None
    home = _rows_in_memory(rows, base)
    if home is None:
        return None
    at = start + _offsets(size, step) - base.storage_offset()
    if at.min() < 0 or at.max() >= len(home) or (home[at] < 0).any():
        return None  # memory that the tensor does not show: there is no telling whose it is
    seen = home[at]
    dims = [d for d in range(len(size)) if (seen != seen.take([0], d)).any()]
    first = seen[tuple(slice(None) if d in dims else slice(1) for d in range(len(size)))]
    index = torch.from_numpy(first.reshape(-1, 1).copy())
    payload = rows.payload.gather(index)
    result = Rows(size, tuple(Axis(d, 1, size[d]) for d in dims), payload)
    return lambda out: [result]


def _offsets(size: Sequence[int], step: Sequence[int]) -> Any:
    """Where in memory each element lies, from the first one on."""
    import numpy

    result = numpy.zeros(tuple(size), numpy.int64)
    for d, (count, width) in enumerate(zip(size, step, strict=True)):
        around = [1] * len(size)
        around[d] = count
        result += (numpy.arange(count) * width).reshape(around)
    return result


def _rows_in_memory(rows: Rows, base: Tensor) -> Any:
    """The row of each place in memory from the first element on, -1 for what is none's.

    None where one place is of several rows.
    """
    import numpy

    shape = tuple(base.shape)
    if 0 in shape:
        return None
    number = numpy.zeros(shape, numpy.int64)
    for axis, width in zip(rows.axes, strides(rows.sizes), strict=True):
        around = [1] * len(shape)
        around[axis.dim] = shape[axis.dim]
        digits = numpy.arange(shape[axis.dim]) // axis.inner % axis.size
        number += (digits * width).reshape(around)
    offsets = _offsets(shape, base.stride())
    home = numpy.full(int(offsets.max()) + 1, -1, numpy.int64)
    home[offsets] = number
    if (
        product(d for d, step in zip(shape, base.stride(), strict=True) if step == 0) > 1
        and (home[offsets] != number).any()
    ):
        return None
    return home
