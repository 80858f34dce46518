"""Which tensors' samples are known, and how a tensor is looked at sample by sample."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from opguard.flags._found import tensors
from opguard.flags._rows import Rows, SamplePayload, plan
from opguard.flags._rows.axes import same

__all__ = ["Tracker", "by_rows", "of_batch", "outermost_call", "samples_of", "settled"]

_MODULE_CALL = torch.nn.Module._wrapped_call_impl.__code__


def of_batch(x: Tensor, samples: Any) -> Rows:
    """Rows of a tensor whose dimension 0 is the batch."""
    return Rows.of_batch(tuple(x.shape), SamplePayload(samples))


def samples_of(rows: Rows) -> SamplePayload:
    """The sample numbers that rows carry here."""
    return cast("SamplePayload", rows.payload)


class Tracker:
    """Rows by tensor, as long as the tensor lives; None for one that is known to have none."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], Rows | None]] = {}

    def rows(self, x: Tensor) -> Rows | None:
        """The rows of ``x``, None where nothing is proven."""
        entry = self._of.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def knows(self, x: Tensor) -> bool:
        """Whether ``x`` was put here, with rows or without."""
        entry = self._of.get(id(x))
        return entry is not None and entry[0]() is x

    def put(self, x: Tensor, rows: Rows | None) -> None:
        """``x`` has these rows from now on."""
        at, of = id(x), self._of
        of[at] = (weakref.ref(x, lambda _: of.pop(at, None)), rows)

    def forget_storage(self, x: Tensor) -> None:
        """What shares its memory with ``x`` is of nobody in particular from now on."""
        try:
            memory = x.untyped_storage()._cdata
            for refers, rows in list(self._of.values()):
                other = refers()
                if rows is None or other is None or other is x:
                    continue
                if other.untyped_storage()._cdata == memory:
                    self.put(other, None)
        except (NotImplementedError, RuntimeError):  # no memory of its own: nothing shares it
            return

    def plan(self, op: Any, args: Any, kwargs: Any) -> Any:
        """A function of the outputs that gives their rows; None where the rules refuse."""
        try:
            return plan(op, args, kwargs, self.rows)
        except Exception:  # the op itself says what is wrong with its arguments
            return None

    def clear(self) -> None:
        self._of.clear()


def outermost_call(until: FrameType | None) -> tuple[str, list[Tensor]] | None:
    """The module whose call is the outermost one inside the frame ``until``, and its tensors."""
    frame: FrameType | None = sys._getframe(1)
    found: FrameType | None = None
    while frame is not None and frame is not until:
        if frame.f_code is _MODULE_CALL:
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    values = found.f_locals
    module = getattr(values["self"], "_orig_mod", values["self"])
    return type(module).__name__, tensors((values["args"], values["kwargs"]))


def settled(finish: Any, out: Any, count: int) -> list[Rows | None]:
    """The rows of ``count`` outputs, by what :meth:`Tracker.plan` gave."""
    if finish is not None:
        try:
            rows: list[Rows | None] = finish(out)
            return rows
        except Exception:  # RowsLost: nothing is proven
            pass
    return [None] * count


def by_rows(x: Tensor, rows: Rows) -> Tensor:
    """``x`` as (rows, ...), the rows in the order of its payload; a view where there can be one."""
    axes = rows.axes
    if len(axes) == 1 and axes[0] == (0, 1, x.shape[0]):
        return x
    shape: list[Any] = []
    place: dict[int, int] = {}
    for dim, size in enumerate(x.shape):
        for k, length in _digits(rows, dim, size):
            if k >= 0:
                place[k] = len(shape)
            shape.append(length)
    if len(shape) != x.dim():
        x = x.reshape(shape)
    if not axes:
        return x.unsqueeze(0)
    x = x.movedim([place[k] for k in range(len(axes))], list(range(len(axes))))
    return x if len(axes) == 1 else x.flatten(0, len(axes) - 1)


def _digits(rows: Rows, dim: int, size: Any) -> Iterator[tuple[int, Any]]:
    """The dimension taken apart, outermost first: (axis or -1, its length)."""
    mine = [k for k, axis in enumerate(rows.axes) if axis.dim == dim]
    mine.sort(key=lambda k: rows.axes[k].inner, reverse=True)
    if len(mine) == 1 and same(rows.axes[mine[0]].inner, 1):
        axis = rows.axes[mine[0]]
        if same(axis.size, size):
            yield mine[0], size
            return
    left = size
    for k in mine:
        _, inner, length = rows.axes[k]
        outer = left // (inner * length)
        if outer != 1:
            yield -1, outer
        yield k, length
        left = inner
    if not mine or left != 1:
        yield -1, left
