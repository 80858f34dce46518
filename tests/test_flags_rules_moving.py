"""Rows through every op that moves, picks, repeats, orders or joins elements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opguard.flags._rows.payloads import MIXED, NO_SAMPLE
from rows_oracle import (
    PAIRS,
    Inputs,
    as_samples,
    check_moved,
    expected,
    layouts,
    outputs,
    row_numbers,
)

# A case: the op on a tensor (6, 4), then whether rows can stay apart in it whatever their layout.
SAME = {
    "slice": lambda x: x[1:4],
    "slice by 2": lambda x: x[::2, 1:],
    "slice from the end": lambda x: x[-3:-1],
    "slice of nothing": lambda x: x[4:2],
    "select": lambda x: x[1],
    "select from the end": lambda x: x[:, -2],
    "new dim": lambda x: x[None, :, None],
    "narrow": lambda x: x.narrow(0, 2, 3),
    "narrow_copy": lambda x: torch.narrow_copy(x, 1, -3, 2),
    "split": lambda x: x.split(4),
    "split by sizes": lambda x: x.split([1, 3, 2]),
    "split dim 1": lambda x: x.split(3, -1),
    "unsafe_split": lambda x: x.unsafe_split(4),
    "unsafe_split_with_sizes": lambda x: x.unsafe_split_with_sizes([1, 5]),
    "chunk": lambda x: x.chunk(4),
    "unsafe_chunk": lambda x: x.unsafe_chunk(3, 1),
    "tensor_split": lambda x: x.tensor_split([1, 3]),
    "hsplit": lambda x: x.hsplit(2),
    "vsplit": lambda x: x.vsplit(3),
    "split_copy": lambda x: torch.split_copy(x, 4),
    "split_with_sizes_copy": lambda x: torch.split_with_sizes_copy(x, [4, 2]),
    "unbind": lambda x: x.unbind(),
    "unbind dim 1": lambda x: x.unbind(-1),
    "unbind_copy": torch.unbind_copy,
    "unfold": lambda x: x.unfold(0, 3, 2),
    "unfold dim 1": lambda x: x.unfold(-1, 2, 1),
    "unfold_copy": lambda x: torch.unfold_copy(x, 0, 2, 2),
    "roll": lambda x: x.roll(1, 0),
    "roll both": lambda x: x.roll((2, -1), (0, 1)),
    "roll flat": lambda x: x.roll(5),
    "flip": lambda x: x.flip(0),
    "flip both": lambda x: x.flip(0, -1),
    "flipud": lambda x: x.flipud(),
    "fliplr": lambda x: x.fliplr(),
    "rot90": lambda x: x.rot90(),
    "rot180": lambda x: x.rot90(2),
    "rot270": lambda x: x.rot90(-1, (1, 0)),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "tile": lambda x: x.tile(2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave dim 1": lambda x: x.repeat_interleave(3, -1),
    "repeat_interleave tensor": lambda x: x.repeat_interleave(torch.tensor([0, 2, 1, 0, 3, 1]), 0),
    "repeat_interleave flat": lambda x: x.repeat_interleave(2),
    "expand": lambda x: x.expand(3, 6, 4),
    "expand -1": lambda x: x[:, None].expand(-1, 5, -1),
    "expand one": lambda x: x[1:2].expand(3, 4),
    "expand_copy": lambda x: torch.expand_copy(x, (2, 6, 4)),
    "broadcast_to": lambda x: torch.broadcast_to(x, (2, 6, 4)),
    "permute": lambda x: x.permute(1, 0),
    "permute_copy": lambda x: torch.permute_copy(x, (-1, 0)),
    "transpose": lambda x: x.transpose(0, -1),
    "transpose_copy": lambda x: torch.transpose_copy(x, 0, 1),
    "t": lambda x: x.t(),
    "t_copy": torch.t_copy,
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "movedim": lambda x: x[None].movedim(0, -1),
    "swapdims": lambda x: x.swapdims(0, 1),
    "adjoint": lambda x: x.adjoint(),
    "squeeze": lambda x: x[None, :, None].squeeze(),
    "squeeze dim": lambda x: x[None].squeeze(0),
    "squeeze dims": lambda x: x[None, :, None].squeeze((0, 1, 2)),
    "squeeze what is one row": lambda x: x[2:3].squeeze(),
    "squeeze_copy": lambda x: torch.squeeze_copy(x[None]),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze_copy": lambda x: torch.unsqueeze_copy(x, 1),
    "view merges": lambda x: x.view(24),
    "view splits": lambda x: x.view(2, 3, 2, 2),
    "view splits and merges": lambda x: x.view(2, 3, 2, 2).view(6, 4),
    "reshape": lambda x: x.t().reshape(-1),
    "flatten": lambda x: x[None].flatten(1),
    "view_as": lambda x: x.view_as(torch.zeros(24)),
    "view_copy": lambda x: torch.view_copy(x, (24,)),
    "ravel": lambda x: x.ravel(),
    "_unsafe_view": lambda x: torch.ops.aten._unsafe_view(x, [-1]),
    "diagonal": lambda x: x.diagonal(),
    "diagonal above": lambda x: x.diagonal(1),
    "diagonal below": lambda x: x.diagonal(-2),
    "diagonal of a stack": lambda x: x.view(2, 3, 4).diagonal(0, 1, -1),
    "diagonal, outer dims": lambda x: x.view(2, 3, 4).diagonal(-1, 2, 0),
    "diagonal_copy": lambda x: torch.diagonal_copy(x, 1),
    "diag": lambda x: x.diag(-1),
    "diag_embed": lambda x: x.diag_embed(),
    "diag_embed off": lambda x: x.diag_embed(-2, 0, 2),
    "diag_embed above": lambda x: x.diag_embed(1, 2, 1),
    "diagflat": lambda x: x.diagflat(1),
    "as_strided as it is": lambda x: x.as_strided((6, 4), (4, 1)),
    "as_strided transposes": lambda x: x.as_strided((4, 6), (1, 4)),
    "as_strided selects": lambda x: x.as_strided((6,), (4,), 2),
    "as_strided slices": lambda x: x.as_strided((2, 3), (4, 1), 5),
    "as_strided expands": lambda x: x.as_strided((5, 6, 1, 4), (0, 4, 7, 1)),
    "as_strided steps": lambda x: x.as_strided((3, 2), (8, 2), 1),
    "as_strided_copy": lambda x: torch.as_strided_copy(x, (6,), (4,), 1),
    "pad": lambda x: F.pad(x, (1, 2, 3, 0)),
    "pad off": lambda x: F.pad(x, (-1, 2, 1, -2)),
    "pad reflect": lambda x: F.pad(x[None], (2, 1, 1, 3), mode="reflect"),
    "pad reflect 1d": lambda x: F.pad(x, (3, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(x[None], (2, 1, 1, 3), mode="replicate"),
    "pad replicate 1d": lambda x: F.pad(x.t(), (2, 3), mode="replicate"),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.t().contiguous(),
    "detach": lambda x: x.detach(),
    "detach_copy": torch.detach_copy,
    "alias": torch.ops.aten.alias,
    "alias_copy": torch.alias_copy,
    "double": lambda x: x.double(),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.view(6, 4, 1, 1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.view(6, 1, 2, 2), 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x.view(6, 4, 1, 1), 2),
    "view wider and back": lambda x: x.view(torch.int16).view(torch.float32),
    "index int": lambda x: x[torch.tensor([5, 0, 0, -1])],
    "index int dim 1": lambda x: x[:, torch.tensor([3, 1])],
    "index 2-D": lambda x: x[torch.tensor([[5, 0], [1, -2], [3, 3]])],
    "index 0-d": lambda x: x[torch.tensor(2)],
    "index of nothing": lambda x: x[torch.tensor([], dtype=torch.int64)],
    "index bool": lambda x: x[torch.tensor([True, False, False, True, True, False])],
    "index bool dim 1": lambda x: x[:, torch.tensor([True, False, False, True])],
    "index bool 2-D": lambda x: x[torch.arange(24).view(6, 4) % 5 < 2],
    "index bool of none": lambda x: x[torch.zeros(6, dtype=torch.bool)],
    "index both": lambda x: x[torch.tensor([5, 0, 1]), torch.tensor([3, 3, 0])],
    "index broadcast": lambda x: x[torch.tensor([[5], [0], [1]]), torch.tensor([3, 1])],
    "index one broadcast": lambda x: x[torch.tensor([2]), torch.tensor([3, 1])],
    "index apart": lambda x: x.view(6, 2, 2)[torch.tensor([1, 4, 2]), :, torch.tensor([0, 1, 1])],
    "index apart from 1": lambda x: x.view(1, 6, 2, 2)[
        :, torch.tensor([[1, 4, 2]]), :, torch.tensor([0, 1, 1])
    ],
    "index slice int bool": lambda x: x.view(2, 3, 4)[
        1, :, torch.tensor([True, False, True, True])
    ],
    "index middle": lambda x: x.view(2, 3, 4)[:, torch.tensor([1, 0, 1])],
    "index mixed": lambda x: x.view(2, 3, 4)[torch.tensor([False, True]), 1:, torch.tensor([2])],
    "_unsafe_index": lambda x: torch.ops.aten._unsafe_index(x, [torch.tensor([1, 0])]),
    "index_select": lambda x: x.index_select(0, torch.tensor([5, 0, 0])),
    "index_select dim -1": lambda x: x.index_select(-1, torch.tensor([1])),
    "index_select 0-d": lambda x: x.index_select(0, torch.tensor(3)),
    "take": lambda x: x.take(torch.tensor([[5, 23], [-1, 0]])),
    "take 0-d": lambda x: x.take(torch.tensor(7)),
    "masked_select": lambda x: x.masked_select(torch.tensor([True, False, True, False])),
    "masked_select column": lambda x: x.masked_select(torch.arange(6)[:, None] % 2 > 0),
    "take_along_dim one": lambda x: x.take_along_dim(torch.tensor([[2], [0], [1]]), 0)[:, :1],
    "argsort flat": lambda x: x.view(24)[x.view(24).argsort()],
    "sort flat": lambda x: x.view(24).sort()[0],
    "topk flat": lambda x: x.view(24).topk(5)[0],
    "msort flat": lambda x: x.view(24).msort(),
    "kthvalue flat": lambda x: x.view(24).kthvalue(7)[0],
    "kthvalue flat kept": lambda x: x.view(24).kthvalue(7, keepdim=True)[0],
    "combinations": lambda x: torch.combinations(x.view(24)[:5]),
    "atleast_3d": torch.atleast_3d,
    "block_diag of one": lambda x: torch.block_diag(x, torch.zeros(2, 3)),
}
# Rows meet in these: each of the result has all that its elements came from.
MIXING = {
    "view through": lambda x: x.view(3, 2, 4).reshape(3, 8).view(6, 4),
    "unflatten": lambda x: x.unflatten(0, (3, -1)),
    "_reshape_alias": lambda x: torch.ops.aten._reshape_alias(x, [3, 2, 4], [8, 4, 1]),
    "view_as_complex and back": lambda x: torch.view_as_real(
        torch.view_as_complex(x.view(6, 2, 2))
    ),
    "sort": lambda x: x.sort(0)[0],
    "sort dim 1, down": lambda x: x.sort(-1, descending=True)[0],
    "sort stable": lambda x: x.sort(stable=True, dim=0)[0],
    "msort": lambda x: x.msort(),
    "topk": lambda x: x.topk(2, 0)[0],
    "topk dim 1": lambda x: x.topk(3, -1, largest=False)[0],
    "kthvalue": lambda x: x.kthvalue(2, 0)[0],
    "kthvalue dim 1": lambda x: x.kthvalue(3, -1, keepdim=True)[0],
    "gather": lambda x: x.gather(0, torch.tensor([[5, 0, 1, 2], [0, 0, 0, 4]])),
    "gather dim 1": lambda x: x.gather(1, torch.tensor([[3, 0], [1, 1], [2, 0]])),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(0), 0),
    "take_along_dim broadcast": lambda x: x.take_along_dim(torch.tensor([[3], [1]]), 0),
    "view cuts": lambda x: x.view(3, 8),
    "view cuts all": lambda x: x.view(4, 6),
}


def test_as_strided_windows_within_rows_are_followed():
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    with inputs.tracker:
        check_moved(inputs, x.as_strided((6, 3, 2), (4, 1, 1)))


@pytest.mark.parametrize("name", [*SAME, *MIXING])
def test_rows_go_where_the_values_go(name):
    for layout in layouts(2):
        inputs = Inputs()
        x = inputs.make((6, 4), layout)
        with inputs.tracker:
            found = list(outputs({**SAME, **MIXING}[name](x)))
        assert found
        for out in found:
            check_moved(inputs, out, fine=name in SAME)


@pytest.mark.parametrize("name", [*SAME, *MIXING])
def test_rows_go_where_the_values_go_in_inference_mode(name):
    """There ops that are made of others arrive whole."""
    with torch.inference_mode():
        inputs = Inputs()
        x = inputs.make((6, 4), "first")
        with inputs.tracker:
            found = list(outputs({**SAME, **MIXING}[name](x)))
        for out in found:
            check_moved(inputs, out, fine=name in SAME)


@pytest.mark.parametrize("name", [*SAME, *MIXING])
def test_samples_go_where_the_values_go(name):
    """With sample numbers instead of flags: what is proven of a row is true."""
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    rows = inputs.tracker.of(x)
    inputs.tracker.follow(x, as_samples(rows))
    with inputs.tracker:
        found = list(outputs({**SAME, **MIXING}[name](x)))
    for out in found:
        rows = inputs.tracker.of(out)
        number = row_numbers(rows)
        for row, (have, want) in enumerate(
            zip(rows.payload.ids(), expected(inputs, out, number, rows.payload.rows), strict=True)
        ):
            if len(want) > 1:
                assert have == MIXED, row
            elif want:
                assert have == want.pop() - 1 or (name in MIXING and have == MIXED), row
            else:
                assert have in (NO_SAMPLE, MIXED) or not out.numel(), row


# --- several tensors ------------------------------------------------------------------------------

JOINS = {
    "cat": lambda x, y: torch.cat([x, y]),
    "cat dim 1": lambda x, y: torch.cat([x, y], -1),
    "cat of three": lambda x, y: torch.cat([y, torch.zeros(2, 4), x]),
    "cat with nothing": lambda x, y: torch.cat([torch.zeros(0), x, y]),
    "cat with itself": lambda x, y: torch.cat([x, y, x]),
    "concat": lambda x, y: torch.concat([x, y]),
    "stack": lambda x, y: torch.stack([x, y]),
    "stack last": lambda x, y: torch.stack([y, x], -1),
    "stack dim 1": lambda x, y: torch.stack([y, x, y], 1),
    "hstack": lambda x, y: torch.hstack([x, y]),
    "vstack": lambda x, y: torch.vstack([x, y]),
    "dstack": lambda x, y: torch.dstack([x, y]),
    "row_stack": lambda x, y: torch.row_stack([x, y]),
    "column_stack": lambda x, y: torch.column_stack([x, y]),
    "block_diag": lambda x, y: torch.block_diag(x, torch.zeros(2), y),
    "meshgrid": lambda x, y: torch.meshgrid(x.view(24), y[0], indexing="ij"),
    "cartesian_prod": lambda x, y: torch.cartesian_prod(x[:, 0], y[0]),
    "broadcast_tensors": lambda x, y: torch.broadcast_tensors(x[None], y),
}
# The layouts in which no row of one meets a row of the other.
DOWN, ALONG = ("first", "two", "high digit"), ("last", "two")
APART = dict.fromkeys(JOINS, DOWN) | {
    "cat dim 1": ALONG, "hstack": ALONG, "column_stack": ALONG, "dstack": (), "block_diag": (),
    "stack": (*DOWN, "last"), "stack last": (*DOWN, "last"), "stack dim 1": (*DOWN, "last"),
    "meshgrid": (*DOWN, "last"), "cartesian_prod": (*DOWN, "last"),
    "broadcast_tensors": (*DOWN, "last"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_rows_of_several_tensors_go_where_their_values_go(name):
    for one, other in PAIRS:
        inputs = Inputs()
        x, y = inputs.make((6, 4), one), inputs.make((6, 4), other)
        with inputs.tracker:
            found = list(outputs(JOINS[name](x, y)))
        alike = one == other or one is None or other is None
        for out in found:
            apart = None in (one, other) or (one == other and one in APART[name])
            check_moved(inputs, out, fine=apart, exact=alike)


def test_a_batch_joined_with_itself_has_twice_the_rows():
    inputs = Inputs()
    x = inputs.make((6, 4), "first")
    with inputs.tracker:
        twice, pile, side = torch.cat([x, x]), torch.stack([x, x]), torch.cat([x, x], 1)
    assert inputs.tracker.of(twice).payload.rows == 12
    assert inputs.tracker.of(pile).payload.rows == 12
    assert inputs.tracker.of(side).payload.rows == 6
