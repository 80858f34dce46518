"""The rows of ops that take several tensors: elementwise, and side by side.

With :class:`Rows` itself, of one tensor, this is what rules are written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opguard.flags._rows.axes import Axis, is_whole, same, same_shape
from opguard.flags._rows.moves import Rows

__all__ = ["Rows", "cat_rows", "merge_rows", "stack_rows"]


def merge_rows(parts: Sequence[Rows | None], shape: Sequence[Any]) -> Rows | None:
    """The rows of an elementwise op's result of ``shape``, to which all parts broadcast.

    The first part with several rows says where they lie; another's axes that lie elsewhere are
    merged into all of them. None without any part.
    """
    known = [part for part in parts if part is not None]
    if not known:
        return None
    first = known[0]
    if same_shape(first.shape, shape):
        for part in known:
            if part.payload is not first.payload or part.axes != first.axes:
                break
            if len(part.shape) != len(first.shape):  # the same axes, but of other dims
                break
        else:
            return first
    known = [part.expanded(shape) for part in known]
    if len(known) == 1:
        return known[0]
    lead, fitted = _fitted(known)
    payloads = [part.payload for part in fitted]
    return Rows(lead.shape, lead.axes, payloads[0].merge(*payloads[1:]))


def _several(rows: Rows) -> bool:
    return not all(same(axis.size, 1) for axis in rows.axes)


def _fitted(parts: Sequence[Rows]) -> tuple[Rows, list[Rows]]:
    """(the leading part, all parts with its axes): parts of one shape."""
    lead = next((part for part in parts if _several(part)), None)
    if lead is None:
        lead = next((part for part in parts if part.axes), parts[0])
    for dim in lead.dims:
        mine = [lead.axes[k] for k in lead.on(dim)]
        if all(same(axis.size, 1) for axis in mine):
            continue
        for part in parts:
            theirs = [part.axes[k] for k in part.on(dim) if not same(part.axes[k].size, 1)]
            if theirs and not _alike(mine, theirs):
                lead = lead.made_whole(dim)
    return lead, [_as_lead(part, lead) for part in parts]


def _alike(mine: Sequence[Axis], theirs: Sequence[Axis]) -> bool:
    """Whether the axes are the same, in the same order."""
    return mine is theirs or (
        len(mine) == len(theirs)
        and all(
            a.dim == b.dim and same(a.inner, b.inner) and same(a.size, b.size)
            for a, b in zip(mine, theirs, strict=True)
        )
    )


class _Blank:
    """A payload of nothing, for finding out where rows will lie."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self


_BLANK: Any = _Blank()


def _as_lead(part: Rows, lead: Rows) -> Rows:
    """``part`` with the axes of ``lead``, merged and repeated where it has others."""
    if _alike(part.axes, lead.axes):
        return part
    real = {axis.dim for axis in lead.axes if not same(axis.size, 1)}
    for dim in part.dims:
        theirs = [part.axes[k] for k in part.on(dim)]
        mine = [lead.axes[k] for k in lead.on(dim)]
        if dim not in real or all(same(axis.size, 1) for axis in theirs):
            part = part._folded(part.on(dim))
        elif not _alike(mine, theirs):
            part = part.made_whole(dim)
    # What is left are axes that the lead has too, in another order at most.
    order, missing = [], []
    for at, axis in enumerate(lead.axes):
        found = [k for k in part.on(axis.dim) if _alike([axis], [part.axes[k]])]
        if found:
            order.append(found[0])
        else:
            missing.append(at)
    payload = part.payload.permute(part.sizes, order)
    sizes = [part.axes[k].size for k in order]
    for at in missing:
        payload = payload.spread(sizes, at, lead.axes[at].size)
        sizes.insert(at, lead.axes[at].size)
    return Rows(part.shape, lead.axes, payload)


