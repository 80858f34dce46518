"""manage and auto_manage with an accelerator, from the user's side: an emulated one, by its driver.

Models of 1 MiB each; the accelerator has room for two of them.
"""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch

from emulated_pool import OUT_OF_MEMORY, Emulated, EmulatedPool, emulated_accelerator
from opguard.pools import PoolRefused, auto_manage, free, get_management, manage, unmanage
from opguard.pools._accelerators import TorchAccelerator
from opguard.pools.hooks import AutoManageHook
from pools_kit import MIB, fresh_pools, tiny, until


@pytest.fixture
def emulated():
    gc.collect()
    made = Emulated()
    yield made
    gc.collect()
    assert made.count("misuse") == 0
    assert not {name: made.count(name) for name in ("used", "mapped") if made.count(name)}


@pytest.fixture(params=["arena", "torch"])
def pools(request, emulated, tmp_path):
    """Two megabytes on the device, and four for host memory."""
    accelerator = emulated_accelerator(emulated)
    if request.param == "torch":
        accelerator = TorchAccelerator("cpu")
    with fresh_pools(tmp_path) as management:
        management.add_pool(EmulatedPool(accelerator, 2 * MIB), 2 * MIB)
        management.kind = request.param
        yield management


@pytest.fixture
def arenas(emulated, tmp_path):
    with fresh_pools(tmp_path) as management:
        management.add_pool(EmulatedPool(emulated_accelerator(emulated), 2 * MIB), 2 * MIB)
        yield management


def test_three_models_in_room_for_two(pools, emulated):
    models = [tiny(seed=seed) for seed in range(3)]
    before = [model[0].weight.clone() for model in models]
    x = torch.randn(2, 512)
    expected = [model(x) for model in models]
    handles = [manage(model) for model in models]
    device = get_management().pool("gpu:0")
    assert device.used == 0
    for turn in range(9):
        i = (turn * 5) % 3
        with auto_manage(models[i]) as handle:
            assert handle is not None
            assert handle.loaded
            assert handle.get_execution_device() == torch.device("cpu")
            assert torch.equal(models[i](x), expected[i])
            assert 0 < device.used <= device.budget
            if pools.kind == "arena":
                assert emulated.count("used") <= device.budget
    assert sum(handle.loaded for handle in handles) == 2
    for model, weight in zip(models, before, strict=True):
        assert torch.equal(model[0].weight, weight)
    assert free() == 2 * MIB
    assert device.used == 0
    assert emulated.count("used") == 0
    assert emulated.count("bytes_out") == 0  # nothing was changed, so nothing was copied back


def test_what_was_changed_on_the_device_is_kept(pools):
    model = tiny()
    handle = manage(model)
    before = model[0].weight.clone()
    for turn in range(1, 4):
        with auto_manage(model, offload="exit"):
            model[0].weight.add_(1)
        until(lambda: not handle.loaded)
        before += 1
        assert torch.equal(model[0].weight, before), turn
    other = manage(tiny(seed=1), verify="bytes")
    with other.lease():
        other.obj[0].weight.data.zero_()
    free()
    assert not other.loaded
    assert not other.obj[0].weight.any()
    # Told later, it holds from the next time on.
    manage(model, verify="bytes")
    with auto_manage(model):
        model[0].weight.data.zero_()
    free()
    assert not model[0].weight.any()


def test_the_address_stays(arenas):
    models = [tiny(seed=seed) for seed in range(3)]
    seen: dict[int, set[int]] = {}
    for _ in range(3):
        for model in models:
            with auto_manage(model):
                seen.setdefault(id(model), set()).add(model[0].weight.data_ptr())
    assert [len(addresses) for addresses in seen.values()] == [1, 1, 1]


def test_pinned_copies_are_users_of_host_memory(arenas, emulated):
    """A copy a model that was in, as a cache: the fifth finds no room and the oldest copy goes."""
    models = [tiny(seed=seed) for seed in range(6)]
    host = arenas.pool("cpu")
    ring = emulated.count("pinned")
    for index, model in enumerate(models):
        with auto_manage(model):
            assert host.used <= host.budget
        assert host.used == min(index + 1, 4) * MIB
        assert emulated.count("pinned") - ring <= 4
    calls = emulated.calls("cuMemHostRegister_v2")
    with auto_manage(models[5]):  # copied from where it is
        pass
    with auto_manage(models[3]):
        pass
    assert emulated.calls("cuMemHostRegister_v2") == calls
    assert free("cpu") == 4 * MIB
    assert emulated.count("pinned") == ring
    with auto_manage(models[0]):
        assert torch.equal(models[0][0].weight, tiny(seed=0)[0].weight)


