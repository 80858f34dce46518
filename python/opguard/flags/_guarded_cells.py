"""What tensors over one memory share: the flags of its rows, whoever of them is written into.

A GuardedTensor without views has none of this. The first view makes a cell with the rows of the
tensor that was viewed; the tensor, its views and their views hold the cell, and each view the steps
by which it came from the first. Rows of a view are found from those of the first by taking the same
steps; a write into a view is brought back by taking them with row numbers in the place of flags.
A cell holds no graph of autograd's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from opguard.flags._guarded_strided import follow
from opguard.flags._rows.payloads import NO_SAMPLE, FlagPayload, SamplePayload
from opguard.flags._rows.rows import Rows, merge_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cell", "Linked", "Step"]


class Step(NamedTuple):
    """One view op: what it was called with, the viewed data at ``args[0]``, and which output."""

    before: Step | None
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    data: Tensor
    output: int


class Cell:
    """The rows of the first tensor, and how often they have changed."""

    __slots__ = ("given", "members", "rows", "version")
    rows: Rows
    version: int

    def __init__(self, rows: Rows, given: bool = False) -> None:
        self.rows = rows
        self.version = 0
        self.given = given  # to a region that is being traced
        self.members: list[Any] = []  # all that is traced over this memory, weakly

    def seen_by(self, step: Step | None) -> Rows:
        """The rows of the view that ``step`` made, of the first tensor for None."""
        return self.rows if step is None else _taken(step, self.rows)

    def write(self, step: Step | None, rows: Rows) -> None:
        """``rows`` are those of the view after a write into it."""
        self.version += 1
        self.rows = rows if step is None else self._brought_back(step, rows)

    def _brought_back(self, step: Step, rows: Rows) -> Rows:
        first = self.rows
        payload: Any = first.payload
        count = payload.rows
        origin: Any = _taken(step, Rows(first.shape, first.axes, SamplePayload(count)))
        flags = payload.flags
        clean = FlagPayload(flags.new_zeros(origin.payload.rows, flags.shape[1]), payload.key)
        # Rows as the first tensor knows them, and what else is in the new ones is in all of them.
        lead = Rows(origin.shape, origin.axes, clean)
        written: Any = rows if rows.axes == origin.axes else merge_rows([lead, rows], origin.shape)
        if written.axes != origin.axes:  # finer than the rows of the first tensor
            written = written.aligned()
            origin = _in_axes(written, origin)
        ids = origin.payload.ids() if written.axes == origin.axes else None
        if ids is None or (ids < 0).any():
            everywhere = written.payload.one()
            spread = everywhere.spread((), 0, count)
            return Rows(first.shape, first.axes, payload.merge(spread))
        whole = _size(origin.shape) // max(len(ids), 1) if len(ids) else 0
        index = _sources(
            ids, count, whole * _bytes(step), _size(first.shape) // max(count, 1) * _first(step)
        )
        both = payload.cat(0, [(payload, (count,)), (written.payload, (written.payload.rows,))])
        return Rows(first.shape, first.axes, both.gather(index.to(flags.device)))


class Linked(Cell):
    """Rows of their own over memory of another cell: of a tensor that was given other flags.

    What is written into either memory is in the rows of both, beside what they had.
    """

    __slots__ = ("_known", "_of", "_own", "_step", "_writes")
    _of: Cell
    _step: Step | None

    def __init__(self, rows: Rows, of: Cell, step: Step | None) -> None:
        if isinstance(of, Linked):  # beside it, not behind it: they make no chain
            step = _onto(of._step, step)
            of = of._of
        self.given = of.given
        self.members = of.members
        self._own = rows
        self._of = of
        self._step = step
        self._known = of.version
        self._writes = 0

    @property
    def version(self) -> int:  # type: ignore[override]
        return self._writes + self._of.version

    @property
    def rows(self) -> Rows:  # type: ignore[override]
        if self._of.version != self._known:
            self._own = _union(self._own, self._of.seen_by(self._step))
            self._known = self._of.version
        return self._own

    def write(self, step: Step | None, rows: Rows) -> None:
        self._own = rows if step is None else self._brought_back(step, rows)
        self._writes += 1
        theirs = self._of.seen_by(self._step)
        self._of.write(self._step, _union(theirs, self._own))
        self._known = self._of.version


def _in_axes(like: Any, origin: Rows) -> Any:
    """``origin`` in the axes of ``like``, as far as they tell its rows apart."""
    import numpy

    count = like.payload.rows
    if not isinstance(count, int):
        return origin
    nowhere = SamplePayload(count, numpy.full(count, NO_SAMPLE))
    found: Any = merge_rows([Rows(like.shape, like.axes, nowhere), origin], like.shape)
    return found.aligned()


def _union(mine: Rows, theirs: Rows) -> Rows:
    both: Any = merge_rows([mine, theirs], mine.shape)
    return both  # type: ignore[no-any-return]


def _size(shape: Any) -> Any:
    result = 1
    for size in shape:
        result *= size
    return result


def _path(step: Step | None) -> list[Step]:
    """The steps from the first tensor on."""
    steps = []
    while step is not None:
        steps.append(step)
        step = step.before
    return steps[::-1]


def _onto(first: Step | None, step: Step | None) -> Step | None:
    """The steps of ``first``, then those of ``step``."""
    if first is None:
        return step
    for one in _path(step):
        first = one._replace(before=first)
    return first


def _taken(step: Step, rows: Rows) -> Rows:
    for one in _path(step):
        rows = _stepped(one, rows)
    return rows


def _stepped(step: Step, rows: Rows) -> Rows:
    def rows_of(tensor: Any) -> Rows | None:
        return rows if tensor is step.data else None

    finish = follow(step.func, step.args, step.kwargs, rows_of)
    results: Any = finish(step.func(*step.args, **step.kwargs))
    result: Rows = results[step.output]
    return result


def _first(step: Step) -> int:
    """The bytes of an element of the first tensor."""
    while step.before is not None:
        step = step.before
    return step.data.element_size()


def _bytes(step: Step) -> int:
    """The bytes that an element of the view is alone in; 0 where elements overlap."""
    made: Any = step.func(*step.args, **step.kwargs)
    view: Tensor = made if isinstance(made, torch.Tensor) else made[step.output]
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return 0
            reach += stride * (size - 1)
    return view.element_size()


def _sources(ids: Any, count: int, of_view: int, of_row: int) -> Tensor:
    """(count, K): for each row of the first tensor where its flags come from now.

    ``of_view``: the bytes of a row of the view, ``of_row``: of a row of the first tensor. A row
    of which only a part was written keeps what it had.
    """
    import numpy

    parts = numpy.bincount(ids, minlength=count)
    kept = (parts * of_view < of_row) | (parts == 0)
    found = numpy.full((count, max((parts + kept).max(initial=0), 1)), -1, numpy.int64)
    found[kept, 0] = kept.nonzero()[0]
    order = ids.argsort(kind="stable")
    rows = ids[order]
    nth = numpy.arange(len(ids)) - (parts.cumsum() - parts)[rows]
    found[rows, nth + kept[rows]] = order + count
    return torch.from_numpy(found)
