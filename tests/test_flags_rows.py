"""Rows of a tensor: where its samples lie after any op, and the table of rules.

The oracle is torch itself: a tensor that holds in each element the number of its sample goes through
the same ops, and each element of the result must lie in a row that carries that sample.
"""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import opguard.flags as tg
from opguard.flags._rows import (
    Axis,
    FlagPayload,
    Rows,
    SamplePayload,
    cat_rows,
    merge_rows,
    plan,
    rules,
    stack_rows,
)
from opguard.flags._rows.payloads import MIXED, NO_SAMPLE

NOTHING = -1  # in the oracle: an element of no sample
aten = torch.ops.aten
KEY = tg.ErrorConfig(num_slots=16).key

few = hypothesis.settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


# --- the oracle -----------------------------------------------------------------------------------


def flags_of(samples: int) -> torch.Tensor:
    """Sample i has one error, at location i + 1."""
    config = tg.ErrorConfig(num_slots=16)
    f = tg.err.new_t(samples, config=config)
    for i in range(samples):
        where = torch.arange(samples) == i
        f = tg.err.push(f, tg.err.NAN, i + 1, where=where, config=config)
    return f


def fresh(shape: tuple[int, ...], dim: int) -> tuple[Rows, Rows, torch.Tensor]:
    """(rows with flags, rows with sample numbers, the number of each element)."""
    samples = shape[dim]
    axes = (Axis(dim, 1, samples),)
    around = [1] * len(shape)
    around[dim] = samples
    index = torch.arange(samples).view(around).expand(shape).clone()
    flags = Rows(shape, axes, FlagPayload(flags_of(samples), KEY))
    return flags, Rows(shape, axes, SamplePayload(samples)), index


def row_numbers(rows: Rows) -> torch.Tensor:
    """The row of each element, by the definition of an axis."""
    result = torch.zeros(rows.shape, dtype=torch.long)
    step = 1
    for axis in reversed(rows.axes):
        assert rows.shape[axis.dim] % (axis.inner * axis.size or 1) == 0
        at = torch.arange(rows.shape[axis.dim]) // axis.inner % max(axis.size, 1)
        around = [1] * len(rows.shape)
        around[axis.dim] = len(at)
        result = result + at.view(around) * step
        step *= axis.size
    assert step == rows.payload.rows
    return result


def samples_in(rows: Rows) -> list[set[int]]:
    """The samples each row carries; of sample numbers MIXED is {MIXED}."""
    payload = rows.payload
    if isinstance(payload, FlagPayload):
        return [{error.location - 1 for error in tg.flags.unpack(payload.flags, i)}
                for i in range(payload.rows)]  # fmt: skip
    ids = payload.ids()
    found = [MIXED] * payload.rows if ids is None else ids.tolist()
    return [set() if one == NO_SAMPLE else {one} for one in found]


def check(rows: Rows, index: torch.Tensor, *, exact: bool = True) -> None:
    """Each element's row carries its sample: that alone if ``exact``."""
    assert rows.shape == tuple(index.shape)
    carried = samples_in(rows)
    flags = isinstance(rows.payload, FlagPayload)
    if not index.numel():
        return
    for row, sample in zip(row_numbers(rows).flatten().tolist(), index.flatten().tolist()):  # noqa: B905
        if sample == NOTHING:
            continue
        if exact:
            assert carried[row] == {sample}
        elif flags:
            assert sample in carried[row]
        else:
            assert carried[row] in ({sample}, {MIXED})


def check_all(parts: tuple[Rows, Rows], index: torch.Tensor, *, exact: bool = True) -> None:
    for rows in parts:
        check(rows, index, exact=exact)
        whole = rows.aligned()
        check(whole, index, exact=exact)
        assert all(a.inner == 1 and a.size == rows.shape[a.dim] for a in whole.axes)
        assert whole.dims == rows.dims
        assert whole.payload.rows == math.prod(rows.shape[dim] for dim in rows.dims)


# --- programs -------------------------------------------------------------------------------------