def cat_rows(parts: Sequence[tuple[Rows | None, Sequence[Any]]], dim: int) -> Rows | None:
    """Tensors of these rows and shapes one after the other along ``dim``; None without any rows."""
    known = [(rows, shape) for rows, shape in parts if not _is_nothing(shape, parts)]
    if all(rows is None for rows, _ in known):
        return None
    dim = dim + len(known[0][1]) if dim < 0 else dim
    total = sum(shape[dim] for _, shape in known)
    result = (*known[0][1][:dim], total, *known[0][1][dim + 1 :])
    if not any(rows is not None and rows.on(dim) for rows, _ in known):
        # No row ends at an index of `dim`: each takes what lies in all parts.
        return merge_rows(
            [None if rows is None else rows._with_size(dim, total) for rows, _ in known], result
        )
    if all(rows is None or _only_in(rows, dim) for rows, _ in known):
        parted = [(rows.payload if rows else None, (shape[dim],)) for rows, shape in known]
        first = next(payload for payload, _ in parted if payload is not None)
        return Rows(result, (Axis(dim, 1, total),), first.cat(0, parted))
    pieces = [None if rows is None else _with_axis(rows, dim) for rows, _ in known]
    axes, k = _beside([piece for piece in pieces if piece is not None], dim)
    whole: list[tuple[Any, list[Any]]] = []
    for piece, (_, shape) in zip(pieces, known, strict=True):
        model = Rows(shape, (*axes[:k], Axis(dim, 1, shape[dim]), *axes[k:]), _BLANK)
        fitted = None if piece is None else _as_lead(piece, model).payload
        whole.append((fitted, model.sizes))
    payload = next(p for p, _ in whole if p is not None).cat(k, whole)
    return Rows(result, (*axes[:k], Axis(dim, 1, total), *axes[k:]), payload)


def _only_in(rows: Rows, dim: int) -> bool:
    """Whether each index of ``dim`` is a row, and nothing else is: a batch in that dimension."""
    axes = rows.axes
    return len(axes) == 1 and axes[0].dim == dim and is_whole(axes[0], rows.shape[dim])


def _beside(pieces: Sequence[Rows], dim: int) -> tuple[tuple[Axis, ...], int]:
    """(the axes of the leading piece off ``dim``, the place among them of the one in ``dim``)."""
    flat = []
    for piece in pieces:
        axes = tuple(axis for axis in piece.axes if axis.dim != dim)
        flat.append(Rows((*piece.shape[:dim], 1, *piece.shape[dim + 1 :]), axes, _BLANK))
    lead = next((at for at, one in enumerate(flat) if _several(one)), 0)
    k = next(k for k, axis in enumerate(pieces[lead].axes) if axis.dim == dim)
    axes = _fitted([flat[lead], *flat])[0].axes
    return axes, min(k, len(axes))


def _is_nothing(shape: Sequence[Any], parts: Sequence[tuple[Rows | None, Sequence[Any]]]) -> bool:
    """Whether torch.cat passes over a tensor: one of shape (0,) beside others of more sizes."""
    return len(shape) == 1 and same(shape[0], 0) and any(len(other) != 1 for _, other in parts)


def _with_axis(rows: Rows, dim: int) -> Rows:
    """Each index of ``dim`` a coordinate of its own, at its place among sorted dimensions."""
    if rows.on(dim):
        return rows.made_whole(dim)
    k = sum(axis.dim < dim for axis in rows.axes)
    size = rows.shape[dim]
    payload = rows.payload.spread(rows.sizes, k, size)
    return Rows(rows.shape, (*rows.axes[:k], Axis(dim, 1, size), *rows.axes[k:]), payload)


def stack_rows(parts: Sequence[tuple[Rows | None, Sequence[Any]]], dim: int) -> Rows | None:
    """Tensors of these rows and one shape side by side in a new dimension ``dim``.

    Each index of it has rows of its own, unless all parts have the same samples.
    """
    known = [rows for rows, _ in parts if rows is not None]
    if not known:
        return None
    shape = parts[0][1]
    dim = dim + len(shape) + 1 if dim < 0 else dim
    first = known[0]
    opened = [
        (None if rows is None else rows.unsqueezed(dim), (*size[:dim], 1, *size[dim:]))
        for rows, size in parts
    ]
    shared = first.payload.copies_share and all(
        rows is not None
        and _alike(rows.axes, first.axes)
        and rows.payload.merge(first.payload) is rows.payload
        for rows, _ in parts
    )
    if not shared:
        opened = [(None if rows is None else _with_axis(rows, dim), size) for rows, size in opened]
    return cat_rows(opened, dim)
