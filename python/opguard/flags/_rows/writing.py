"""Where rows go in ops that write into part of a tensor.

What is overwritten takes its row's flags with it only where all of the row goes; a row that was
written in part has what it had and what was written. Numbers written say nothing of any row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from opguard.flags._rows.axes import product, same, strides
from opguard.flags._rows.indexing import Picks, placed
from opguard.flags._rows.numbering import (
    broadest,
    by_row,
    device_of,
    landed,
    numbers,
    plain,
    unflagged,
    whole_dims,
)
from opguard.flags._rows.rows import Rows, cat_rows, merge_rows
from opguard.flags._rows.rules import lost, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from opguard.flags._rows.rules import Call

__all__: list[str] = []


def _numbered(rows: Rows | None, shape: Sequence[Any], first: Any, device: Any) -> Tensor:
    """Row numbers from ``first`` on; -1 for a tensor without rows."""
    if rows is None:
        return torch.full((1,) * len(shape), -1, dtype=torch.int64, device=device)
    return numbers(rows, first, device)


def _spread(values: Tensor, shape: Sequence[Any], dims: Sequence[int]) -> Tensor:
    """``values`` with the sizes of ``shape`` along ``dims``."""
    return values.expand([shape[d] if d in dims else n for d, n in enumerate(values.shape)])


def _template(own: Rows | None, payload: Any, shape: Sequence[Any], dims: Sequence[int]) -> Rows:
    """The rows that a written tensor is to have: its own, or if it has none those of ``dims``."""
    return own if own is not None else whole_dims(shape, dims, payload)


class _Write(NamedTuple):
    """A write into part of a tensor."""

    own: Rows | None  # of what is written into
    other: Rows | None  # of what is written
    shape: Sequence[Any]  # of what is written into
    dims: Sequence[int]  # where its rows lie if it has none yet
    device: Any  # where the index tensors of the op are
    wide: Sequence[int] = ()  # the dims that the op needs at their sizes


def _replayed(this: _Write, write: Callable[[Tensor, Any], Tensor]) -> Rows | None:
    """The rows after a write that replaces, by writing row numbers over row numbers.

    ``write``: the op itself, on (the numbers of own, those of other, or -1).
    """
    own, other, shape = this.own, this.other, this.shape
    if (own is None and other is None) or same(product(shape), 0):  # no place to write to
        return own
    first = 0 if own is None else own.payload.rows
    before = _numbered(own, shape, 0, this.device)
    after: Any = -1 if other is None else numbers(other, first, this.device)
    held = _template(own, None if other is None else other.payload, shape, this.dims)
    need = {*this.wide, *(axis.dim for axis in held.axes)}
    result = write(_spread(before, shape, sorted(need)), after)
    payload = _joined(own, other)
    return Rows(held.shape, held.axes, payload.gather(by_row(result, held)))


def _joined(own: Rows | None, other: Rows | None) -> Any:
    payloads = [rows.payload for rows in (own, other) if rows is not None]
    if len(payloads) == 1:
        return payloads[0]
    return payloads[0].cat(0, [(payload, (payload.rows,)) for payload in payloads])


def _added(this: _Write, pairs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Rows | None:
    """The rows after a write that adds to what is there: own, and what lands on each.

    ``pairs``: (numbers of the rows written to, of those written) -> the two of each element.
    """
    own, other, shape = this.own, this.other, this.shape
    if other is None or same(product(shape), 0):
        return own
    held = _template(own, other.payload, shape, this.dims)
    targets = _spread(numbers(held, 0, this.device), shape, this.wide)
    count = product(axis.size for axis in held.axes)
    to, frm = pairs(targets, numbers(other, 0, this.device))
    to, frm = torch.broadcast_tensors(to, frm)  # type: ignore[no-untyped-call]
    new = Rows(held.shape, held.axes, landed(other.payload, count, to, frm))
    return new if own is None else Rows(own.shape, own.axes, own.payload.merge(new.payload))


# --- everything, or everything by a mask ----------------------------------------------------------


@rule("aten::copy", "aten::copy_")
def _copy(call: Call) -> Rows | None:
    own, other, shape = call.rows("self"), call.rows("src"), call.shape("self")
    return _overwritten(own, other, shape)


def _overwritten(own: Rows | None, other: Rows | None, shape: Sequence[Any]) -> Rows | None:
    if own is None:
        return merge_rows([other], shape)
    if other is None:
        return unflagged(own)
    spread = other.expanded(shape)
    # The rows stay where they were: what is written fits in.
    return spread if spread.axes == own.axes else merge_rows([unflagged(own), spread], shape)


@rule("aten::fill")
def _fill(call: Call) -> Rows | None:
    return _overwritten(call.rows("self"), call.rows("value"), call.shape("self"))


@rule(
    "aten::zero",
    "aten::bernoulli_.float",
    "aten::cauchy",
    "aten::exponential",
    "aten::geometric",
    "aten::log_normal",
    "aten::normal_",
    "aten::normal_functional",
    "aten::random",
    "aten::uniform",
)
def _new_values(call: Call) -> Rows | None:
    own = call.rows("self")
    return None if own is None else unflagged(own)


@rule("aten::masked_fill")
def _masked_fill(call: Call) -> Any:
    found = [call.rows("self"), call.rows("mask"), call.rows("value")]
    return lambda out: merge_rows(found, out.shape)


@rule("aten::masked_scatter")
def _masked_scatter(call: Call) -> Rows | None:
    own, other, mask = call.rows("self"), call.rows("source"), plain(call["mask"])
    shape = broadest(call.shape("self"), mask.shape)
    masked = call.rows("mask")
    if own is not None:
        own = own.expanded(shape)
    if other is None:
        return merge_rows([own, masked], shape)

    def write(before: Tensor, after: Any) -> Tensor:
        source = after.expand(call.shape("source")).contiguous()
        return before.contiguous().masked_scatter(mask.expand(shape), source)

    every = range(len(shape))
    this = _Write(own, other, shape, list(every)[:1], mask.device, every)
    found = _replayed(this, write)
    return found if masked is None else merge_rows([found, masked], shape)


# --- along one dim --------------------------------------------------------------------------------


@rule("aten::slice_scatter")
def _slice_scatter(call: Call) -> Rows | None:
    own, other, shape, dim = call.rows("self"), call.rows("src"), call.shape("self"), call["dim"]
    dim %= len(shape)
    size, step = shape[dim], call["step"]
    start, end, _ = slice(call["start"], call["end"]).indices(size)
    return _sliced_in(own, other, shape, dim, (start, max(start, end), step))


def _sliced_in(
    own: Rows | None, other: Rows | None, shape: Any, dim: int, span: tuple[Any, Any, Any]
) -> Rows | None:
    start, end, step = span
    if same(start, 0) and same(end, shape[dim]) and same(step, 1):
        return _overwritten(own, other, shape)
    along = any(rows is not None and rows.on(dim) for rows in (own, other))
    if not along:
        return merge_rows([own, None if other is None else other.resized(dim, shape[dim])], shape)
    if same(step, 1):
        return _spliced(own, other, shape, dim, (start, end))

    def write(before: Tensor, after: Any) -> Tensor:
        part = before[(slice(None),) * dim + (slice(start, end, step),)]
        source = after if isinstance(after, torch.Tensor) else torch.full_like(part, after)
        before = _opened(before, source, dim)
        part = before[(slice(None),) * dim + (slice(start, end, step),)]
        return before.slice_scatter(source.expand(part.shape), dim, start, end, step)

    dims = [dim] if other is None else sorted({dim, *other.dims})
    return _replayed(_Write(own, other, shape, dims, _device(own, other), [dim]), write)


def _opened(before: Tensor, source: Tensor, *dims: int) -> Tensor:
    """``before`` made as large as ``source`` along the other dims, where it was all equal."""
    return before.expand(
        [n if d in dims or n != 1 else source.shape[d] for d, n in enumerate(before.shape)]
    )


def _spliced(
    own: Rows | None, other: Rows | None, shape: Any, dim: int, span: tuple[Any, Any]
) -> Rows | None:
    start, end = span

    def part(first: Any, last: Any) -> tuple[Rows | None, tuple[Any, ...]]:
        sizes = (*shape[:dim], last - first, *shape[dim + 1 :])
        return None if own is None else own.sliced(dim, first, last, 1), sizes

    middle = (other, (*shape[:dim], end - start, *shape[dim + 1 :]))
    parts = [part(0, start), middle, part(end, shape[dim])]
    return cat_rows([one for one in parts if not same(one[1][dim], 0)], dim)


@rule("aten::select_scatter")
def _select_scatter(call: Call) -> Rows | None:
    own, other, shape, dim = call.rows("self"), call.rows("src"), call.shape("self"), call["dim"]
    dim %= len(shape)
    at = call["index"]
    at = at + shape[dim] if at < 0 else at
    other = None if other is None else other.unsqueezed(dim)
    return _sliced_in(own, other, shape, dim, (at, at + 1, 1))


def _along(call: Call, source: str) -> tuple[Any, ...]:
    """For the ``index_*`` ops: own rows, those written with the index's, shape, dim, index."""
    own, other, ids = (_listed(call.rows(name)) for name in ("self", source, "index"))
    shape, index = call.shape("self") or (1,), plain(call["index"]).reshape(-1)
    dim = call["dim"] % len(shape)
    part = (*shape[:dim], index.shape[0], *shape[dim + 1 :])
    if other is not None:
        other = other.expanded(part) if call.shape(source) else other.whole(part)
    if ids is not None:
        other = merge_rows([other, placed(ids, [dim], part)], part)
    return own, other, shape, dim, index


