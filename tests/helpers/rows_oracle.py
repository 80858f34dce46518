"""Rows by the table of rules beside rows by looking at where values went.

Every element of an input is a value that no other element has, so a value in an output says which
row it came from. `Tracker` asks the table of rules for each op that torch dispatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opguard.flags._rows import Axis, FlagPayload, Rows, SamplePayload, plan
from opguard.flags._rows.rules import known

SLOTS = 64
KEY = SLOTS | 3 << 19  # a finding is held once

#: Where rows may lie, by name: for tensors of at least as many dimensions as are named.
LAYOUTS: dict[str, Callable[[tuple[int, ...]], list[Axis]]] = {
    "first": lambda s: [Axis(0, 1, s[0])],
    "last": lambda s: [Axis(len(s) - 1, 1, s[-1])],
    "two": lambda s: [Axis(0, 1, s[0]), Axis(1, 1, s[1])],
    "two, swapped": lambda s: [Axis(1, 1, s[1]), Axis(0, 1, s[0])],
    "high digit": lambda s: [Axis(0, s[0] // 2, 2)],
    "low digit": lambda s: [Axis(0, 1, s[0] // 2)],
    "digits of two": lambda s: [Axis(1, 1, s[1] // 2), Axis(0, s[0] // 2, 2)],
    "none": lambda _: [],
}

#: Layouts of two tensors of one op; None for one without rows.
PAIRS = [
    ("first", "first"),
    ("last", "last"),
    ("two", "two"),
    ("first", None),
    (None, "first"),
    (None, "last"),
    ("high digit", "high digit"),
    ("first", "last"),
    ("two", "first"),
    ("none", "first"),
    ("first", "two, swapped"),
    ("low digit", "first"),
]


def layouts(ndim: int) -> list[str]:
    """Those for a tensor of so many dimensions, whose first two sizes are even."""
    names = ["first", "high digit", "low digit", "none"]
    return names if ndim == 1 else list(LAYOUTS)


def tagged(rows: int, first: int) -> FlagPayload:
    """Row i holds one finding, whose location is ``first + i``."""
    flags = torch.zeros(rows, SLOTS // 4, dtype=torch.int64)
    flags[:, 0] = 3 | 1 << 2 | torch.arange(first, first + rows) << 6
    return FlagPayload(flags, KEY)


def tags(payload: FlagPayload) -> list[set[int]]:
    """The locations in each row."""
    found = []
    for words in payload.flags.tolist():
        slots = [word >> 16 * k & 0xFFFF for word in words for k in range(4)]
        found.append({slot >> 6 for slot in slots if slot})
    return found


def row_numbers(rows: Rows) -> torch.Tensor:
    """Of every element, from nothing but the meaning of an axis."""
    found = torch.zeros(rows.shape, dtype=torch.int64)
    for axis in rows.axes:
        at = torch.arange(rows.shape[axis.dim]) // axis.inner % axis.size
        around = [1] * len(rows.shape)
        around[axis.dim] = -1
        found = found * axis.size + at.view(around)
    return found


class Tracker(TorchDispatchMode):
    """Rows of everything made from tensors given to `follow`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, tuple[torch.Tensor, Rows | None]] = {}
        self.seen: set[str] = set()

    def follow(self, tensor: torch.Tensor, rows: Rows) -> None:
        self.rows[id(tensor)] = (tensor, rows)

    def of(self, tensor: torch.Tensor) -> Rows | None:
        return self.rows.get(id(tensor), (None, None))[1]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if all(self.of(tensor) is None for tensor in inputs):
            return op(*args, **kwargs)
        if not known(op):
            with self:
                found = op.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        self.seen.add(op._schema.name)
        settle = plan(op, args, kwargs, self.of)
        out = op(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor, rows in zip(tensors, settle(out), strict=True):
            self.rows[id(tensor)] = (tensor, rows)
        return out


class Inputs:
    """Tensors of values that occur once, and which row each value is of."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.tracker = Tracker()
        self.tag_of: dict[float, int] = {}
        self.next = 1.0
        self.next_tag = 1
        self.made: list[torch.Tensor] = []
        self.samples: dict[int, Rows] = {}

    def make(self, shape: Sequence[int], layout: str | None, like: Inputs | None = None) -> Any:
        """A tensor whose rows lie as ``layout`` says; None: it has none."""
        shape = tuple(shape)
        count = torch.Size(shape).numel()
        values = torch.randperm(count, generator=self.random).to(torch.float32) + self.next
        self.next += count
        tensor = values.reshape(shape)
        self.made.append(tensor)
        if layout is None:
            return tensor
        axes = tuple(LAYOUTS[layout](shape))
        rows = torch.Size([axis.size for axis in axes]).numel()
        where = Rows(shape, axes, tagged(rows, self.next_tag))
        for value, row in zip(
            tensor.flatten().tolist(), row_numbers(where).flatten().tolist(), strict=True
        ):
            self.tag_of[value] = self.next_tag + row
        self.next_tag += rows
        self.tracker.follow(tensor, where)
        return tensor


def outputs(found: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))


def expected(inputs: Inputs, out: torch.Tensor, number: torch.Tensor, rows: int) -> list[set[int]]:
    """Of each row of ``out`` the tags of all values in it."""
    found: list[set[int]] = [set() for _ in range(rows)]
    pairs = zip(number.flatten().tolist(), out.flatten().tolist(), strict=True)
    for row, value in pairs:
        tag = inputs.tag_of.get(value)
        if tag is not None:
            found[row].add(tag)
    return found


def check_moved(
    inputs: Inputs, out: torch.Tensor, *, fine: bool = True, exact: bool = True
) -> None:
    """``out`` holds values of the inputs: its rows hold exactly what those values' rows held.

    Args:
        fine: no two rows of the inputs have met in one of ``out``.
        exact: a row has nothing but what its values had; else: at least that.
    """
    rows = inputs.tracker.of(out)
    if rows is None:
        assert not any(value in inputs.tag_of for value in out.flatten().tolist())
        return
    assert rows.shape == tuple(out.shape)
    count = torch.Size([axis.size for axis in rows.axes]).numel()
    assert rows.payload.rows == count
    held = tags(rows.payload)
    assert len(held) == count
    wanted = expected(inputs, out, row_numbers(rows), count)
    if exact and out.numel():
        assert held == wanted
    else:
        assert all(want <= have for want, have in zip(wanted, held, strict=True))
    if fine:
        assert all(len(have) <= 1 for have in held)


def as_samples(rows: Rows) -> Rows:
    """The same rows of samples 0, 1, ... instead of flags."""
    return Rows(rows.shape, rows.axes, SamplePayload(rows.payload.rows))
