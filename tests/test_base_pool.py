"""OpGuardBase(pool=True): the pools move its model, its calls hold it, idle models make room."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from opguard import pools
from opguard.base import OpGuardBase
from opguard.guards.calling import call_guard
from pools_kit import fresh_pools

CPU = {"device_override": "cpu", "dtype_override": torch.float32}
MIB = 1 << 20


class Layer(nn.Module):
    def __init__(self, model_id):
        super().__init__()
        self.linear = nn.Linear(512, 512)  # 1 MiB

    def forward(self, x):
        return self.linear(x)


class Plain(OpGuardBase):
    NAME = "plain"
    MODEL_ID = "."
    DETECTOR_TYPE = Layer


class Failing(Plain):
    """Runs out of memory as often as told, and counts its tries."""

    NAME = "failing"

    def _predict(self, *, input_proc):
        self.tries = getattr(self, "tries", 0) + 1
        self.seen = {name: handle.loaded for name, handle in self.watched.items()}
        if self.tries <= self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
        return self._detector(input_proc)


@pytest.fixture
def management(tmp_path):
    with fresh_pools(tmp_path, "8MiB") as found:
        yield found


def x():
    return torch.ones(2, 512)


def test_a_call_answers_as_without_a_pool(management):
    with Plain(**CPU, pool=True) as pooled, Plain(**CPU) as bare:
        bare.detector.load_state_dict(pooled.detector.state_dict())
        assert torch.equal(pooled(input_raw=x()), bare(input_raw=x()))
        assert torch.equal(pooled(input_raw=x()), bare(input_raw=x()))


def test_it_is_held_in_its_calls_and_by_no_block(management):
    held = []

    class Looking(Plain):
        def _predict(self, *, input_proc):
            held.append(management.snapshot().users[0].leases)
            return self._detector(input_proc)

    with Looking(**CPU, pool=True) as model:
        model(input_raw=x())
        assert held == [1]
        assert management.snapshot().users[0].leases == 0
        assert management.free("cpu") >= MIB  # idle, though its block goes on
        model(input_raw=x())
    assert held == [1, 1]


def test_without_a_block_it_stays_managed_until_free(management):
    model = Plain(**CPU, pool=True)
    model(input_raw=x())
    assert model.is_loaded
    assert management.snapshot().users[0].name == "Plain"
    assert model.free()
    assert not management.snapshot().users
    model(input_raw=x())
    assert len(management.snapshot().users) == 1


def test_more_models_than_the_budget_answer_alike(tmp_path):
    with fresh_pools(tmp_path, "3MiB") as management:
        models = [Plain(**CPU, pool=True) for _ in range(5)]
        first = [model(input_raw=x()) for model in models]
        for _ in range(2):
            for model, expected in zip(models, first, strict=True):
                assert torch.equal(model(input_raw=x()), expected)
                assert management.pool("cpu").used <= management.pool("cpu").budget
        assert sum(user.evictions for user in management.snapshot().users) > 5
        for model in models:
            model.free()


def test_out_of_memory_in_a_call_idle_models_make_room_and_it_is_tried_again(management):
    idle = [pools.manage(Layer("."), name=f"idle{index}") for index in range(3)]
    for handle in idle:
        with handle.lease():
            pass
    model = Failing(**CPU, pool=True)
    model.watched, model.fails = {handle.name: handle for handle in idle}, 1
    model(input_raw=x())
    assert model.tries == 2
    # 1 MiB was wanted, half as much again is made free: two of three, oldest first.
    assert model.seen == {"idle0": False, "idle1": False, "idle2": True}


def test_where_nothing_can_make_room_the_error_is_the_callers(management):
    model = Failing(**CPU, pool=True)
    model.watched, model.fails = {}, 100
    with pytest.raises(torch.OutOfMemoryError):
        model(input_raw=x())
    assert model.tries == 1
    assert management.snapshot().users[0].leases == 0


def test_another_error_is_not_tried_again(management):
    idle = pools.manage(Layer("."))
    with idle.lease():
        pass
    model = Plain(**CPU, pool=True)
    with pytest.raises(RuntimeError, match="shape"):
        model(input_raw=torch.ones(2, 3))
    assert idle.loaded
    assert management.snapshot().users[0].leases == 0


def test_its_memory_is_measured_and_then_taken_from_the_pool(management):
    peaks = []

    class Looking(Plain):
        def _predict(self, *, input_proc):
            peaks.append(management.pool("cpu").used)
            return self._detector(input_proc)

    model = Looking(**CPU, pool=True)
    batch = torch.ones(256, 512)
    model(input_raw=batch)
    model(input_raw=batch)
    assert peaks[1] - peaks[0] >= batch.nbytes  # at least what it returns
    assert management.pool("cpu").used == peaks[0]


def test_a_model_that_goes_leaves_nothing(management):
    model = Plain(**CPU, pool=True)
    model(input_raw=x())
    gone = weakref.ref(model.detector)
    del model
    gc.collect()
    assert gone() is None
    assert not management.snapshot().users
    assert management.pool("cpu").used == 0


def test_copies_and_pickles_are_models_of_their_own(management):
    model = Plain(**CPU, pool=True)
    model(input_raw=x())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(input_raw=x())
        assert other.detector is not model.detector
        assert len(management.snapshot().users) == 2
        other.free()


def test_flags_and_a_pool_together(management):
    with Plain(**CPU, pool=True, flags=True) as model:
        bad = x()
        bad[1] = float("nan")
        answer, found = model(input_raw=bad)
    assert not torch.isfinite(answer[1]).any()
    assert (found != 0).any(1).tolist() == [False, True]


def test_pool_is_a_switch():
    with pytest.raises(TypeError, match="pool"):
        Plain(**CPU, pool="cpu")


# --- call_guard(on_oom="evict") ---


def out_of_memory(times, error):
    calls = []

    def run(value):
        calls.append(value)
        if len(calls) <= times:
            raise error
        return value

    return run, calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 0 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["torch", "CPU", "Python"],
)
def test_evict_frees_models_and_tries_again(management, error):
    idle = pools.manage(Layer("."))
    with idle.lease():
        pass
    run, calls = out_of_memory(1, error)
    with call_guard(on_oom="evict") as g:
        assert g(run, 5) == 5
    assert len(calls) == 2
    assert not idle.loaded


def test_evict_ends_when_there_is_nothing_more_to_free(management):
    handles = [pools.manage(Layer(".")) for _ in range(3)]
    for handle in handles:
        with handle.lease():
            pass
    run, calls = out_of_memory(
        100, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 KiB.")
    )
    with (
        pytest.raises(torch.OutOfMemoryError),
        handles[0].lease(),
        call_guard(on_oom="evict") as g,
    ):
        g(run, 5)
    assert len(calls) == 3  # one for each of the two idle models, and the last
    assert handles[0].loaded


def test_evict_as_a_decorator(management):
    idle = pools.manage(Layer("."))
    with idle.lease():
        pass
    run, calls = out_of_memory(1, torch.OutOfMemoryError("CUDA out of memory"))
    assert call_guard(on_oom="evict")(run)(7) == 7
    assert len(calls) == 2


def test_without_pools_evict_raises_as_ever(monkeypatch):
    from opguard.pools import management as module

    monkeypatch.setattr(module, "_current", [])
    run, calls = out_of_memory(1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError), call_guard(on_oom="evict") as g:
        g(run, 5)
    assert len(calls) == 1
    assert not module._current  # nothing was set up by the way