def _listed(rows: Rows | None) -> Rows | None:
    """Those of a number as of a list of one, which it stands for beside an index."""
    if rows is None or rows.shape:
        return rows
    return whole_dims((1,), (0,), rows.payload)


def _as_given(call: Call, found: Rows | None) -> Rows | None:
    """Those of a list of one as of the number it stood for."""
    return found if found is None or call.shape("self") else found.reduced((0,))


def _apart(own: Rows | None, other: Rows | None, dim: int) -> bool:
    """Whether no row of either ends along ``dim``."""
    return not any(rows is not None and rows.on(dim) for rows in (own, other))


def _device(*found: Rows | None) -> Any:
    return next(device_of(rows) for rows in found if rows is not None)


def _dims(other: Rows | None, *more: int) -> list[int]:
    return sorted({*more, *(() if other is None else other.dims)})


@rule("aten::index_copy", "aten::index_fill")
def _index_copy(call: Call) -> Rows | None:
    name = "value" if "value" in call else "source"
    own, other, shape, dim, index = _along(call, name)
    if _apart(own, other, dim):
        found = merge_rows([own, None if other is None else other.resized(dim, shape[dim])], shape)
        return _as_given(call, found)

    def write(before: Tensor, after: Any) -> Tensor:
        if not isinstance(after, torch.Tensor):
            return before.index_fill(dim, index, after)
        before = _opened(before, after, dim)
        part = [index.shape[0] if d == dim else n for d, n in enumerate(before.shape)]
        return before.index_copy(dim, index, after.expand(part))

    this = _Write(own, other, shape, _dims(other, dim), index.device, [dim])
    return _as_given(call, _replayed(this, write))


