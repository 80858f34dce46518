"""seed_guard and deterministic_guard: the block repeats itself, and nothing of it stays."""

import asyncio
import random
import threading

import numpy as np
import pytest
import torch

from opguard.guards.reproducible import deterministic_guard, seed_guard


def draw():
    return (
        random.random(),
        float(np.random.rand()),
        torch.rand(3).tolist(),
        torch.randn(2).tolist(),
    )


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_seed_repeats_and_is_put_back():
    before = states()
    with seed_guard() as g:
        first = draw()
        assert g.seed == 0
    assert states() == before
    with seed_guard(seed=0):
        assert draw() == first
    with seed_guard(seed=2**40):
        assert draw() != first
    assert states() == before


def test_seed_is_put_back_when_the_body_fails():
    before = states()

    def fail():
        draw()
        raise KeyError

    with pytest.raises(KeyError), seed_guard(seed=3):
        fail()
    assert states() == before


def test_seed_guard_nests_and_decorates():
    guard = seed_guard(seed=5)
    with guard:
        first = draw()
        middle = states()
        with guard:
            assert draw() == first
        assert states() == middle
    assert guard(draw)() == guard(draw)() == first


def test_seeded_generator_goes_on_and_its_consumer_is_not_seeded():
    @seed_guard(seed=7)
    def numbers():
        for _ in range(3):
            yield draw()

    with seed_guard(seed=7):
        expected = [draw() for _ in range(3)]
    before, found = states(), []
    for number in numbers():
        assert states() == before
        found.append(number)
    assert found == expected
    assert states() == before


@seed_guard(seed=7, device_list=["cpu"])
def seeded():
    while True:
        yield float(torch.rand(1))


def test_a_seeded_generator_goes_on_in_another_thread():
    with seed_guard(seed=7, device_list=["cpu"]):
        expected = torch.rand(3).tolist()
    before = states()
    numbers, found = seeded(), []
    found.append(next(numbers))
    thread = threading.Thread(target=lambda: found.extend([next(numbers), next(numbers)]))
    thread.start()
    thread.join()
    numbers.close()
    assert found == expected
    assert states() == before


def test_a_seeded_async_generator_does_not_start_again_at_each_item():
    @seed_guard(seed=7, device_list=["cpu"])
    async def numbers():
        while True:
            try:
                await asyncio.sleep(0)
                yield float(torch.rand(1))
            except KeyError:
                yield -1.0

    async def consume():
        items = numbers()
        first, thrown = await anext(items), await items.athrow(KeyError())
        outside = torch.get_rng_state().tolist()
        rest = [await anext(items), await anext(items)]
        await items.aclose()
        assert torch.get_rng_state().tolist() == outside
        return [first, *rest], thrown

    with seed_guard(seed=7, device_list=["cpu"]):
        expected = torch.rand(3).tolist()
    before = states()
    assert asyncio.run(consume()) == (expected, -1.0)
    assert states() == before


@pytest.mark.parametrize(
    ("seed", "error"),
    [("1", TypeError), (True, TypeError), (-1, ValueError), (1 << 64, ValueError)],
)
def test_bad_seed_is_one_sentence(seed, error):
    with pytest.raises(error, match=r"^seed: expected "):
        seed_guard(seed=seed)


def test_every_accelerator_is_seeded_and_put_back(monkeypatch):
    calls = []

    class Module:
        class device:
            def __init__(self, device):
                self.index = device.index

            def __enter__(self):
                calls.append(("on", self.index))

            def __exit__(self, *_):
                pass

        @staticmethod
        def manual_seed(seed):
            calls.append(("seed", seed))

        @staticmethod
        def get_rng_state(device):
            return f"state {device.index}"

        @staticmethod
        def set_rng_state(state, device):
            calls.append(("put", state, device.index))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    with seed_guard(seed=9, device_list=["cpu", "xpu:0", "xpu:1"]):
        assert calls == [("on", 0), ("seed", 9), ("on", 1), ("seed", 9)]
        calls.clear()
    assert calls == [("put", "state 0", 0), ("put", "state 1", 1)]


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


@pytest.fixture
def put_back():
    before = switches()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[3:]


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_deterministic_switches_are_put_back(put_back, on, fails):
    torch.use_deterministic_algorithms(on, warn_only=on)
    torch.utils.deterministic.fill_uninitialized_memory = on
    torch.backends.cudnn.benchmark = True
    before = switches()

    def body():
        assert switches() == (True, True, False, True, False)
        if fails:
            raise KeyError

    try:
        with deterministic_guard(warn_only=True, fill_uninitialized_memory=False):
            body()
    except KeyError:
        assert fails
    assert switches() == before


def test_deterministic_default_refuses_what_is_not(put_back):
    before = switches()
    with deterministic_guard() as g:
        assert g.enabled
        assert switches()[:2] == (True, False)
        with deterministic_guard(enabled=False):
            assert switches()[0] is False
        assert switches()[0] is True
    assert switches() == before
