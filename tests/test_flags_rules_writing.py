"""Rows through every op that writes into part of a tensor, or makes a new one."""

from __future__ import annotations

import pytest
import torch

from opguard.flags._rows import numbering
from rows_oracle import (
    PAIRS,
    Inputs,
    expected,
    row_numbers,
    tags,
)


def at(*numbers):
    return torch.tensor(numbers)


def masked(x):
    return torch.arange(x.numel()).view(x.shape) % 3 == 0


# The op on x (6, 4) and on y of this shape. Values that were written replace others.
REPLACING = {
    "copy_": ((6, 4), lambda x, y: x.copy_(y)),
    "copy": ((6, 4), torch.ops.aten.copy),
    "copy_ broadcast": ((4,), lambda x, y: x.copy_(y)),
    "index_copy": ((3, 4), lambda x, y: x.index_copy(0, at(5, 0, 2), y)),
    "index_copy_ dim 1": ((6, 2), lambda x, y: x.index_copy_(-1, at(3, 0), y)),
    "index_put": ((2, 4), lambda x, y: x.index_put((at(5, 0),), y)),
    "index_put one for all": ((1, 4), lambda x, y: x.index_put((at(5, 0),), y)),
    "index_put_ of elements": ((3,), lambda x, y: x.index_put_((at(5, 0, 1), at(3, 3, 0)), y)),
    "index_put bool": ((2, 4), lambda x, y: x.index_put((at(0, 1, 0, 0, 1, 0) > 0,), y)),
    "index_put dim 1": ((6, 2), lambda x, y: torch.ops.aten.index_put(x, [None, at(3, 1)], y)),
    "index_put mask": ((8,), lambda x, y: x.index_put((masked(x),), y)),
    "_unsafe_index_put": (
        (2, 4),
        lambda x, y: torch.ops.aten._unsafe_index_put(x, [at(1, 4)], y),
    ),
    "scatter": ((2, 4), lambda x, y: x.scatter(0, at([5, 0, 1, 2], [0, 1, 5, 3]), y)),
    "scatter_ dim 1": ((6, 2), lambda x, y: x.scatter_(1, at(*[[3, 1], [0, 2]] * 3), y)),
    "scatter part": ((3, 4), lambda x, y: x.scatter(0, at([5, 0], [2, 1]), y)),
    "scatter part dim 1": ((6, 4), lambda x, y: x.scatter(1, at([3, 0], [0, 1]), y)),
    "masked_scatter": ((6, 4), lambda x, y: x.masked_scatter(masked(x), y)),
    "masked_scatter flat": ((9,), lambda x, y: x.masked_scatter(masked(x), y)),
    "slice_scatter": ((3, 4), lambda x, y: x.slice_scatter(y, 0, 1, 4)),
    "slice_scatter all": ((6, 4), lambda x, y: x.slice_scatter(y, 0)),
    "slice_scatter by 2": ((3, 4), lambda x, y: x.slice_scatter(y, 0, 1, 6, 2)),
    "slice_scatter dim 1": ((6, 2), lambda x, y: x.slice_scatter(y, 1, -3, -1)),
    "select_scatter": ((4,), lambda x, y: x.select_scatter(y, 0, -2)),
    "select_scatter dim 1": ((6,), lambda x, y: x.select_scatter(y, 1, 2)),
    "diagonal_scatter": ((4,), lambda x, y: x.diagonal_scatter(y)),
    "diagonal_scatter below": ((3,), lambda x, y: x.diagonal_scatter(y, -3)),
    "as_strided_scatter": ((4,), lambda x, y: torch.as_strided_scatter(x, y, (4,), (5,), 4)),
    "put": ((3,), lambda x, y: x.put(at(23, 0, -2), y)),
    "put_": ((2, 2), lambda x, y: x.put_(at([3, 4], [9, 7]), y)),
}
# Here a row that was overwritten has nothing left of what it was.
CLEAN = {
    "copy_", "copy", "copy_ broadcast", "index_copy", "index_put", "index_put one for all",
    "index_put bool", "_unsafe_index_put", "scatter", "slice_scatter", "slice_scatter all",
    "slice_scatter by 2", "select_scatter",
}  # fmt: skip
WRITES = [
    *(pair for pair in PAIRS if "low digit" not in pair and "high digit" not in pair),
    ("high digit", None),
    ("low digit", None),
    ("high digit", "none"),
    ("last", "first"),
]