@rule("aten::index_add", "aten::index_reduce")
def _index_add(call: Call) -> Rows | None:
    own, other, shape, dim, index = _along(call, "source")
    if other is None or _apart(own, other, dim):
        found = merge_rows([own, None if other is None else other.resized(dim, shape[dim])], shape)
        return _as_given(call, found)

    def pairs(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        return targets.index_select(dim, index), sources

    this = _Write(own, other, shape, _dims(other, dim), index.device, [dim])
    return _as_given(call, _added(this, pairs))


# --- by an index for each element -----------------------------------------------------------------


def _scattered(call: Call) -> tuple[Any, ...]:
    """For the ``scatter*`` ops: own rows, those written in the index's shape, dim, index."""
    own, ids = _listed(call.rows("self")), _listed(call.rows("index"))
    other = _listed(call.rows("src")) if "src" in call else None
    shape, index = call.shape("self") or (1,), plain(call["index"])
    index = index if index.dim() else index.reshape(1)
    dim = call["dim"] % len(shape)
    if same(product(index.shape), 0):  # of any shape then, and nothing is written
        return own, None, shape, dim, index.reshape((0,) * len(shape))
    if other is not None:
        for d, size in enumerate(index.shape):
            other = other.sliced(d, 0, size, 1)
    return own, merge_rows([other, ids], index.shape), shape, dim, index


def _grown(rows: Rows | None, shape: Sequence[Any], dim: int) -> Rows | None:
    """Rows of what is written, in the tensor that it is written into."""
    if rows is None:
        return None
    rows = rows.resized(dim, shape[dim])
    for d, size in enumerate(shape):
        if d != dim and not same(rows.shape[d], size):
            rows = rows.padded(d, 0, size - rows.shape[d])
    return rows


@rule("aten::scatter")
def _scatter(call: Call) -> Rows | None:
    if "reduce" in call:
        return _scatter_add(call)
    own, other, shape, dim, index = _scattered(call)
    if _apart(own, other, dim):
        return _as_given(call, merge_rows([own, _grown(other, shape, dim)], shape))

    def write(before: Tensor, after: Any) -> Tensor:
        before = before.contiguous()
        if isinstance(after, torch.Tensor):
            return before.scatter(dim, index, after.expand(index.shape))
        return before.scatter(dim, index, after)

    this = _Write(own, other, shape, _dims(other, dim), index.device, range(len(shape)))
    return _as_given(call, _replayed(this, write))


@rule("aten::scatter_add", "aten::scatter_reduce")
def _scatter_add(call: Call) -> Rows | None:
    own, other, shape, dim, index = _scattered(call)
    if other is None or _apart(own, other, dim):
        return _as_given(call, merge_rows([own, _grown(other, shape, dim)], shape))

    def pairs(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        return targets.gather(dim, index), sources

    this = _Write(own, other, shape, _dims(other, dim), index.device, range(len(shape)))
    return _as_given(call, _added(this, pairs))


@rule(
    "aten::index_put", "aten::_unsafe_index_put", "aten::_index_put_impl", "aten::_index_put_impl_"
)
def _index_put(call: Call) -> Rows | None:
    own, other, shape = call.rows("self"), call.rows("values"), call.shape("self")
    indices = [None if at is None else plain(at) for at in call["indices"]]
    if all(at is None for at in indices):
        other = None if other is None else other.expanded(shape)
        return (
            merge_rows([own, other], shape)
            if call["accumulate"]
            else _overwritten(own, other, shape)
        )
    picks = Picks(shape, indices, call.rows_list("indices"))
    if other is not None:
        other = other.expanded(picks.out)
    other = merge_rows([other, picks.own_rows()], picks.out)
    ours = own is not None and any(own.on(d) for d in picks.taken)
    theirs = other is not None and any(other.on(d) for d in picks.broad_dims)
    at = {k: d for d, k in zip(picks.left, picks.left_dims, strict=True)}
    if not ours and not theirs:
        if other is not None:
            axes = tuple(axis._replace(dim=at[axis.dim]) for axis in other.axes)
            other = Rows(shape, axes, other.payload)
        return merge_rows([own, other], shape)
    dims = sorted({at[d] for d in (other.dims if other else ()) if d in at} | set(picks.taken))
    where = picks.indices()
    wide = [*picks.taken, *dims]
    device = next(one.at.device for one in picks.ones)
    this = _Write(own, other, shape, dims, device, wide)
    if call["accumulate"]:
        return _added(this, lambda targets, sources: (targets[_at(where)], sources))

    def write(before: Tensor, after: Any) -> Tensor:
        result = before.clone(memory_format=torch.contiguous_format)
        result[_at(where)] = after
        return result

    return _replayed(this, write)


def _at(indices: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(slice(None) if at is None else at for at in indices)


@rule("aten::put")
def _put(call: Call) -> Rows | None:
    own, index, shape = call.rows("self"), plain(call["index"]), call.shape("self")
    other = merge_rows([call.rows("source"), call.rows("index")], index.shape)
    every = range(len(shape))
    this = _Write(own, other, shape, every, index.device, every)
    if call["accumulate"]:

        def pairs(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
            return targets.take(index), sources

        return _added(this, pairs)

    def write(before: Tensor, after: Any) -> Tensor:
        source = torch.full_like(index, -1) if other is None else after.expand(index.shape)
        return before.contiguous().put(index, source.contiguous())

    return _replayed(this, write)


@rule("aten::diagonal_scatter")
def _diagonal_scatter(call: Call) -> Rows | None:
    own, other, shape = call.rows("self"), call.rows("src"), call.shape("self")
    one, two = (call[name] % len(shape) for name in ("dim1", "dim2"))
    lead = [d for d in range(len(shape)) if d not in (one, two)]
    ends = any(own is not None and own.on(d) for d in (one, two))
    last = len(shape) - 2
    if not ends and (other is None or not other.on(last)):
        return merge_rows([own, placed(other, [*lead, one], shape)], shape)

    def write(before: Tensor, after: Any) -> Tensor:
        result = before.clone(memory_format=torch.contiguous_format)
        result.diagonal(call["offset"], one, two).copy_(torch.as_tensor(after))
        return result

    dims = [] if other is None else [[*lead, one][d] for d in other.dims]
    where = sorted({*dims, one})
    this = _Write(own, other, shape, where, _device(own, other), range(len(shape)))
    return _replayed(this, write)


@rule("aten::as_strided_scatter")
def _as_strided_scatter(call: Call) -> Rows | None:
    own, other, shape = call.rows("self"), call.rows("src"), call.shape("self")
    size, steps, first = tuple(call["size"]), tuple(call["stride"]), call["storage_offset"] or 0
    if own is None and other is None:
        return None
    if tuple(call["self"].stride()) != tuple(strides(shape)) or call["self"].storage_offset():
        lost(call, "its tensor is not contiguous from the start of its storage")

    def write(before: Tensor, after: Any) -> Tensor:
        result = before.clone(memory_format=torch.contiguous_format)
        result.as_strided(size, steps, first).copy_(torch.as_tensor(after))
        return result

    every = range(len(shape))
    return _replayed(_Write(own, other, shape, every, _device(own, other), every), write)
