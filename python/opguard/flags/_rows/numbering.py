"""Rows by number: for ops that decide by the data in an index tensor what lands where.

The numbers of rows are moved by the very op whose rows are asked for. Where they land is where the
rows are, with no second description of the op that could be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opguard.flags._rows.axes import Axis, product, same, same_shape
from opguard.flags._rows.rows import Rows

__all__ = [
    "broadest",
    "by_row",
    "cleared",
    "device_of",
    "landed",
    "numbers",
    "plain",
    "ramp",
    "unflagged",
    "whole_dims",
]

#: Above so many pairs of rows a table of which row meets which is not made.
_TABLE = 1 << 22


def plain(tensor: Any) -> Any:
    """The data of a tensor that carries its rows with it; any other as it is."""
    return getattr(tensor, "_data", tensor)


def broadest(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The shape that all of these broadcast to."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def device_of(rows: Rows) -> Any:
    """Where index tensors for ``rows`` should lie: beside its flags, else where they are read."""
    flags = getattr(rows.payload, "flags", None)
    return "cpu" if flags is None else flags.device


def ramp(rows: Rows, *span: Any) -> Tensor:
    """``torch.arange(*span)`` as an index tensor for ``rows``."""
    return torch.arange(*span, device=device_of(rows))


def whole_dims(shape: Sequence[Any], dims: Sequence[int], payload: Any) -> Rows:
    """Rows along ``dims``, which are whole and stand in this order."""
    return Rows(tuple(shape), tuple(Axis(d, 1, shape[d]) for d in dims), payload)


def numbers(rows: Rows, first: Any = 0, device: Any = None) -> Tensor:
    """Each element's row number plus ``first``; dims without rows have size 1. int64."""
    device = device_of(rows) if device is None else device
    found = torch.full((1,) * len(rows.shape), first, dtype=torch.int64, device=device)
    step: Any = 1
    for axis in reversed(rows.axes):
        if same(axis.size, 1):
            continue
        place = torch.arange(rows.shape[axis.dim], device=device)
        part = torch.div(place, axis.inner, rounding_mode="floor") % axis.size * step
        found = found + part.view([-1 if d == axis.dim else 1 for d in range(found.dim())])
        step = step * axis.size
    return found


def by_row(values: Tensor, rows: Rows) -> Tensor:
    """``values`` (a number an element, 1 for a dim of equal ones) as (rows, elements of each)."""
    pieces: list[Any] = []
    where: dict[int, int] = {}
    for d, size in enumerate(values.shape):
        here = sorted((k for k, a in enumerate(rows.axes) if a.dim == d), key=_inner(rows))
        split: list[tuple[Any, int | None]] = []
        below: Any = 1
        for k in here:
            axis = rows.axes[k]
            split += [(axis.inner // below, None), (axis.size, k)]
            below = axis.inner * axis.size
        split.append((size // below if here else size, None))
        for count, k in reversed(split):
            if k is not None:
                where[k] = len(pieces)
            pieces.append(count)
    lead = [where[k] for k in range(len(rows.axes))]
    rest = [at for at in range(len(pieces)) if at not in lead]
    table = values.reshape(pieces).permute((*lead, *rest))
    return table.reshape(product(pieces[at] for at in lead), product(pieces[at] for at in rest))


def _inner(rows: Rows) -> Any:
    return lambda k: rows.axes[k].inner


def unflagged(rows: Rows) -> Rows:
    """The same rows, each without flags, or of no sample."""
    return Rows(rows.shape, rows.axes, _none(rows.payload, rows.payload.rows))


def cleared(rows: Rows, shape: Sequence[Any]) -> Rows:
    """The same for a tensor that has another shape now, with rows along the same dims."""
    if same_shape(rows.shape, shape):
        return unflagged(rows)
    dims = [d for d in rows.dims if d < len(shape)]
    return whole_dims(shape, dims, _none(rows.payload, product(shape[d] for d in dims)))


def _none(payload: Any, count: Any) -> Any:
    return payload.slice((payload.rows,), 0, 0, 0, 1).pad((0,), 0, 0, count)


def landed(source: Any, count: Any, to: Tensor, frm: Tensor) -> Any:
    """A payload of ``count`` rows: row m is the fold of all rows k of ``source`` in a pair (m, k).

    ``to`` and ``frm`` are int64 tensors of one shape: the pairs. A ``frm`` of -1 is no pair.
    """
    to, frm = to.reshape(-1), frm.reshape(-1)
    have = source.rows
    if type(count) is int and type(have) is int and count * (have + 1) > _TABLE:
        return _by_runs(source, count, to, frm)
    # A column of its own for what is no pair, which is cut off again.
    met = torch.zeros(count * (have + 1), dtype=torch.bool, device=to.device)
    met = met.scatter(0, to * (have + 1) + (frm + 1), True)
    met = met.view(count, have + 1)[:, 1:]
    return source.gather(torch.where(met, torch.arange(have, device=to.device), -1))


def _by_runs(source: Any, count: int, to: Tensor, frm: Tensor) -> Any:
    """As landed, by sorting: log2(pairs) folds of two rows each instead of a table."""
    have = source.rows
    pair = (to * (have + 1) + frm + 1).sort().values
    to = torch.div(pair, have + 1, rounding_mode="floor")
    frm = pair % (have + 1) - 1
    again = torch.zeros_like(pair, dtype=torch.bool)
    again[1:] = pair[1:] == pair[:-1]
    place = torch.arange(pair.shape[0], device=pair.device)
    # After each step the payload's row p holds the last 2 * step pairs up to p of one target.
    found = source.gather(torch.where(again, -1, frm)[:, None])
    step = 1
    while step < pair.shape[0]:
        before = place - step
        joined = (before >= 0) & (to[before.clamp(min=0)] == to)
        found = found.gather(torch.stack([torch.where(joined, before, -1), place], 1))
        step *= 2
    target = torch.arange(count, device=pair.device)
    last = torch.searchsorted(to, target, right=True) - 1
    here = (last >= 0) & (to[last.clamp(min=0)] == target)
    return found.gather(torch.where(here, last, -1)[:, None])
