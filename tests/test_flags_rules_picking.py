"""The rows of what picks or orders elements, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from opguard.flags._rows import Axis, Rows
from opguard.flags._rows.rules import known
from rows_oracle import (
    Inputs,
    check_moved,
    tagged,
    tags,
)


def at(*numbers):
    return torch.tensor(numbers)


PICKED = {
    "index": (at(5, 0, 1), lambda x, i: x[i], [{5}, {0}, {1}]),
    "index of a table": (at([5, 0], [2, 3]), lambda x, i: x[:, i].sum(0) * 0, None),
    "index_select": (at(5, 0, 1), lambda x, i: x.index_select(0, i), [{5}, {0}, {1}]),
    "take": (at(23, 0), lambda x, i: x.take(i), [{5}, {0}]),
    "gather": (at([3, 0], [1, 1]), lambda x, i: x.gather(1, i), [{0}, {1}]),
}


def test_the_rows_of_an_index_go_along():
    for index, op, whence in PICKED.values():
        if whence is None:
            continue
        inputs = Inputs()
        x = inputs.make((6, 4), "first")
        inputs.tracker.follow(
            index, Rows.of_batch(index.shape, tagged(len(index), inputs.next_tag))
        )
        with inputs.tracker:
            out = op(x, index)
        wanted = [
            {tag + 1 for tag in here} | {inputs.next_tag + k} for k, here in enumerate(whence)
        ]
        assert tags(inputs.tracker.of(out).payload) == wanted


def test_the_rows_of_an_index_into_a_table_are_the_rows_of_what_comes_out():
    table, index = torch.randn(9, 5), at([5, 0, 1], [8, 8, 2])
    tracker = Inputs().tracker
    tracker.follow(index, Rows.of_batch(index.shape, tagged(2, 1)))
    with tracker:
        picked, columns = table[index], table.t()[:, index]
    assert tracker.of(picked).shape == (2, 3, 5)
    assert tracker.of(picked).axes == (Axis(0, 1, 2),)
    assert tracker.of(columns).axes == (Axis(1, 1, 2),)
    assert tags(tracker.of(columns).payload) == [{1}, {2}]


def test_the_rows_of_a_mask_go_along():
    mask = at(1, 0, 1, 1) > 0
    tracker = Inputs().tracker
    tracker.follow(mask, Rows.of_batch(mask.shape, tagged(4, 1)))
    with tracker:
        kept, picked = torch.arange(4.0)[mask], torch.arange(4.0).masked_select(mask)
        where, counted = mask.nonzero(), torch.ones(4).masked_fill(mask, 2.0)
    assert tags(tracker.of(kept).payload) == [{1}, {3}, {4}]
    assert tags(tracker.of(picked).payload) == [{1}, {3}, {4}]
    assert tags(tracker.of(where).payload) == [{1}, {3}, {4}]
    assert tags(tracker.of(counted).payload) == [{1}, {2}, {3}, {4}]


def test_the_places_of_what_is_not_zero_are_of_the_rows_they_lie_in():
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    x[0] = 0
    x[2:4, 1] = 0
    with inputs.tracker:
        found = x.nonzero()
    assert tags(inputs.tracker.of(found).payload) == [{row + 1} for row in found[:, 0].tolist()]


def test_order_among_others_is_of_the_same_row_as_the_value():
    inputs = Inputs()
    x = inputs.make((6,), "first")
    with inputs.tracker:
        values, index = x.sort()
        places = x.argsort()
    assert tags(inputs.tracker.of(index).payload) == [{k + 1} for k in index.tolist()]
    assert tags(inputs.tracker.of(places).payload) == [{k + 1} for k in places.tolist()]
    check_moved(inputs, values)


def test_values_that_stand_for_others_are_one_row():
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    with inputs.tracker:
        found = [
            x.unique(),
            x.unique(dim=0),
            x.unique_consecutive(),
            *x.unique(return_inverse=True),
        ]
    for out in found:
        assert tags(inputs.tracker.of(out).payload) == [set(range(1, 7))]


def test_looking_up_keeps_rows_apart():
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    table = inputs.make((3,), "first")
    with inputs.tracker:
        plain = [
            torch.bucketize(x, torch.arange(3.0)),
            torch.searchsorted(torch.arange(3.0), x),
            torch.isin(x, torch.arange(3.0)),
            torch.isin(x, 2.0),
        ]
        both = [torch.bucketize(x, table), torch.isin(x, table), torch.searchsorted(table, x)]
        side = torch.searchsorted(torch.arange(12.0).view(6, 2), x)
    for out in [*plain, side]:
        assert tags(inputs.tracker.of(out).payload) == [{k} for k in range(1, 7)]
    for out in both:
        assert tags(inputs.tracker.of(out).payload) == [{k, 7, 8, 9} for k in range(1, 7)]


def test_repeats_that_are_counted_are_rows_of_their_index():
    counts = at(2, 0, 1)
    tracker = Inputs().tracker
    tracker.follow(counts, Rows.of_batch((3,), tagged(3, 1)))
    with tracker:
        found = torch.repeat_interleave(counts)
    assert tags(tracker.of(found).payload) == [{1}, {1}, {3}]


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "as_strided between": lambda x: x.view(6, 2, 2)[:, 0].as_strided((6, 4), (4, 1)),
    "resize_": lambda x: x.resize_(3, 3),
    "set_": lambda x: x.set_(torch.zeros(6, 4)),
    "overlapping as_strided": lambda x: x.as_strided((5, 8), (4, 1)),
    "as_strided over the end": lambda x: x.view(6, 4)[:, :2].as_strided((6, 3), (4, 1)),
    "as_strided across": lambda x: x.as_strided((3,), (5,)),
    "as_strided cuts": lambda x: x.as_strided((12,), (2,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_and_left_alone(name):
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    before = x.clone()
    with inputs.tracker, pytest.raises(NotImplementedError, match="expected an op that keeps"):
        REFUSED[name](x)
    assert torch.equal(x, before)


def test_every_op_that_moves_values_has_a_rule():
    """By the dispatcher's own list: a mover of another torch is not forgotten without a word."""
    movers = re.compile(
        "_copy$|scatter|^index|^masked|^select|^slice|^split|^unbind|^unfold|^(un)?squeeze|^view|"
        "^sort|^topk|^kthvalue|^flip|^roll|^rot90|^repeat|^permute|^transpose|^t$|^take|^gather|"
        "^pad|_pad[123]d$|^diag|^expand|^cat$|^concat|stack$|^narrow|^put|^fill|^zero_?$|^copy|"
        "^as_strided|^new_|_like$|^tri[lu]$|^nonzero|^unique|^alias|^clone|^detach|^lift|_shuffle$"
    )
    # Sparse and nested tensors, other devices' workings, what is made of a row's own pieces.
    others = re.compile(
        "backward|sparse|nested|jagged|csr|indices|values|_for_cpu|_(ccol|crow|col|row)|"
        "ccol|crow|^col|^row|^mkldnn|quant|_chunk_cat|nonzero_(static|numpy)|_copy_from|"
        "_sobol|_test_|slice_inverse|_foreach|_unpack|_make_dual|masked_(softmax|scale)|_philox"
    )
    missing = []
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if schema.name == name or not any("Tensor" in str(r.type) for r in schema.returns):
            continue
        if not movers.search(name) or others.search(name) or not hasattr(torch.ops.aten, name):
            continue
        full = f"aten::{name}.{schema.overload_name}".rstrip(".")
        if not torch._C._dispatch_has_kernel(full):  # of TorchScript alone
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
            continue
        if not known(getattr(getattr(torch.ops.aten, name), schema.overload_name or "default")):
            missing.append(full)
    assert not missing, missing