def test_no_room_for_a_pinned_copy_is_no_failure(arenas, emulated):
    arenas.pool("cpu").budget = MIB // 2
    models = [tiny(seed=seed) for seed in range(3)]
    for _ in range(2):
        for seed, model in enumerate(models):
            with auto_manage(model):
                assert torch.equal(model[0].weight, tiny(seed=seed)[0].weight)
    assert arenas.pool("cpu").used == 0
    assert emulated.count("pinned") == 1  # the ring
    with auto_manage(models[0]):
        models[0][0].weight.zero_()
    free()
    assert not models[0][0].weight.any()


def test_the_device_is_full_though_the_budget_is_not(arenas, emulated):
    """Somebody else's memory: ours makes room, and where it cannot the caller is told."""
    first, second = tiny(seed=0), tiny(seed=1)
    with auto_manage(first):
        pass
    emulated.fail("cuMemCreate", 1, OUT_OF_MEMORY)
    with auto_manage(second):  # asked again once torch's own cache was emptied
        pass
    free()
    theirs = arenas.pool("gpu:0").accelerator.place([63 * MIB + MIB // 2])
    theirs.take(0)
    with pytest.raises(torch.OutOfMemoryError) as caught, auto_manage(first):
        pass
    assert "while bringing in" in "".join(caught.value.__notes__)
    assert arenas.pool("gpu:0").used == 0
    assert torch.equal(first[0].weight, tiny(seed=0)[0].weight)
    theirs.drop(0)
    with auto_manage(first):
        assert torch.equal(first[0].weight, tiny(seed=0)[0].weight)


def test_others_of_ours_make_room(arenas, emulated):
    first, second = manage(tiny(seed=0)), manage(tiny(seed=1))
    with first.lease():
        pass
    theirs = arenas.pool("gpu:0").accelerator.place([62 * MIB + MIB // 2])
    theirs.take(0)
    with second.lease():
        assert not first.loaded
        assert torch.equal(second.obj[0].weight, tiny(seed=1)[0].weight)
    theirs.drop(0)


def test_a_driver_that_fails_is_told_and_forgiven(arenas, emulated):
    model = tiny()
    handle = manage(model)
    emulated.fail("cuMemcpyHtoDAsync_v2")
    with pytest.raises(RuntimeError, match="copying to the device on GPU 0"), handle.lease():
        pass
    assert not handle.loaded
    assert emulated.count("used") == 0
    assert arenas.pool("gpu:0").used == 0
    with handle.lease():
        assert torch.equal(model[0].weight, tiny()[0].weight)


def test_a_view_that_is_kept_keeps_the_model(arenas):
    models = [manage(tiny(seed=seed)) for seed in range(3)]
    with models[0].lease():
        taken = models[0].obj[0].weight.detach()
    with models[1].lease():
        pass
    assert free() == MIB
    assert models[0].loaded
    assert torch.equal(taken, tiny(seed=0)[0].weight)
    arenas.pool("gpu:0").budget = MIB
    with pytest.raises(PoolRefused, match="share the memory"), models[2].lease():
        pass
    del taken
    with models[2].lease():
        assert not models[0].loaded
        assert models[2].loaded


def test_kernels_in_flight_are_waited_for(arenas, emulated):
    model = tiny()
    with auto_manage(model):
        weight = model[0].weight
        emulated.read(emulated.stream(), weight.data_ptr(), weight.nbytes, seconds=0.1)
        del weight
    free()
    assert emulated.count("sum") > 0


def test_who_was_idle_long_ago_goes_without_waiting_for_others(arenas, emulated):
    """Used, let go, and another one brought in since: its kernels are done for, theirs are not."""
    handles = [manage(tiny(seed=seed)) for seed in range(3)]
    stream, theirs = emulated.stream(), torch.ones(1000, dtype=torch.uint8)
    for again in (False, True):
        free()
        for handle in handles[:2]:
            with handle.lease():
                weight = handle.obj[0].weight
                emulated.read(stream, weight.data_ptr(), weight.nbytes)
                del weight
        emulated.finish()
        before = emulated.count("sum")
        with handles[1].lease():
            if again:  # entered since it was last seen idle: this time its end is not known
                with handles[0].lease():
                    pass
                with handles[1].lease():
                    pass
            emulated.read(stream, theirs.data_ptr(), 1000, seconds=0.1 if again else 10)
            with handles[2].lease():
                assert not handles[0].loaded
                assert emulated.count("sum") - before == 1000 * again
        emulated.hurry()


def test_a_capture_of_another_thread_is_not_spoilt(emulated, tmp_path):
    """A request that has to wait for its end is met after it."""
    graph = emulated.stream()
    accelerator = emulated_accelerator(emulated, graph)
    with fresh_pools(tmp_path) as management:
        management.add_pool(EmulatedPool(accelerator, 2 * MIB), 2 * MIB)
        handles = [manage(tiny(seed=seed)) for seed in range(3)]
        for handle in handles[:2]:
            with handle.lease():
                pass
        entered = threading.Event()

        def serve() -> None:
            with handles[2].lease(10):
                entered.set()

        with handles[1].lease():
            thread = threading.Thread(target=serve)
            with handles[0].lease(), emulated.capture(graph):
                pass  # used since anybody marked the end of its use
            with emulated.capture(graph):
                thread.start()
                assert not entered.wait(0.2)
            assert entered.wait(5)
            thread.join()
        assert handles[1].loaded
        assert not handles[0].loaded
        free()


def test_prefetch_while_another_runs(arenas):
    first, second = manage(tiny(seed=0)), manage(tiny(seed=1))
    with first.lease():
        second.prefetch()
        until(lambda: second.loaded)
        assert first.loaded


def test_threads_and_tasks(pools):
    models = [tiny(seed=seed) for seed in range(4)]
    handles = [manage(model) for model in models]
    x = torch.randn(1, 512)
    expected = [tiny(seed=seed)(x) for seed in range(4)]
    wrong: list[object] = []

    def use(i: int) -> None:
        for turn in range(6):
            k = (i + turn) % 4
            with handles[k].lease(20):
                if not torch.equal(models[k](x), expected[k]):
                    wrong.append((i, turn))

    async def task(i: int) -> None:
        for turn in range(4):
            k = (i * 3 + turn) % 4
            async with auto_manage(models[k]):
                if not torch.equal(models[k](x), expected[k]):
                    wrong.append(("task", i, turn))
                await asyncio.sleep(0)

    async def tasks() -> None:
        await asyncio.gather(*(task(i) for i in range(3)))

    threads = [threading.Thread(target=use, args=(i,)) for i in range(3)]
    threads.append(threading.Thread(target=lambda: asyncio.run(tasks())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(not arenas_leases for arenas_leases in leases(pools))


def leases(management) -> list[int]:
    return [management.unit(unit).leases for unit in management.entries]


def test_let_go_of_while_it_is_there(pools):
    model = tiny()
    manage(model)
    with auto_manage(model):
        model[0].weight.add_(1)
    unmanage(model)
    assert torch.equal(model[0].weight, tiny()[0].weight + 1)
    assert get_management().pool("gpu:0").used == 0
    assert get_management().pool("cpu").used == 0


def test_a_model_that_dies_there_gives_everything_back(arenas, emulated):
    model = tiny()
    with auto_manage(model):
        pass
    handle = None
    del model, handle
    gc.collect()
    arenas.drain()
    until(lambda: arenas.drain() is False and emulated.count("used") == 0)
    until(lambda: emulated.count("reserved") == 0 and arenas.pool("cpu").used == 0)


def test_a_model_larger_than_the_device_comes_in_blocks(arenas, emulated):
    model = tiny(5)
    x = torch.randn(2, 512)
    expected = tiny(5)(x)
    manage(model)
    device = arenas.pool("gpu:0")
    for _ in range(3):
        assert torch.equal(model(x), expected)
        assert 0 < device.used <= device.budget
        assert emulated.count("used") <= device.budget
    for number, layer in enumerate(model):
        assert torch.equal(layer.weight, tiny(5)[number].weight)
    unmanage(model)
    assert emulated.count("used") == device.used == 0
    assert torch.equal(model(x), expected)


def test_bytes_are_counted_as_the_gpu_makes_them(tmp_path):
    """In pieces of 2 MiB, which is what a budget has to hold, also where blocks are smaller."""
    emulated = Emulated(unit=2 * MIB)
    with fresh_pools(tmp_path, "64MiB") as management:
        pool = EmulatedPool(emulated_accelerator(emulated), 7 * MIB)
        management.add_pool(pool, 7 * MIB)
        small, large = tiny(1), tiny(8, seed=1)
        x = torch.randn(2, 512)
        manage(large)
        for _ in range(3):
            with auto_manage(small):
                assert torch.equal(large(x), tiny(8, seed=1)(x))
                assert 4 * MIB <= pool.used <= 7 * MIB
                assert emulated.count("used") <= 7 * MIB
                until(lambda: pool.used == emulated.count("used"))  # the next block may be coming
        free()
        assert pool.used == emulated.count("used") == 0
        unmanage(large)
    assert emulated.count("misuse") == 0


def test_hooks_and_compiled_modules(arenas):
    """The compiled module is not compiled again: its weights come back to where they were."""
    models = [tiny(seed=seed) for seed in range(3)]
    compiled = [torch.compile(model, backend="eager") for model in models]
    hooks = [AutoManageHook(model).attach() for model in models]
    x = torch.randn(2, 512)
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters["stats"]
    for turn in range(3):
        for seed, model in enumerate(compiled):
            assert torch.equal(model(x), tiny(seed=seed)(x))
        if turn == 0:
            graphs = counter["unique_graphs"]
    assert counter["unique_graphs"] == graphs
    for hook in hooks:
        hook.remove()
