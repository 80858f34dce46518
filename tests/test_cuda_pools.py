"""Pools on a real GPU: addresses that stay, graphs that stay valid, nothing lost; needs one."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from opguard.pools import PoolRefused, auto_manage, free, manage
from opguard.pools._accelerators import (
    DriverAccelerator,
    TorchAccelerator,
    accelerator_for,
    streams_of,
)
from opguard.pools._devices import DeviceHome
from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
from opguard.pools._transfers import checksum
from opguard.pools.resource_pools import AcceleratorPool
from pools_kit import MIB, fresh_pools, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Products of other shapes, streams and devices differ in their last bits."""
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)


def inputs(rows: int = 4) -> torch.Tensor:
    """On the device already, for whichever stream comes next."""
    x = torch.randn(rows, 512, device="cuda")
    torch.cuda.synchronize()
    return x


def busy() -> torch.cuda.Event:
    """Keeps the current stream at work for about a second; the event is its end."""
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    done.record()
    return done


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
            close(models[i](x.to(device)), expected[i])
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
    x = inputs()
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


def test_every_stream_that_torch_hands_out_is_watched():
    known = streams_of(torch.device("cuda", 0))
    assert len(known) == len(set(known)) >= 32
    assert 0 not in known
    for _ in range(40):
        assert torch.cuda.Stream().cuda_stream in known
        assert torch.cuda.Stream(priority=-1).cuda_stream in known


def three_of_which_two_ran():
    """Models, their handles and inputs; the third has not been there yet."""
    models = [tiny(8, seed=seed) for seed in range(3)]
    handles = [manage(model) for model in models]
    x = inputs()
    for i in (0, 1):
        with handles[i].lease():
            models[i](x)
    return models, handles, x


def test_models_move_beside_a_capture(pools):
    """Torch captures in the global mode, in which every thread of the process has to mind."""
    models, handles, x = three_of_which_two_ran()
    torch.cuda.synchronize()
    moved = threading.Event()

    def move() -> None:
        with handles[2].lease(20):
            moved.set()

    thread = threading.Thread(target=move)
    with handles[1].lease():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = models[1](x)
            assert accelerator_for(torch.device("cuda", 0)).driver.capturing()
            thread.start()
            assert moved.wait(10)
        thread.join()
        assert not handles[0].loaded
        graph.replay()
        close(result, tiny(8, seed=1)(x.cpu()))
    with handles[2].lease():
        close(models[2](x), tiny(8, seed=2)(x.cpu()))


def test_who_captures_cannot_have_weights_taken_away_meanwhile(tmp_path):
    """The capture goes on as if nobody had asked."""
    model = tiny(2)
    accelerator = accelerator_for(torch.device("cuda", 0))
    home = DeviceHome(Home.adopt(model, SpillFolder(tmp_path), "model"), accelerator)
    home.bring_in()
    x = inputs()
    model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(x)
        with pytest.raises(PoolRefused, match="this thread captures"):
            home.give_back()
    graph.replay()
    close(result, tiny(2)(x.cpu()))
    home.give_back()
    home.close()


def test_who_was_idle_goes_without_waiting_for_others(pools):
    models, handles, x = three_of_which_two_ran()
    with handles[2].lease():  # its pinned copy is made, and the second one goes
        pass
    with handles[0].lease():
        models[0](x)
    torch.cuda.synchronize()
    with handles[1].lease():  # in place of the third; the first is idle meanwhile
        probe = accelerator_for(torch.device("cuda", 0)).place([8 * MIB])
        done = busy()
        probe.take(0)
        probe.drop(0)
        if done.query():
            pytest.skip("this driver waits for kernels where it maps memory, whoever uses it")
        done.synchronize()
        done = busy()
        with handles[2].lease():
            assert not done.query()
            assert not handles[0].loaded
        done.synchronize()


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
    x = inputs(512)
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
    x = inputs()
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(3):
        home.prefetch()
        assert model[0].weight.device.type == "cpu"
        home.bring_in(stream=stream)
        close(model(x), tiny(8)(x.cpu()))
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
    x = inputs()
    expected = []
    for handle in handles:
        with handle.lease():
            expected.append(handle.obj(x).cpu())
    wrong: list[object] = []

    def use(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                k = (i + turn) % 6
                with handles[k].lease(30):
                    if not torch.allclose(models[k](x).cpu(), expected[k], rtol=1e-3, atol=1e-3):
                        wrong.append((i, turn))

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
