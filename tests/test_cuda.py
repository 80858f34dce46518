"""The CUDA kernels against their CPU twins, and the guards on a real device; needs a GPU."""

from __future__ import annotations

import pytest
import torch

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
