"""Where rows go in ops that pick elements by an index or a mask.

The rows of the index go along: what was looked up by a bad number is no better than the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from opguard.flags._rows.axes import product, strides
from opguard.flags._rows.numbering import broadest, device_of, plain
from opguard.flags._rows.rows import Rows, merge_rows
from opguard.flags._rows.rules import rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from opguard.flags._rows.rules import Call

__all__ = ["Picks", "placed"]


def placed(rows: Rows | None, dims: Sequence[int], shape: Sequence[Any]) -> Rows | None:
    """``rows`` where its dim d is dim ``dims[d]`` of ``shape``; along the other dims all equal."""
    if rows is None:
        return None
    axes = tuple(axis._replace(dim=dims[axis.dim]) for axis in rows.axes)
    return Rows(tuple(shape), axes, rows.payload)


class _One(NamedTuple):
    dim: int  # of the indexed tensor
    at: Tensor  # int64
    rows: Rows | None


class Picks:
    """The indices of ``tensor[indices]``: which dims they take, and what shape comes out.

    ``indices``: None, integer or boolean tensors, one for each dim (a boolean one for as many as
    it has); ``rows`` their rows.
    """

    def __init__(
        self, shape: Sequence[Any], indices: Sequence[Tensor | None], rows: Sequence[Rows | None]
    ) -> None:
        self.ones: list[_One] = []
        dim = 0
        for at, own in zip(indices, rows, strict=True):
            if at is None:
                dim += 1
            elif at.dtype in (torch.bool, torch.uint8):
                self._mask(dim, at, own)
                dim += at.dim()
            else:
                self.ones.append(_One(dim, at, own))
                dim += 1
        self.shape = tuple(shape)
        self.taken = [one.dim for one in self.ones]
        self.left = [d for d in range(len(shape)) if d not in self.taken]
        self.broad = broadest(*(one.at.shape for one in self.ones))
        # Indices side by side are replaced where they stand, others go to the front.
        beside = self.taken == list(range(self.taken[0], self.taken[0] + len(self.taken)))
        self.first = self.taken[0] if beside else 0
        rest = [self.shape[d] for d in self.left]
        self.out = (*rest[: self.first], *self.broad, *rest[self.first :])
        self.broad_dims = list(range(self.first, self.first + len(self.broad)))
        self.left_dims = [d for d in range(len(self.out)) if d not in self.broad_dims]

    def _mask(self, dim: int, mask: Tensor, rows: Rows | None) -> None:
        found = mask.nonzero()
        for k in range(mask.dim()):
            self.ones.append(_One(dim + k, found[:, k], None))
        if mask.dim() == 0:  # as many as there are Trues, of a new dim
            raise NotImplementedError
        if rows is not None:
            flat = _flat([found[:, k] for k in range(mask.dim())], mask.shape)
            own = rows.reshaped((product(mask.shape),)).taken(0, _beside(rows, flat))
            self.ones[-1] = self.ones[-1]._replace(rows=own)

    def indices(self) -> list[Tensor | None]:
        """The integer indices, None for the dims that are left whole."""
        found: list[Tensor | None] = [None] * len(self.shape)
        for one in self.ones:
            found[one.dim] = one.at
        return found

    def own_rows(self) -> Rows | None:
        """The rows of the indices, where they are in what comes out."""
        found = []
        for one in self.ones:
            if one.rows is not None:
                spread = one.rows.expanded(self.broad)
                found.append(placed(spread, self.broad_dims, self.out))
        return merge_rows(found, self.out)

    def of(self, rows: Rows | None) -> Rows | None:
        """``rows`` of the indexed tensor, where they are in what comes out."""
        if rows is None:
            return None
        by = [one for one in self.ones if rows.on(one.dim)]
        for one in self.ones:
            if one not in by:
                rows = rows.resized(one.dim, 1)
        at = {d: self.left_dims[k] for k, d in enumerate(self.left)}
        if not by:
            axes = tuple(axis._replace(dim=at[axis.dim]) for axis in rows.axes if axis.dim in at)
            return Rows(self.out, axes, rows.payload)
        return self._moved(rows, by, at)

    def _moved(self, rows: Rows, by: list[_One], at: dict[int, int]) -> Rows:
        front = [one.dim for one in by]
        order = [*front, *self.left, *(d for d in self.taken if d not in front)]
        sizes = [self.shape[d] for d in front]
        rows = rows.permuted(tuple(order))
        rest = rows.shape[len(front) :]
        rows = rows.reshaped((product(sizes), *rest))
        broad = broadest(*(one.at.shape for one in by))
        flat = _flat([one.at for one in by], sizes).expand(broad)
        rows = rows.taken(0, _beside(rows, flat.reshape(-1))).reshaped((*broad, *rest))
        # Where other indices make more of a dim of size 1, all of it is that one row.
        dims = [*self.broad_dims[len(self.broad) - len(broad) :], *(at[d] for d in self.left)]
        axes = tuple(
            axis._replace(dim=dims[axis.dim]) for axis in rows.axes if axis.dim < len(dims)
        )
        return Rows(self.out, axes, rows.payload)


def _places(index: Tensor, size: Any) -> Tensor:
    """What an index or a mask of one dim of ``size`` picks, counted from the front."""
    if index.dtype in (torch.bool, torch.uint8):
        return index.nonzero()[:, 0]
    return torch.where(index < 0, index + size, index)


def _flat(at: Sequence[Tensor], shape: Sequence[Any]) -> Tensor:
    """One index into the dims of ``shape`` merged, of one into each."""
    found = torch.zeros((), dtype=torch.int64, device=at[0].device)
    for index, size, step in zip(at, shape, strides(shape), strict=True):
        place = index.long()
        found = found + torch.where(place < 0, place + size, place) * step
    return found


def _beside(rows: Rows, index: Tensor) -> Tensor:
    device = device_of(rows)
    return index if str(device) == "cpu" else index.to(device)


@rule("aten::index", "aten::_unsafe_index")
def _index(call: Call) -> Any:
    indices = [None if at is None else plain(at) for at in call["indices"]]
    given = [dim for dim, at in enumerate(indices) if at is not None]
    if not given:
        return call.rows("self")
    if len(given) == 1 and call.rows_list("indices")[given[0]] is None:
        rows, (dim,) = call.rows("self"), given
        only: Any = indices[dim]
        if rows is not None and only.dim() == 1:
            return rows.taken(dim, _beside(rows, _places(only, rows.shape[dim])))
    picks = Picks(call.shape("self"), indices, call.rows_list("indices"))
    return merge_rows([picks.of(call.rows("self")), picks.own_rows()], picks.out)


@rule("aten::index_select")
def _index_select(call: Call) -> Rows | None:
    rows, own, shape, index = (
        call.rows("self"),
        call.rows("index"),
        call.shape("self"),
        plain(call["index"]),
    )
    if not shape:
        return merge_rows([rows, None if own is None else own.whole(())], ())
    dim = call["dim"] % len(shape)
    count = product(index.shape)
    out = (*shape[:dim], count, *shape[dim + 1 :])
    if rows is not None:
        flat = index.reshape(-1)
        rows = rows.taken(dim, _beside(rows, flat)) if rows.on(dim) else rows.resized(dim, count)
    return merge_rows([rows, placed(own, [dim], out)], out)


@rule("aten::masked_select")
def _masked_select(call: Call) -> Rows | None:
    mask = plain(call["mask"])
    shape = broadest(call.shape("self"), mask.shape)
    total = product(shape)
    at = mask.expand(shape).reshape(-1).nonzero()[:, 0]
    found = []
    for rows in (call.rows("self"), call.rows("mask")):
        if rows is not None:
            flat = rows.expanded(shape).reshaped((total,))
            found.append(flat.taken(0, _beside(rows, at)))
    return merge_rows(found, at.shape)


@rule("aten::take")
def _take(call: Call) -> Rows | None:
    rows, index = call.rows("self"), plain(call["index"])
    if rows is not None:
        total = product(rows.shape)
        flat = _flat([index.reshape(-1)], [total])
        rows = rows.reshaped((total,)).taken(0, _beside(rows, flat)).reshaped(tuple(index.shape))
    return merge_rows([rows, call.rows("index")], index.shape)


@rule("aten::gather")
def _gather(call: Call) -> Rows | None:
    rows, own, index = call.rows("self"), call.rows("index"), plain(call["index"])
    if rows is not None:
        # A 0-d index or tensor stands for one of a single element.
        flat = rows if rows.shape else rows.unsqueezed(0)
        at = index if index.dim() else index.unsqueeze(0)
        if at.dim() != len(flat.shape):  # empty: torch lets it have any shape and dtype
            return merge_rows([rows.whole(tuple(index.shape)), own], index.shape)
        rows = flat.reordered_by(_beside(rows, at.long()), call["dim"])
        rows = rows if index.dim() else rows.reduced((0,))
    return merge_rows([rows, own], index.shape)


@rule("aten::nonzero")
def _nonzero(call: Call) -> Any:
    rows = call.rows("self")
    if rows is None:
        return None

    def found(at: Tensor) -> Rows:
        if not rows.shape:
            return rows.whole(tuple(at.shape))
        flat = _flat(at.unbind(1), rows.shape)
        picked = rows.reshaped((product(rows.shape),)).taken(0, _beside(rows, flat))
        return picked.unsqueezed(-1).expanded(tuple(at.shape))

    return found


@rule("aten::repeat_interleave.Tensor", "aten::repeat_interleave.Tensor_out")
def _repeat_interleave(call: Call) -> Any:
    # Counts in, the index that repeats so often out: an element of it comes of the count it names.
    rows = call.rows("repeats")
    return None if rows is None else lambda out: rows.taken(0, out)