def written(name, one, other):
    shape, op = {**REPLACING, **ADDING}[name]
    inputs = Inputs()
    if len(shape) == 1 and other is not None and other != "none":
        other = "first"
    x, y = inputs.make((6, 4), one), inputs.make(shape, other)
    return inputs, x, y, op


@pytest.mark.parametrize("name", REPLACING)
def test_written_rows_have_what_was_written(name):
    for one, other in WRITES:
        inputs, x, y, op = written(name, one, other)
        before = x.clone()
        with inputs.tracker:
            out = op(x, y)
        rows = inputs.tracker.of(out)
        if one is None and other is None:
            assert rows is None
            continue
        assert rows.shape == (6, 4)
        number, count = row_numbers(rows), rows.payload.rows
        have = tags(rows.payload)
        least = expected(inputs, out, number, count)
        most = expected(inputs, before, number, count)
        for row in range(count):
            assert least[row] <= have[row], (one, other, row)
            # Nothing but what the row was, or what was written into it.
            if one is None or other is None or one == other:
                assert have[row] <= least[row] | most[row], (one, other, row)
        if name in CLEAN and one == "first" and other in ("first", None):
            assert have == least


ADDING = {
    "index_add": ((3, 4), lambda x, y: x.index_add(0, at(5, 0, 5), y)),
    "index_add_ dim 1": ((6, 2), lambda x, y: x.index_add_(1, at(3, 0), y)),
    "index_reduce": ((3, 4), lambda x, y: x.index_reduce(0, at(5, 0, 5), y, "prod")),
    "index_put, adding": ((3, 4), lambda x, y: x.index_put((at(5, 0, 5),), y, accumulate=True)),
    "index_put_ of elements, adding": (
        (3,),
        lambda x, y: x.index_put_((at(5, 0, 5), at(3, 3, 0)), y, accumulate=True),
    ),
    "scatter_add": ((2, 4), lambda x, y: x.scatter_add(0, at([5, 0, 1, 2], [0, 1, 5, 3]), y)),
    "scatter_add_ dim 1": ((6, 2), lambda x, y: x.scatter_add_(1, at(*[[3, 1], [0, 2]] * 3), y)),
    "scatter_reduce": (
        (2, 4),
        lambda x, y: x.scatter_reduce(0, at([5, 0, 1, 2], [0, 1, 5, 3]), y, "prod"),
    ),
    "scatter reduce": (
        (2, 4),
        lambda x, y: x.scatter(0, at([5, 0, 1, 2], [0, 1, 5, 3]), y, reduce="add"),
    ),
    "put, adding": ((3,), lambda x, y: x.put(at(23, 0, 23), y, accumulate=True)),
}


def poisoned(inputs, tensors, op, number, rows):
    """Of each row of the result, the tags of all rows whose NaN would come out there."""
    found = [set() for _ in range(rows)]
    for tag in sorted(set(inputs.tag_of.values())):
        bad = []
        for tensor in tensors:
            values = tensor.clone()
            mine = [inputs.tag_of.get(value) == tag for value in tensor.flatten().tolist()]
            values[torch.tensor(mine).view(tensor.shape)] = float("nan")
            bad.append(values)
        for row in number[op(*bad).isnan()].tolist():
            found[row].add(tag)
    return found


