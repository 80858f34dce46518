"""Pools on a real GPU: addresses that stay, graphs that stay valid, nothing lost; needs one."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from opguard.pools import auto_manage, free, manage
from opguard.pools._accelerators import DriverAccelerator, TorchAccelerator, accelerator_for
from opguard.pools._devices import DeviceHome
from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
from opguard.pools._transfers import checksum
from opguard.pools.resource_pools import AcceleratorPool
from pools_kit import MIB, fresh_pools, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def pools(tmp_path):
    with fresh_pools(tmp_path, 64 * MIB) as management:
        management.add_pool(AcceleratorPool(torch.device("cuda", 0)), 16 * MIB)
        yield management
        free()


def test_the_driver_maps_memory():
    accelerator = accelerator_for(torch.device("cuda", 0))
    assert isinstance(accelerator, DriverAccelerator)
    driver = accelerator.driver
    assert driver.granularity == 2 * MIB
    available, total = driver.memory()
    assert abs(total - torch.cuda.mem_get_info(0)[1]) < 1 << 20
    assert 0 < available <= total


def test_models_take_turns(pools):
    models = [tiny(8, seed=seed) for seed in range(3)]
    x = torch.randn(4, 512)
    expected = [model(x) for model in models]
    for turn in range(9):
        i = (turn * 5) % 3
        with auto_manage(models[i]) as handle:
            device = handle.get_execution_device()
            assert device == torch.device("cuda", 0)
            assert models[i][0].weight.device == device
            found = models[i](x.to(device)).cpu()
            torch.testing.assert_close(found, expected[i], rtol=1e-3, atol=1e-3)
            assert pools.pool("cuda").used <= 16 * MIB
    before = torch.cuda.mem_get_info(0)[0]
    assert free() == 16 * MIB
    assert torch.cuda.mem_get_info(0)[0] >= before + 16 * MIB - 2 * MIB
    for seed, model in enumerate(models):
        assert model[0].weight.device.type == "cpu"
        assert torch.equal(model[0].weight, tiny(8, seed=seed)[0].weight)


def test_a_graph_survives_eviction(pools):
    model = tiny(4)
    handle = manage(model)
    x = torch.randn(4, 512, device="cuda")
    with handle.lease():
        model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(x)
        graph.replay()
        expected = result.clone()
    free()
    assert not handle.loaded
    with handle.lease():
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(result, expected)


def test_changes_come_home(pools):
    model = tiny(2)
    before = model[0].weight.clone()
    with auto_manage(model):
        model[0].weight.add_(1)
    free()
    assert torch.equal(model[0].weight, before + 1)
    manage(model, verify="bytes")
    with auto_manage(model):
        model[1].weight.data.zero_()
    free()
    assert not model[1].weight.any()


def test_kernels_in_flight_are_waited_for(pools):
    """The last kernel runs on a stream of its own when the memory is asked back."""
    model = tiny(4)
    x = torch.randn(512, 512, device="cuda")
    stream = torch.cuda.Stream()
    with auto_manage(model), torch.cuda.stream(stream):
        expected = model(x)
        torch.cuda._sleep(200_000_000)
        found = model(x)
    free()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_checksums_are_the_hosts():
    flat = torch.randn(1_000_003).view(torch.uint8)
    assert checksum(flat.cuda()) == checksum(flat)


@pytest.mark.parametrize("kind", ["driver", "torch"])
def test_prefetch_beside_compute(tmp_path, kind):
    accelerator = accelerator_for(torch.device("cuda", 0))
    if kind == "torch":
        accelerator = TorchAccelerator("cuda:0")
    model = tiny(8)
    home = DeviceHome(Home.adopt(model, SpillFolder(tmp_path), "model"), accelerator)
    x = torch.randn(4, 512, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(3):
        home.prefetch()
        assert model[0].weight.device.type == "cpu"
        home.bring_in(stream=stream)
        torch.testing.assert_close(model(x).cpu(), tiny(8)(x.cpu()), rtol=1e-3, atol=1e-3)
        home.give_back()
        assert torch.equal(model[0].weight, tiny(8)[0].weight)
    home.close()


def test_memory_of_a_dead_model_comes_back(pools):
    model = tiny(8)
    with auto_manage(model):
        pass
    held = torch.cuda.mem_get_info(0)[0]
    del model
    gc.collect()
    end = time.monotonic() + 5
    while torch.cuda.mem_get_info(0)[0] < held + 6 * MIB and time.monotonic() < end:
        pools.drain()
        time.sleep(0.01)
    assert torch.cuda.mem_get_info(0)[0] >= held + 6 * MIB


def test_threads(pools):
    models = [tiny(4, seed=seed) for seed in range(6)]
    handles = [manage(model) for model in models]
    x = torch.randn(4, 512, device="cuda")
    expected = []
    for handle in handles:
        with handle.lease():
            expected.append(handle.obj(x).clone())
    wrong: list[object] = []

    def use(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                k = (i + turn) % 6
                with handles[k].lease(30):
                    if not torch.equal(models[k](x), expected[k]):
                        wrong.append((i, turn))

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
