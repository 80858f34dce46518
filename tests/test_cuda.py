"""The CUDA kernels against their CPU twins, and the guards on a real device; needs a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch

import flags_model
import opguard  # noqa: F401  (registers the ops)
from flags_model import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def leaves(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, dtype in enumerate(DTYPES * 60):
        size = (index % 7, 1 + index % 5)
        values = torch.randint(0, 2, size, generator=generator).to(dtype)
        made.append(values.to(device))
    made.append(torch.zeros((), device=device))
    made.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).to(device))
    made.append(torch.randn(3_000_000).to(device))
    made.append(torch.randn(33).to(device)[1:])  # an address that is no multiple of 16
    return made


def test_pack_equals_cpu_twin_bit_by_bit():
    on_device = leaves("cuda")
    on_host = [leaf.cpu() for leaf in on_device]
    packed = torch.ops.opguard.pack(on_device)
    assert packed.device.type == "cuda"
    assert torch.equal(packed.cpu(), torch.ops.opguard.pack(on_host))


def test_pack_is_captured_by_a_cuda_graph():
    source = [torch.zeros(100, device="cuda"), torch.zeros(7, device="cuda")]
    torch.ops.opguard.pack(source)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = torch.ops.opguard.pack(source)
    source[0].fill_(3)
    source[1].fill_(5)
    graph.replay()
    first, second = torch.ops.opguard.unpack(packed.cpu(), source)
    assert first.eq(3).all()
    assert second.eq(5).all()


def test_detach_brings_everything_to_the_host():
    from opguard import detach_to_cpu

    value = {"a": leaves("cuda"), "b": torch.randn(4, device="cuda", requires_grad=True) * 2}
    value["again"] = value["a"][3]
    result = detach_to_cpu(value)
    assert result["again"] is result["a"][3]
    assert result["b"].device.type == "cpu"
    assert not result["b"].requires_grad
    for ours, theirs in zip(result["a"], value["a"], strict=True):
        assert torch.equal(ours, theirs.cpu())
        assert ours.stride() == theirs.stride()


def test_guarded_failure_leaves_nothing_on_the_device():
    from opguard import call_guard

    def fail():
        held = torch.zeros(1 << 22, device="cuda")
        raise ValueError(f"after {held.numel()} elements")

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match="after") as caught, call_guard() as g:
        g(fail)
    assert torch.cuda.memory_allocated() == before
    assert "held" in "".join(caught.value.__notes__)


# --- flags: every op equals its CPU twin bit by bit -----------------------------------------------

OPS = torch.ops.opguard
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
          torch.complex128, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e5m2fnuz,
          torch.float8_e4m3fnuz, torch.int64, torch.bool]  # fmt: skip
POLICIES = [
    Policy(num_slots, priority, order, dedupe, carrier)
    for carrier, num_slots in enumerate((1, 6, 16, 70))
    for priority in range(3)
    for order in range(2)
    for dedupe in range(4)
]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(torch.uint8) if t.dim() else t.cpu()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.device.type == "cuda"
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(bits(ours), bits(theirs))


def both(op: Callable[..., torch.Tensor], *args: object) -> None:
    """The op on the device, and on copies in host memory."""

    def host(value: object) -> object:
        if isinstance(value, list):
            return [host(v) for v in value]
        return value.cpu() if isinstance(value, torch.Tensor) else value

    ours, theirs = op(*args), op(*map(host, args))
    for one, other in zip(
        ours if isinstance(ours, tuple) else (ours,),
        theirs if isinstance(theirs, tuple) else (theirs,),
        strict=True,
    ):
        same(one, other)


def sick(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bytes, few of which are NaN or Inf, on the device."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(0, 2, shape, generator=generator).to(dtype).cuda()
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    for value in (float("nan"), float("inf"), float("-inf")):
        values[torch.rand(shape, generator=generator) < 0.3 / max(1, values.numel()) ** 0.6] = value
    return values.to(dtype).cuda()


def some_flags(samples: int, policy: Policy, seed: int = 0) -> torch.Tensor:
    chance = random.Random(seed)
    rows = flags_model.new(samples, policy)
    for row in rows:
        for i in range(chance.choice((0, 0, 1, 3, policy.capacity))):
            row[i] = chance.choice((0, 4 * chance.randrange(1, 16) + 3, chance.randrange(1, 65536)))
    return flags_model.to_flags(rows, policy).cuda()


def shapes_of(samples: int) -> Iterator[tuple[int, ...]]:
    yield (samples,)
    yield (samples, 1)
    yield (samples, 37)
    yield (samples, 8, 16, 3)
    yield (samples, 4096)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("samples", [0, 1, 33, 3000])
def test_check_equals_cpu_over_layouts(dtype, samples):
    key = Policy().key
    for shape in shapes_of(samples):
        x = sick(shape, dtype)
        views = [x, x[::2], x[1:]]
        if x.dim() > 1:
            views += [x.t() if x.dim() == 2 else x.transpose(1, 3), x[:, 1:], x[..., ::2]]
        if x.dim() == 4:
            views += [x.to(memory_format=torch.channels_last), x[:, :, :, 1:], x.expand(x.shape)]
        for view in views:
            both(OPS.flags_check_new, view, 5, 7, key)
            both(OPS.row_findings, view)


@pytest.mark.parametrize("shape", [(1, 3_000_001), (3, 1_000_000), (2, 70, 90, 111)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fnuz], ids=str)
def test_check_of_few_large_samples(shape, dtype):
    for seed in range(4):
        x = sick(shape, dtype, seed)
        for view in (x, x[:, 1:], x.transpose(0, -1).contiguous().transpose(0, -1)):
            both(OPS.flags_check_new, view, 5, 7, Policy().key)
    one = torch.zeros(shape, dtype=dtype, device="cuda")
    one.view(torch.uint8).view(-1)[-one.element_size() :] = 0x80 if dtype.itemsize == 1 else 0xFF
    assert OPS.row_findings(one).tolist() == [0] * (shape[0] - 1) + [1]


def test_more_than_eight_dimensions():
    x = sick((2,) * 13, torch.float32).permute(*range(12, -1, -1))
    both(OPS.flags_check_new, x, 5, 7, Policy().key)
    both(OPS.row_findings, x[:, :, :1].expand(2, 2, 5, *x.shape[3:]))


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("expected 6 GB of free device memory")
    x = torch.zeros(3, (1 << 30) + 5, dtype=torch.float8_e5m2, device="cuda")
    x.view(torch.uint8)[2, -1] = 0x7C
    assert OPS.row_findings(x).tolist() == [0, 0, 2]
    x = x.view(-1)[: (1 << 31) + 77].view(-1, 1)
    assert OPS.flags_err(OPS.flags_check_new(x, 1, 7, Policy(1).key)).sum().item() == 0


@pytest.mark.parametrize("carrier", flags_model.CARRIERS, ids=str)
def test_edits_equal_cpu(carrier):
    mine = [policy for policy in POLICIES if policy.dtype == carrier]
    for policy, samples in itertools.product(mine, (0, 1, 300)):
        f, g = some_flags(samples, policy, 1), some_flags(samples, policy, 2)
        where = (torch.arange(samples, device="cuda") % 3 == 0).logical_not()
        codes = torch.arange(samples, device="cuda") % 16
        x = sick((samples, 40), torch.bfloat16)
        ids = torch.arange(samples * 6, device="cuda").reshape(samples, 6) % 97 - 1
        slot = flags_model.slot_of(7, 1, 3)
        both(OPS.flags_check, f, x, 9, 7, policy.key)
        both(OPS.flags_push, f, where, slot, policy.key)
        both(OPS.flags_push, f, where[:1].expand(samples), slot, policy.key)
        both(OPS.flags_push_all, f, slot, policy.key)
        both(OPS.flags_push_codes, f, codes.to(torch.int8), 3, -1, 2, policy.key)
        both(OPS.flags_push_codes, f, codes, 3, 1, 2, policy.key)
        both(OPS.flags_merge, [f, g], policy.key)
        both(OPS.flags_merge, [f] + [g, f.flip(0)] * 40, policy.key)
        both(OPS.flags_clear, f, 1)
        some = torch.arange(samples * 7, device="cuda").reshape(samples, 7) * 31 % (samples + 1) - 1
        both(OPS.flags_gather, f, some[:, 0], policy.key)
        both(OPS.flags_gather, f, some.int(), policy.key)
        both(OPS.flags_gather, f, some.t(), policy.key)
        both(OPS.flags_gather, f, some[:, :0], policy.key)
        both(OPS.flags_gather, f[::2], some.view(1, -1).clamp(max=-1 + len(f[::2])), policy.key)
        both(OPS.flags_index, f, ids, 90, 3, policy.key)
        both(OPS.flags_index_clamp, f, ids.t().contiguous().t(), 90, 3, policy.key)
        both(OPS.flags_index_clamp, f, ids.int(), 0, 3, policy.key)
        for ask in (OPS.flags_ok, OPS.flags_err, OPS.flags_count, OPS.flags_max_severity):
            both(ask, f)
        both(OPS.flags_find, f, 0x3C, 4)


def test_edits_in_place_equal_cpu():
    x = sick((300, 40), torch.float32)
    where = torch.arange(300, device="cuda") % 3 == 0
    slot = flags_model.slot_of(7, 1, 3)
    calls = [
        (policy, op, (*args, policy.key))
        for policy in POLICIES[::7]
        for op, args in (
            (OPS.flags_check_, (x, 9, 7)),
            (OPS.flags_push_, (where, slot)),
            (OPS.flags_push_all_, (slot,)),
            (OPS.flags_merge_, (some_flags(300, policy, 2),)),
        )
    ]
    for policy, op, args in calls:
        ours, theirs = some_flags(300, policy), some_flags(300, policy).cpu()
        op(ours, *args)
        op(theirs, *(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
        same(ours, theirs)


def everything(x: torch.Tensor, ids: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
    key = Policy().key
    f = OPS.flags_check_new(x, 5, 7, key)
    f, ids = OPS.flags_index_clamp(f, ids, 100, 6, key)
    f = OPS.flags_push(f, where, flags_model.slot_of(7, 9, 1), key)
    f = OPS.flags_merge([f, OPS.flags_check_new(x.flip(0), 8, 7, key)], key)
    f = OPS.flags_gather(f, torch.stack([where.cumsum(0) - 1, where.long()], 1), key)
    OPS.flags_push_all_(f, flags_model.slot_of(9, 10, 1), key)
    return [f, ids, OPS.flags_ok(f), OPS.flags_count(f), OPS.flags_find(f, 0x3C, 4)]


def inputs(seed: int, shape: tuple[int, ...] = (64, 70000)) -> list[torch.Tensor]:
    x = sick(shape, torch.bfloat16, seed)
    ids = torch.randint(-3, 103, (shape[0], 9), generator=torch.Generator().manual_seed(seed))
    return [x, ids.cuda(), (torch.arange(shape[0]) % (seed + 2) == 0).cuda()]


def test_no_op_waits_for_the_device():
    given = inputs(0)
    everything(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flags_in_a_cuda_graph():
    """Replays see the new values, also where blocks share a sample and its scratch."""
    for shape in ((64, 70000), (2, 1_000_000), (5000, 64)):
        static = inputs(0, shape)
        everything(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = everything(*static)
        for seed in (1, 2, 1):
            fresh = inputs(seed, shape)
            for place, value in zip(static, fresh, strict=True):
                place.copy_(value)
            graph.replay()
            for ours, wanted in zip(captured, everything(*fresh), strict=True):
                assert torch.equal(ours, wanted)


def test_flags_on_other_streams():
    """Each stream's checks have room of their own, and wait for what comes before them there."""
    given = [inputs(seed, (3, 400_000)) for seed in range(4)]
    wanted = [everything(*one) for one in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(20):
        got = []
        for stream, one in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                got.append(everything(one[0] * 1, *one[1:]))
        torch.cuda.synchronize()
        for ours, theirs in zip(got, wanted, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_compiled_on_the_device():
    from opguard.flags import err, flag_nan_and_inf, guarded_embedding

    module = torch.nn.Embedding(100, 16, device="cuda")

    def forward(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, f = guarded_embedding(ids, module, module=1)
        return out, flag_nan_and_inf(out / (ids.unsqueeze(-1) - 7), 2, f)

    ids = torch.randint(-3, 103, (50, 9), device="cuda")
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(ids), forward(ids), strict=True):
        assert torch.equal(ours, theirs)
    bad = ((ids < 0) | (ids >= 100)).any(1)
    assert torch.equal(err.has_code(forward(ids)[1], err.OUT_OF_BOUNDS), bad)
    forward(ids)[0].sum().backward()
    assert module.weight.grad is not None


def test_tensors_on_two_devices_are_one_sentence():
    f = OPS.flags_check_new(torch.zeros(4, 4), 1, 7, Policy().key)
    with pytest.raises(RuntimeError, match=r"device|Expected all tensors"):
        OPS.flags_check(f, torch.zeros(4, 4, device="cuda"), 1, 7, Policy().key)