def factorings(draw: Any, shape: tuple[int, ...]) -> list[int]:
    """Another shape of as many elements: dimensions joined, and split along their divisors."""
    sizes = list(shape)
    for _ in range(draw(st.integers(1, 3))):
        if len(sizes) > 1 and draw(st.booleans()):
            k = draw(st.integers(0, len(sizes) - 2))
            sizes[k : k + 2] = [sizes[k] * sizes[k + 1]]
        elif sizes:
            k = draw(st.integers(0, len(sizes) - 1))
            divisors = [d for d in range(1, sizes[k] + 1) if sizes[k] % d == 0] or [1]
            d = draw(st.sampled_from(divisors))
            sizes[k : k + 1] = [d, sizes[k] // d]
    return sizes


def a_dim(draw: Any, index: torch.Tensor) -> int:
    return draw(st.integers(-index.dim(), index.dim() - 1))


def reshape(draw: Any, index: torch.Tensor) -> Any:
    sizes = factorings(draw, tuple(index.shape))
    return lambda r: r.reshaped(sizes), index.reshape(sizes)


def permute(draw: Any, index: torch.Tensor) -> Any:
    order = draw(st.permutations(range(index.dim())))
    order = [k - index.dim() if draw(st.booleans()) else k for k in order]
    return lambda r: r.permuted(order), index.permute(order)


def select(draw: Any, index: torch.Tensor) -> Any:
    dim = a_dim(draw, index)
    size = index.shape[dim]
    if size == 0:
        return lambda r: r, index
    i = draw(st.integers(-size, size - 1))
    return lambda r: r.selected(dim, i), index.select(dim, i)


def cut(draw: Any, index: torch.Tensor) -> Any:
    dim = a_dim(draw, index)
    ends = st.one_of(st.none(), st.integers(-9, 9), st.just(2**63 - 1))
    start, end, step = draw(ends), draw(ends), draw(st.integers(1, 3))
    new = aten.slice.Tensor(index, dim, start, end, step)
    return lambda r: r.sliced(dim, start, end, step), new


def take(draw: Any, index: torch.Tensor) -> Any:
    dim = a_dim(draw, index)
    size = index.shape[dim]
    at = draw(st.lists(st.integers(0, size - 1), max_size=5)) if size else []
    taken = torch.tensor(at, dtype=torch.long)
    return lambda r: r.taken(dim, taken), index.index_select(dim, taken)


def flip(draw: Any, index: torch.Tensor) -> Any:
    dims = draw(st.lists(st.integers(0, index.dim() - 1), unique=True))
    return lambda r: r.flipped(dims), index.flip(dims)


def roll(draw: Any, index: torch.Tensor) -> Any:
    dim, shift = a_dim(draw, index), draw(st.integers(-9, 9))
    return lambda r: r.rolled(dim, shift), index.roll(shift, dim)


def repeat(draw: Any, index: torch.Tensor) -> Any:
    more = draw(st.integers(0, 1))
    counts = [draw(st.integers(1, 2)) for _ in range(index.dim() + more)]
    return lambda r: r.repeated(counts), index.repeat(counts)


def expand(draw: Any, index: torch.Tensor) -> Any:
    new = draw(st.lists(st.integers(1, 2), max_size=1))
    sizes = [draw(st.integers(1, 3)) if s == 1 else draw(st.sampled_from([-1, s]))
             for s in index.shape]  # fmt: skip
    return lambda r: r.expanded([*new, *sizes]), index.expand([*new, *sizes])


def unsqueeze(draw: Any, index: torch.Tensor) -> Any:
    dim = draw(st.integers(-index.dim() - 1, index.dim()))
    return lambda r: r.unsqueezed(dim), index.unsqueeze(dim)


def squeeze(draw: Any, index: torch.Tensor) -> Any:
    if draw(st.booleans()):
        return lambda r: r.squeezed(), index.squeeze()
    dim = a_dim(draw, index)
    return lambda r: r.squeezed([dim]), index.squeeze(dim)


def pad(draw: Any, index: torch.Tensor) -> Any:
    dim = draw(st.integers(0, index.dim() - 1))
    size = index.shape[dim]
    before, after = draw(st.integers(-(size // 2), 2)), draw(st.integers(-(size // 2), 2))
    around = [0, 0] * (index.dim() - dim - 1) + [before, after]
    new = torch.nn.functional.pad(index, around, value=NOTHING)
    return lambda r: r.padded(dim, before, after), new


def cat(draw: Any, index: torch.Tensor) -> Any:
    """Beside a turned copy of itself, and perhaps a tensor without rows."""
    dim = a_dim(draw, index)
    turned = index.flip(dim)
    shapes = [tuple(index.shape)] * 2
    parts = [index, turned]
    plain = draw(st.booleans())
    if plain:
        parts.append(torch.full_like(index, NOTHING))
    parts.append(index.new_empty(0))

    def rows(r: Rows) -> Rows | None:
        both = [(r, shapes[0]), (r.flipped([dim]), shapes[1])]
        return cat_rows(both + [(None, shapes[0])] * plain + [(None, (0,))], dim)

    return rows, torch.cat(parts, dim)


def stack(draw: Any, index: torch.Tensor) -> Any:
    dim = draw(st.integers(-index.dim() - 1, index.dim()))
    turned = [0] if index.dim() else []
    shape = tuple(index.shape)
    if draw(st.booleans()):
        turned = []

    def rows(r: Rows) -> Rows | None:
        return stack_rows([(r, shape), (None, shape), (r.flipped(turned), shape)], dim)

    nothing = torch.full_like(index, NOTHING)
    return rows, torch.stack([index, nothing, index.flip(turned)], dim)


STEPS = [reshape, permute, select, cut, take, flip, roll, repeat, expand, unsqueeze, squeeze,
         pad, cat, stack]  # fmt: skip
ANY_DIM = {reshape, unsqueeze, stack}  # the others need a dimension
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


def program(data: st.DataObject, steps: list[Any]) -> tuple[tuple[Rows, Rows], torch.Tensor]:
    draw = data.draw
    flags, samples, index = fresh(draw(shapes), draw(st.integers(0, 2)))
    parts = (flags, samples)
    for step in steps:
        if index.dim() == 0 and step not in ANY_DIM:
            continue
        change, new = step(draw, index)
        if new.numel() > 600 or new.dim() > 5:
            continue
        parts, index = tuple(change(rows) for rows in parts), new
        check_all(parts, index)
    return parts, index


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@hypothesis.settings(few, max_examples=25)
@hypothesis.given(data=st.data())
def test_a_step_and_what_splits_the_batch_before_it(data: st.DataObject, step: Any):
    program(data, [reshape, permute, step])


@few
@hypothesis.given(data=st.data())
def test_programs_of_moves_are_followed_exactly(data: st.DataObject):
    program(data, [data.draw(st.sampled_from(STEPS)) for _ in range(5)])
