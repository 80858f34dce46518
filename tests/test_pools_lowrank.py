"""opguard::add_low_rank, and the LoRAs that are one pass over a weight with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_models import state
from opguard import _ops
from opguard.pools import _patched
from opguard.pools._lora_math import KERNEL_HERE, Added, LowRank, Whole, together
from opguard.pools.errors import PatchFailed
from opguard.pools.lora import LoraCommit
from opguard.pools.proxies import CommitObjectProxy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 5), (33, 31), (64, 96), (100, 333), (5, 2050), (2050, 3), (600, 515)]
ADD = torch.ops.opguard.add_low_rank


def case(rows, columns, rank, dtype, gap=0):
    made = torch.Generator().manual_seed(rows * 1000 + columns + rank)
    base = torch.randn(rows, columns + gap, generator=made).to(dtype)[:, :columns]
    left = torch.randn(rows, rank + gap, generator=made)[:, :rank]
    right = torch.randn(rank, columns + gap, generator=made)[:, :columns]
    return base, left, right


def check(base, left, right, out):
    exact = base.double() + left.double() @ right.double()
    size = base.double().abs() + left.double().abs() @ right.double().abs()
    # Half a unit of the dtype, and what a sum in float32 may lose.
    may = exact.abs() * torch.finfo(out.dtype).eps * 0.51
    may += size * (left.shape[1] + 1) * 2.0**-23 + torch.finfo(out.dtype).tiny
    assert bool(((out.double() - exact).abs() <= may).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_formula(shape, dtype):
    for rank in (1, 2, 16, 70):
        for gap in (0, 3):
            base, left, right = case(*shape, rank, dtype, gap)
            before = base.clone()
            held = torch.full((shape[0], shape[1] + gap), 7, dtype=dtype)
            out = held[:, : shape[1]]
            ADD(base, left, right, out)
            check(base, left, right, out)
            assert torch.equal(base, before)
            assert bool((held[:, shape[1] :] == 7).all())
            ADD(base, left, right, base)
            assert torch.equal(base, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_memory(dtype):
    base, left, right = case(1501, 777, 16, dtype)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.empty_like(base))
            ADD(base, left, right, found[-1])
    finally:
        torch.set_num_threads(threads)
    shifted = torch.empty(base.numel() + 1, dtype=dtype)[1:].view(base.shape)
    for start in range(0, 1501, 403):
        rows = slice(start, start + 403)
        ADD(base[rows], left[rows], right, shifted[rows])
    assert all(torch.equal(found[0], other) for other in (*found[1:], shifted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_torch_s_own(dtype):
    """Zero plus every kind of float32: the cast alone."""
    made = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (64, 999), generator=made, dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    values[0, :6] = torch.tensor([65504, 65519.9, 65520, -65520, 1e-8, 3.4e38])
    for row in values:
        out = torch.empty(1, 999, dtype=dtype)
        ADD(torch.zeros(1, 999, dtype=dtype), torch.ones(1, 1), row[None], out)
        torch.testing.assert_close(out[0], row.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_refusals_say_why_and_write_nothing():
    base, left, right = case(6, 8, 2, torch.float32)
    out = torch.zeros(6, 8)
    wide = torch.zeros(6, 12)
    wrong = [
        (base.double(), left, right, out, "expected base and out of one dtype"),
        (base.half(), left, right, out, "came float16 and float32"),
        (base, left.half(), right, out, r"pass left.float\(\)"),
        (base, left[:5], right, out, r"left \(5, 2\)"),
        (base, left, right[:1], out, r"right \(1, 8\)"),
        (base, left, right, out[:, :7], r"out \(6, 7\)"),
        (base, left[:, :0], right[:0], out, "r of 1..256"),
        (base, torch.zeros(6, 257), torch.zeros(257, 8), out, "r of 1..256"),
        (base.t(), left, right, out.t(), "the rows of base to lie together"),
        (base[0], left, right, out, "expected base to be a matrix"),
        (wide[:, :8], left, right, wide[:, 4:], "memory of its own"),
        (base, left, right, torch.zeros(1, 8).expand(6, 8), "memory of its own"),
        (base, wide[:, 8:10], right, wide[:, :8], "memory of its own"),
    ]
    for *arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            ADD(*arguments)
    assert not bool(out.any())
    assert not bool(wide.any())
    with pytest.raises(ValueError, match=r"expected base and out \(n, m\)"):
        ADD(*(t.to("meta") for t in (base, left[:5], right, out)))


def test_nothing_is_nothing():
    for rows, columns in ((0, 4), (4, 0)):
        out = torch.empty(rows, columns)
        ADD(out, torch.ones(rows, 2), torch.ones(2, columns), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    base, left, right = case(5, 9, 2, dtype)
    torch.library.opcheck(ADD.default, (base, left, right, torch.zeros_like(base)))


# --- LoRAs ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not KERNEL_HERE, reason="torch.addmm is faster here")
def test_a_stack_is_one_pass_and_the_same_as_one_after_the_other(monkeypatch):
    base, left, right = case(40, 70, 9, torch.float32)
    parts = [LowRank(left[:, i : i + 3], right[i : i + 3]) for i in (0, 3, 6)]
    after = base
    for part in parts:
        out = torch.empty_like(base)
        part(after, out)
        after = out
    calls = []
    real = _ops.add_low_rank
    monkeypatch.setattr(_ops, "add_low_rank", lambda *a: (calls.append(a[0].dtype), real(*a)))
    for dtype in DTYPES:
        source = base.to(dtype)
        out = torch.empty_like(source)
        _patched._compute(source, [parts[0], Added(tuple(parts[1:]))], out)
        assert calls.pop() is dtype
        assert not calls
        check(source, left, right, out)
        if dtype is torch.float32:
            assert torch.equal(out, after)
        wide = source.float()
        for part in parts:
            part(wide, wide)
        assert torch.equal(out, wide.to(dtype))
        calls.clear()


@pytest.mark.skipif(not KERNEL_HERE, reason="torch.addmm is faster here")
def test_what_the_kernel_does_not_take_goes_the_other_way():
    base, left, right = case(6, 36, 2, torch.float32)
    low = LowRank(left, right)
    many = LowRank(torch.zeros(6, 255), torch.zeros(255, 36))
    other = torch.empty_like(base)
    assert together(base, [low, Whole(base)], other) is None
    assert together(base, [low, object()], other) is None
    assert together(base, [low, many], other) is None
    assert together(base.double(), [low], other.double()) is None
    assert together(base.t().contiguous().t(), [low], other) is None
    both = torch.empty(6, 72)
    assert together(both[:, :36], [low], both[:, 36:]) is None
    assert together(base, [low], base) is low
    filters = base.view(6, 4, 3, 3)
    assert together(filters, [low], torch.empty_like(filters)) is low
    for dtype in DTYPES:  # all the same, by way of it
        out = torch.empty_like(base, dtype=dtype)
        _patched._compute(base.to(dtype), [low, many], out)
        check(base.to(dtype), left, right, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loras_on_a_model(dtype):
    model = nn.Sequential(nn.Linear(8, 5, bias=False)).to(dtype)
    base = model[0].weight.detach().clone()
    commits = [LoraCommit(state("0", seed=s), config={"r": 2, "lora_alpha": 2}) for s in (1, 2)]
    proxy = CommitObjectProxy(model)
    for commit in commits:
        proxy = proxy.clone_and_add_commit(commit)
    for _ in range(2):
        with proxy:
            factors = [state("0", seed=s).values() for s in (1, 2)]
            (a, b), (c, d) = factors
            check(base, torch.cat([b, d], 1), torch.cat([a, c], 0), model[0].weight.detach())
        assert torch.equal(model[0].weight, base)


def test_float16_that_overflows_is_refused():
    model = nn.Sequential(nn.Linear(8, 5, bias=False)).half()
    base = model[0].weight.detach().clone()
    huge = LoraCommit(state("0"), config={"r": 2, "lora_alpha": 2}, scale=1e6)
    with pytest.raises(PatchFailed, match=r"of shape \(5, 8\) to fit float16"):
        CommitObjectProxy(model, [huge]).__enter__()
    assert torch.equal(model[0].weight, base)
