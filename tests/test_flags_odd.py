"""The flag ops where layouts, graphs and gradients are not the usual ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import opguard  # noqa: F401  (registers the ops)
from flags_model import CRITICAL, NAN, Policy, slot_of

OPS = torch.ops.opguard
KEY = Policy().key
nan, inf = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- layouts --------------------------------------------------------------------------------------

IDS = {
    "planes with a gap": torch.arange(36).view(2, 6, 3)[:, :2],
    "a gap in each of three": torch.arange(240).view(4, 5, 4, 3)[:3, :3, :2],
    "turned": torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
    "turned back": torch.arange(24).view(2, 3, 4).transpose(1, 2),
    "every second": torch.arange(48).view(2, 6, 4)[:, ::2, ::2],
    "a dimension of one": torch.arange(6).as_strided((2, 1, 3), (3, 2**62, 1)),
    "expanded": torch.arange(4).view(2, 1, 2).expand(2, 5, 2),
    "no ids": torch.arange(6).as_strided((0, 5, 3), (1, 2**61, 2**61)),
    "0-d": torch.tensor(25),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16], ids=str)
def test_clamping_keeps_every_layout(name, dtype):
    ids = IDS[name]
    if dtype != torch.int64 and name != "expanded":
        ids = torch.empty_strided(ids.shape, ids.stride(), dtype=dtype).copy_(ids)
    f = torch.zeros(ids.shape[0] if ids.dim() else 1, 4, dtype=torch.int64)
    f, clamped = OPS.flags_index_clamp(f, ids, 20, 1, KEY)
    assert torch.equal(clamped, ids.clamp(0, 19))
    assert clamped.is_contiguous()
    outside = ((ids < 0) | (ids >= 20)).reshape(f.shape[0], ids.numel() // max(1, f.shape[0]))
    assert torch.equal(OPS.flags_err(f), outside.any(1))


@pytest.mark.parametrize("place", [0, 123_456, 2**20 - 1])
def test_a_broadcast_sample_is_shared_among_threads(place):
    one = torch.zeros(2**20)
    one[place] = nan
    one[5] = inf
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert OPS.row_findings(one.expand(3, 2**20)).tolist() == [3, 3, 3]
        assert OPS.row_findings(one[6 : 2**19].expand(70_000, -1)).unique().tolist() == [
            int(6 <= place < 2**19)
        ]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "strides"), [
    ((5, 3), (1, 3)), ((5, 2), (3, 6)), ((4, 2), (1, 0)), ((1, 3), (3, 0)), ((3, 1), (0, 1)),
    ((3, 4), (0, 1)), ((3, 4), (2, 1)), ((9, 8), (6, 3)),
])  # fmt: skip
def test_words_that_share_memory_are_read_but_not_written(shape, strides):
    memory = torch.zeros(128, dtype=torch.int64)
    f = memory.as_strided(shape, strides)
    slot = slot_of(1, NAN, CRITICAL)
    assert OPS.flags_count(OPS.flags_push_all(f, slot, KEY)).tolist() == [1] * shape[0]
    with pytest.raises(RuntimeError, match="memory of their own"):
        OPS.flags_push_all_(f, slot, KEY)
    assert not memory.any()


@pytest.mark.parametrize(("shape", "strides"), [
    ((5, 3), (1, 5)), ((5, 2), (2, 11)), ((4, 2), (2, 1)), ((1, 3), (0, 2)), ((3, 1), (1, 0)),
    ((3, 4), (4, 3)), ((2, 8), (3, 2)), ((2, 2), (2, 3)), ((0, 8), (1, 0)),
])  # fmt: skip
def test_words_that_only_interleave_are_written(shape, strides):
    memory = torch.zeros(128, dtype=torch.int64)
    f = memory.as_strided(shape, strides)
    OPS.flags_push_all_(f, slot_of(1, NAN, CRITICAL), KEY)
    assert OPS.flags_count(f).tolist() == [1] * shape[0]
    assert memory.count_nonzero() == shape[0]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", [2, 3])
def test_float_words_never_carry_a_gradient(carrier):
    """A checkpointed block makes all float outputs require grad: nothing made of them does."""
    key = Policy(carrier=carrier).key
    x = torch.tensor([[1.0], [nan]], requires_grad=True)

    def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, OPS.flags_check_new(x, 1, 7, key)

    y, f = checkpoint(block, x, use_reentrant=True)
    slot = slot_of(2, NAN, CRITICAL)
    where = torch.tensor([True, False])
    made = [
        OPS.flags_check(f, y, 2, 7, key),
        OPS.flags_push(f, where, slot, key),
        OPS.flags_push_all(f, slot, key),
        OPS.flags_push_codes(f, where.int(), 1, -1, 2, key),
        OPS.flags_index(f, where.long(), 1, 2, key),
        OPS.flags_merge([f, f], key),
        OPS.flags_clear(f, 1),
        OPS.flags_gather(f, where.long(), key),
    ]
    assert [g.grad_fn for g in made] == [None] * len(made)
    assert not any(g.requires_grad for g in made)
    y[0].sum().backward()
    assert x.grad[0].item() == 2


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_keeps_the_order_of_writes_and_reads(backend):
    def run(f: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        none = OPS.flags_count(f)
        OPS.flags_check_(f, x, 1, 7, KEY)
        checked = OPS.flags_check(f, x * 2, 2, 7, KEY)
        first = OPS.flags_push_all(f, slot_of(3, 9, 1), KEY)
        OPS.flags_push_all_(f[1:3], slot_of(5, 9, 1), KEY)
        x.mul_(2)
        OPS.flags_merge_(f, f, KEY)
        OPS.flags_merge_(f, first, KEY)
        after = OPS.flags_check(f, x[:, ::2], 6, 7, KEY)
        made = OPS.flags_check_new(x.t(), 7, 7, KEY)
        OPS.flags_push_all_(made.view(-1, 4), slot_of(8, 9, 1), KEY)
        return none, checked, first, after, OPS.flags_count(f), made

    x = torch.ones(4, 3)
    x[2, 1], x[3, 0] = nan, inf
    results = []
    for call in (run, torch.compile(run, backend=backend, fullgraph=True)):
        f, given = torch.zeros(4, 4, dtype=torch.int64), x.clone()
        results.append([*call(f, given), f, given.nan_to_num()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert results[0][4].tolist() == [1, 2, 3, 2]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_batches_that_the_data_decides():
    """Sizes that only running tells are compared when the graph runs."""

    def run(f: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        f = OPS.flags_check(f[a], x[b], 2, 7, KEY)
        return OPS.flags_merge([f, OPS.flags_check_new(x[a], 1, 7, KEY)], KEY)

    x = torch.tensor([[0.0], [nan], [1.0], [inf]])
    f = torch.zeros(4, 4, dtype=torch.int64)
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(f, x, a, b), run(f, x, a, b))
    b[0] = True
    with pytest.raises(RuntimeError):
        compiled(f, x, a, b)
