"""Where the samples of an input go in an output, said by a few letters for each op.

A spelling such as ``mk`` names the dimensions of a tensor; a letter that an output has too is the
same dimension there, and one it lacks is contracted: samples along it merge. A leading ``*`` stands
for any number of dimensions, aligned from the right as broadcasting does, a trailing one for any
that merge. A tensor argument that is not spelled, and an output whose rank does not fit its
spelling, take the merge of everything, which is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from opguard.flags._rows.axes import same, same_shape
from opguard.flags._rows.rows import Rows, merge_rows
from opguard.flags._rows.rules import Call, names_of, rule, tensors_of

__all__ = [
    "After",
    "Shape",
    "broadcast",
    "each",
    "entire",
    "inputs",
    "merged",
    "place",
    "reduced",
    "spell",
    "union",
    "whole",
]

After = Callable[[Any], list[Rows | None]]
Shape = tuple[Any, ...]


def place(rows: Rows | None, dims: Sequence[int | None], shape: Shape) -> Rows | None:
    """The rows of an output whose dimension ``dims[i]`` is the input's dimension i.

    Samples along an input dimension that goes nowhere (None), or to one of another size, merge;
    a dimension of size 1 may be broadcast.
    """
    if rows is None:
        return None
    gone = []
    for axis in rows.axes:
        to = dims[axis.dim]
        if to is None or not same(rows.shape[axis.dim], shape[to]):
            gone.append(axis.dim)
    if gone:
        rows = rows.mixed(gone)  # leaves a mark that every index there has the same row
    axes = []
    for axis in rows.axes:
        to = dims[axis.dim]
        if to is not None:
            axes.append(axis._replace(dim=to))
    return Rows(shape, tuple(axes), rows.payload)


def broadcast(rows: Rows | None, shape: Shape) -> Rows | None:
    """The rows of an output that broadcasts this input; a rank that cannot merges everything."""
    if rows is None:
        return None
    ahead = len(shape) - len(rows.shape)
    if ahead < 0:
        return rows.whole(shape)
    return place(rows, range(ahead, len(shape)), shape)


def inputs(call: Call) -> list[tuple[str, Rows]]:
    """Each guarded tensor argument's name and rows, lists unrolled; what ``out=`` names is none."""
    return call.named()


def each(place_one: Callable[[int, Shape], Rows | None]) -> After:
    """A rule's answer: the rows of each tensor output, by its number and shape."""

    def after(outputs: Any) -> list[Rows | None]:
        tensors = [outputs] if isinstance(outputs, Tensor) else list(tensors_of(outputs))
        return [place_one(at, tuple(tensor.shape)) for at, tensor in enumerate(tensors)]

    return after


def union(call: Call, place_one: Callable[[str, Rows, Shape], Rows | None]) -> After:
    """The same, each output the union of its inputs' rows, placed one by one."""
    found = list(inputs(call))
    return each(
        lambda at, shape: merged([place_one(name, rows, shape) for name, rows in found], shape)
    )


def entire(call: Call) -> After:
    """One row for each output: everything merged."""
    return each(lambda at, shape: whole(call, shape))


def whole(call: Call, shape: Shape) -> Rows | None:
    """One row for the output: everything merged."""
    return merged([rows.whole(shape) for _, rows in inputs(call)], shape)


def merged(found: Iterable[Rows | None], shape: Shape) -> Rows | None:
    """The union of rows placed in one output; None where there are none."""
    kept = [rows for rows in found if rows is not None]
    if len(kept) < 2:
        return kept[0] if kept else None
    return merge_rows(kept, shape)


def reduced(rows: Rows | None, dims: Sequence[int] | None, shape: Shape) -> Rows | None:
    """A reduction over ``dims`` (None: all) into an output of ``shape``, kept dimensions or not."""
    if rows is None or same_shape(rows.shape, shape):  # nothing is reduced, or dims of one element
        return rows
    rank = len(rows.shape)
    gone = [dim % max(rank, 1) for dim in dims] if dims else range(rank)
    kept = [dim for dim in range(rank) if dim not in gone]
    if len(shape) == rank:
        return place(rows, [dim if dim in kept else None for dim in range(rank)], shape)
    if len(shape) == len(kept):
        return place(rows, [kept.index(d) if d in kept else None for d in range(rank)], shape)
    return rows.whole(shape)


@cache
def _fixed(spelling: str) -> str:
    return spelling.strip("*")


@cache
def route(spelling: str, out: str, rank: int, out_rank: int, batch: int) -> list[int | None] | None:
    """The dims of `place` for one input and one output; None where the ranks do not fit.

    ``batch`` is how many dimensions the stars in front stand for after broadcasting.
    """
    core, out_core = _fixed(spelling), _fixed(out)
    lead, out_lead = rank - len(core), out_rank - len(out_core)
    if out.endswith("*") and len(out) > 1:
        if out_lead < 0:
            return None
        out_lead = 0
    if out_lead != (batch if out.startswith("*") else 0):
        return None
    if lead > 0 and spelling.endswith("*") and len(spelling) > 1:
        core, lead = core + "?" * lead, 0
    if lead and not spelling.startswith("*"):
        if lead > 0:
            return None
        core, lead = core[-rank:] if rank else "", 0  # broadcast from the right
    if lead < 0:
        return None
    dims: list[int | None] = [out_lead - lead + at for at in range(lead)]
    if dims and not out.startswith("*"):
        return None
    return dims + [
        out_lead + out_core.index(letter) if letter in out_core else None for letter in core
    ]


def _one(call: Call, spellings: dict[str, str], out: str, shape: Shape) -> Rows | None:
    if out == "-":
        return None
    batch = 0
    for name, spelling in spellings.items():
        if spelling.startswith("*") and name in call:
            batch = max(batch, len(call.shape(name)) - len(_fixed(spelling)))
    found: list[Rows | None] = []
    for name, rows in inputs(call):
        own = spellings.get(name)
        dims = None if own is None else route(own, out, len(rows.shape), len(shape), batch)
        found.append(rows.whole(shape) if dims is None else place(rows, dims, shape))
    return merged(found, shape)


def spell(names: str, *outs: str, **spellings: str) -> None:
    """Registers a rule for ops (names without ``aten::``) by the spellings of their tensors.

    ``outs`` spells the outputs, the last of them all that follow; ``-`` is one without rows.
    """

    def spelled(call: Call) -> After:
        last = len(outs) - 1
        return each(lambda at, shape: _one(call, spellings, outs[min(at, last)], shape))

    rule(*names_of(names))(spelled)
