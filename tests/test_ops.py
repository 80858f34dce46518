"""torch.ops.opguard.pack and unpack: right bytes for every dtype and layout, clear refusals."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch.testing import assert_close

import opguard  # noqa: F401  (registers the ops)
from checkout import TESTS

ALIGN = 64
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals itself and every dtype compares."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def round_trip(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return torch.ops.opguard.unpack(torch.ops.opguard.pack(leaves), leaves)


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(bits(a), bits(b))
        assert a.data_ptr() != b.data_ptr() or a.numel() == 0
        assert a.untyped_storage().nbytes() == a.numel() * a.element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (5 * 16,), dtype=torch.uint8)
    leaf = raw.view(dtype) if dtype != torch.bool else raw.bool()
    assert_same(round_trip([leaf, leaf[:1], leaf[0]]), [leaf, leaf[:1].clone(), leaf[0].clone()])


def test_shapes_and_layouts():
    leaves = [
        torch.tensor(3.5),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        torch.randn(4, 6).t(),
        torch.randn(1, 1, 1),
        torch.full((3,), float("nan")),
    ]
    assert_same(round_trip(leaves), leaves)


def test_a_thousand_leaves_and_none():
    leaves = [torch.randn(i % 7, 3) for i in range(1000)]
    assert_same(round_trip(leaves), leaves)
    assert torch.ops.opguard.unpack(torch.empty(0, dtype=torch.uint8), []) == []


def test_the_buffer_is_as_described():
    """Leaves begin at multiples of 64 bytes, what lies between is zero."""
    leaves = [torch.full((5,), 7, dtype=torch.uint8), torch.full((65,), 9, dtype=torch.uint8)]
    packed = torch.ops.opguard.pack(leaves)
    assert packed.dtype == torch.uint8
    assert packed.shape == (ALIGN + 2 * ALIGN,)
    assert packed[:5].tolist() == [7] * 5
    assert packed[5:ALIGN].count_nonzero() == 0
    assert packed[ALIGN : ALIGN + 65].tolist() == [9] * 65
    assert packed[ALIGN + 65 :].count_nonzero() == 0


def test_views_are_read_where_they_lie():
    whole = torch.arange(100.0)
    (middle,) = round_trip([whole[40:50]])
    assert_close(middle, torch.arange(40.0, 50.0))


def test_inputs_are_left_alone():
    leaf = torch.randn(8, requires_grad=True)
    before = leaf.detach().clone()
    with torch.no_grad():
        (out,) = round_trip([leaf])
        out.zero_()
    assert_close(leaf.detach(), before)
    assert not out.requires_grad


def refused(function: object, *args: object) -> str:
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as caught:
        function(*args)  # type: ignore[operator]
    return str(caught.value).splitlines()[0]


def test_gaps_are_refused_with_the_way_out():
    said = refused(torch.ops.opguard.pack, [torch.zeros(2), torch.zeros(4, 4)[:, ::2]])
    assert "leaves[1]" in said
    assert "contiguous()" in said


def test_expanded_is_refused():
    assert "leaves[0]" in refused(torch.ops.opguard.pack, [torch.zeros(1).expand(5)])


def test_sparse_is_refused():
    sparse = torch.eye(3).to_sparse()
    refused(torch.ops.opguard.pack, [sparse])
    said = refused(torch.ops.opguard.pack, [torch.zeros(2), sparse])
    assert said


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(64, dtype=torch.int8),
        torch.zeros(63, dtype=torch.uint8),
        torch.zeros(128, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(128, dtype=torch.uint8)[::2],
    ],
    ids=["dtype", "short", "long", "shape", "gaps"],
)
def test_a_foreign_buffer_is_refused(packed):
    said = refused(torch.ops.opguard.unpack, packed, [torch.zeros(4)])
    assert "expected" in said


def test_sixteen_threads():
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            leaves = [torch.full((n,), float(seed)) for n in range(1, 30)]
            for _ in range(50):
                for leaf, out in zip(leaves, round_trip(leaves), strict=True):
                    assert torch.equal(leaf, out)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_no_leak():
    run = subprocess.run(
        [sys.executable, str(TESTS / "isolated" / "leak_ops.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