@pytest.mark.filterwarnings("ignore:.*index_reduce.*is in beta", "ignore:The reduce argument")
@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("table", [True, False])
def test_rows_that_others_are_added_to_have_both(name, table, monkeypatch):
    if not table:  # as with very many rows
        monkeypatch.setattr(numbering, "_TABLE", 0)
    for one, other in WRITES:
        inputs, x, y, op = written(name, one, other)
        old = x.clone(), y.clone()
        with inputs.tracker:
            out = op(x, y)
        rows = inputs.tracker.of(out)
        if rows is None:
            assert one is None
            assert other is None
            continue
        have = tags(rows.payload)
        want = poisoned(inputs, old, op, row_numbers(rows), rows.payload.rows)
        if one is None or other is None or one == other:
            assert have == want, (one, other)
        else:
            assert all(need <= has for need, has in zip(want, have, strict=True)), (one, other)


KEEPING = {
    "masked_fill": lambda x: x.masked_fill(masked(x), -1.0),
    "masked_fill_": lambda x: x.masked_fill_(masked(x), torch.tensor(-1.0)),
    "index_fill dim 1": lambda x: x.index_fill(1, at(0, 2), -1.0),
    "scatter value": lambda x: x.scatter(1, at([3, 0], [0, 1]), -1.0),
    "scatter value reduce": lambda x: x.scatter(0, at([3, 0], [0, 1]), 2.0, reduce="multiply"),
    "where": lambda x: torch.where(masked(x), x, 0.0),
    "tril": lambda x: x.tril(),
    "triu_": lambda x: x.triu_(1),
    "slice_scatter": lambda x: x.slice_scatter(torch.zeros(6, 2), 1, 0, 2),
    "select_scatter": lambda x: x.select_scatter(torch.zeros(6), 1, 2),
}


@pytest.mark.parametrize("name", KEEPING)
def test_a_row_written_in_part_stays_what_it_was(name):
    for layout in ("first", "high digit", "low digit"):
        inputs = Inputs()
        x = inputs.make((6, 4), layout)
        rows = inputs.tracker.of(x)
        with inputs.tracker:
            out = KEEPING[name](x)
        after = inputs.tracker.of(out)
        assert after.axes == rows.axes
        assert tags(after.payload) == tags(rows.payload)


NOTHING_LEFT = {
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(1.0),
    "fill_ tensor": lambda x: x.fill_(torch.tensor(1.0)),
    "copy_": lambda x: x.copy_(torch.zeros(4)),
    "normal_": lambda x: x.normal_(),
    "uniform_": lambda x: x.uniform_(),
    "random_": lambda x: x.random_(),
    "bernoulli_": lambda x: x.bernoulli_(0.5),
    "exponential_": lambda x: x.exponential_(),
    "cauchy_": lambda x: x.cauchy_(),
    "geometric_": lambda x: x.geometric_(0.5),
    "log_normal_": lambda x: x.log_normal_(),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "empty_like": torch.empty_like,
    "full_like": lambda x: torch.full_like(x, 2.0),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 3),
    "new_zeros": lambda x: x.new_zeros(6, 2, 3),
    "new_ones": lambda x: x.new_ones(6, 4),
    "new_full": lambda x: x.new_full((6,), 2.0),
    "new_empty": lambda x: x.new_empty(6, 1),
    "new_empty_strided": lambda x: x.new_empty_strided((6, 1), (1, 1)),
    "index_fill": lambda x: x.index_fill(0, torch.arange(6), 0.0),
}


@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_new_values_have_rows_without_flags(name):
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    with inputs.tracker:
        out = NOTHING_LEFT[name](x)
    assert tags(inputs.tracker.of(out).payload) == [set()] * 6


def test_what_has_another_shape_than_its_donor_has_no_rows():
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    with inputs.tracker:
        assert inputs.tracker.of(x.new_zeros(3, 3)) is None
        assert inputs.tracker.of(x.new_zeros(())) is None
