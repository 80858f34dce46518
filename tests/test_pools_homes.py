"""A module's weights in a file: come and go by pages, nothing changed is lost."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from opguard import _C
from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
from opguard.pools.errors import PoolError

PAGE = 4096


@pytest.fixture
def folder(tmp_path):
    made = SpillFolder(tmp_path)
    yield made
    made.close()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_state(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_adopted_and_absent(folder):
    """The same objects, the same values, nothing in memory; in and out again."""
    model = small().eval()
    before, objects = state_of(model), [id(p) for p in model.parameters()]
    home = Home.adopt(model, folder, "small")
    assert [id(p) for p in model.parameters()] == objects
    assert home.resident() == 0
    assert_state(model, before)
    home.give_back()
    assert home.resident() == 0
    home.bring_in()
    assert home.resident() == home.nbytes
    assert home.nbytes <= sum(v.nbytes for v in before.values()) + 64 * len(before) + PAGE
    assert home.give_back() == 0
    assert_state(model, before)


# --- nothing changed is lost ----------------------------------------------------------------------


def by_numpy(p: torch.Tensor) -> None:
    p.detach().numpy()[...] += 1


def by_dlpack(p: torch.Tensor) -> None:
    torch.from_dlpack(p.detach()).add_(1)


def by_storage(p: torch.Tensor) -> None:
    p.untyped_storage().copy_((p.detach() + 1).untyped_storage())


def by_address(p: torch.Tensor) -> None:
    ctypes.memset(p.data_ptr(), 7, p.nbytes)


def by_bytes(p: torch.Tensor) -> None:
    """The kernel writes, not the processor."""
    memory = (ctypes.c_char * p.nbytes).from_address(p.data_ptr())
    with open("/dev/zero", "rb", buffering=0) as source:
        source.readinto(memory)


WRITERS = {
    "data": lambda p: p.data.add_(1),
    "in_place": lambda p: p.add_(1),
    "numpy": by_numpy,
    "dlpack": by_dlpack,
    "storage": by_storage,
    "address": by_address,
    "read": by_bytes,
    "foreach": lambda p: torch._foreach_add_([p], 1),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("here", [True, False], ids=["resident", "absent"])
def test_a_write_is_kept_however_it_is_made(folder, how, here):
    model = small()
    home = Home.adopt(model, folder, "written")
    weight = model[0].weight
    if here:
        home.bring_in()
    assert home.changed() == 0
    with torch.no_grad():
        WRITERS[how](weight)
    expected = weight.clone()
    assert home.changed() >= weight.nbytes
    assert home.give_back() >= weight.nbytes
    assert home.resident() == home.changed() == 0
    assert torch.equal(weight, expected)
    home.bring_in()
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_training_goes_on_across_evictions(folder, kind, fused):
    """Optimizer state, its references and BatchNorm's statistics: as if never moved."""

    def train(model: nn.Module, home: Home | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        made = getattr(torch.optim, kind)(model.parameters(), lr=0.1, fused=fused)
        for step in range(4):
            model(torch.randn(5, 64)).square().mean().backward()
            made.step()
            made.zero_grad()
            if home is not None:
                assert home.give_back() > 0
                if step % 2:
                    home.bring_in()
        return state_of(model)

    torch.manual_seed(0)
    expected = train(small(), None)
    torch.manual_seed(0)
    model = small()
    found = train(model, Home.adopt(model, folder, "trained"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_between_forward_and_backward(folder):
    """A graph keeps what it saved, whatever comes and goes under it."""
    model, x = small(), torch.randn(5, 64)
    model(x).sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    for statistic in (model[1].running_mean, model[1].running_var):
        statistic.fill_(1)
    loss = model(x).sum()
    home = Home.adopt(model, folder, "graph")
    loss.backward()
    assert torch.equal(model[0].weight.grad, expected)
    loss = model(x).sum()
    home.give_back()
    model.zero_grad()
    loss.backward()
    assert torch.equal(model[0].weight.grad, expected)


def test_a_thread_that_writes_during_eviction(folder):
    """It holds nothing and waits for nobody; what it wrote is there."""
    model = nn.Linear(1024, 64, bias=False)
    home = Home.adopt(model, folder, "stray")
    values = model.weight.detach().numpy().reshape(-1)
    values[:] = 0
    stop, rounds = threading.Event(), [0]

    def write() -> None:
        while not stop.is_set():
            rounds[0] += 1
            values[rounds[0] % 1024 :: 1024] = rounds[0]

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(150):
        home.give_back()
    stop.set()
    thread.join()
    home.give_back()
    assert rounds[0] > 10
    for past in range(min(rounds[0], 1024)):
        number = rounds[0] - past
        assert (values[number % 1024 :: 1024] == number).all(), (number, rounds)


def test_memory_taken_before_is_not_followed(folder):
    """As documented: an alias of before is other memory now; one of after is the weights."""
    model = small()
    before = model[0].weight.data
    Home.adopt(model, folder, "alias")
    after = model[0].weight.data
    before.fill_(3)
    assert not (model[0].weight == 3).any()
    after.fill_(4)
    assert (model[0].weight == 4).all()


# --- everything else works as before --------------------------------------------------------------


def saved_and_loaded(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    torch.save(model.state_dict(), path)
    assert path.stat().st_size < 60_000  # and not the whole map once a tensor
    return torch.load(path)


def as_safetensors(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file, save_file

    save_file(model.state_dict(), path)
    return load_file(path)


def pickled(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    return pickle.loads(pickle.dumps(model)).state_dict()


COPIES = {
    "torch.save": saved_and_loaded,
    "safetensors": as_safetensors,
    "pickle": pickled,
    "deepcopy": lambda model, path: copy.deepcopy(model).state_dict(),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_their_own(folder, tmp_path, how):
    model = small()
    before = state_of(model)
    home = Home.adopt(model, folder, "copied")
    found = COPIES[how](model, tmp_path / "file")
    home.give_back()
    for name, value in before.items():
        assert torch.equal(found[name], value), name
        if value.is_floating_point():
            found[name].fill_(5)
    assert_state(model, before)


def test_shared_memory_is_noticed(folder):
    """share_memory moves the weights elsewhere: they are right, and named as not being here."""
    model = small()
    before = state_of(model)
    home = Home.adopt(model, folder, "shared")
    assert home.astray() == []
    model.share_memory()
    assert_state(model, before)
    assert "0.weight" in home.astray()
    again = Home.adopt(model, folder, "again")
    assert again.astray() == []
    assert_state(model, before)


def test_functional_calls_and_replicas(folder):
    model, x = small().eval(), torch.randn(3, 64)
    before = model(x)
    Home.adopt(model, folder, "replica")
    state = dict(model.state_dict())
    assert torch.equal(torch.func.functional_call(model, state, (x,)), before)
    replica = copy.copy(model[0])._replicate_for_data_parallel()
    replica._parameters = dict(model[0]._parameters)
    assert torch.equal(replica(x), model[0](x))
    model.load_state_dict({name: value * 1 for name, value in state.items()})
    assert torch.equal(model(x), before)


def test_compiled_before_and_after(folder):
    """No graph is made anew by adopting, and the results follow the weights."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, x = small().eval(), torch.randn(3, 64)
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        before = compiled(x)
        home = Home.adopt(compiled, folder, "compiled")
        for _ in range(3):
            home.give_back()
            assert torch.equal(compiled(x), before)
        model[0].weight.mul_(2)
        home.give_back()
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), before)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_release_gives_ordinary_memory_back(folder):
    model = small()
    model.tied = model[0].weight
    home = Home.adopt(model, folder, "released")
    with torch.no_grad():
        model[0].weight.fill_(2)
    before, objects = state_of(model), [id(p) for p in model.parameters()]
    low, high = home.map.address, home.map.address + home.map.nbytes
    home.release()
    assert_state(model, before)
    assert objects == [id(p) for p in model.parameters()]
    assert not any(low <= value.data_ptr() < high for value in model.state_dict().values())
    assert folder.used == 0


def test_a_dead_model_leaves_nothing(folder):
    model = small()
    home = Home.adopt(model, folder, "dead")
    view = model[0].weight.data[3:5].clone(), model[0].weight.data[3:5]
    address = home.map.address
    del model
    assert home.tensors() == []
    home.close()
    assert folder.used == 0
    assert torch.equal(*view)  # a view of it still reads the file that has no name
    del home, view
    gc.collect()
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


def test_base_is_the_home_wherever_the_parameter_points(folder):
    model = small()
    home = Home.adopt(model, folder, "based")
    weight = model[0].weight
    base = home.base(weight)
    weight.data = torch.zeros(64, 64)
    assert home.astray() == ["0.weight"]
    assert home.base(weight) is base
    assert base.any()
    assert [m.name for m, _ in home.tensors()] == [m.name for m in home.members]
    for stranger in (torch.zeros(3), weight.detach(), nn.Parameter(weight.data)):
        with pytest.raises(PoolError, match="expected a parameter or buffer of based"):
            home.base(stranger)
    model[0].weight = nn.Parameter(torch.ones(64, 64))
    assert "0.weight" not in [m.name for m, _ in home.tensors()]


# --- segments -------------------------------------------------------------------------------------


def test_segments_come_and_go_alone(folder):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    model[3].weight = model[0].weight
    groups = [list(model[0].parameters()), list(model[1].parameters()), list(model[3].parameters())]
    home = Home.adopt(model, folder, "parts", segments=groups)
    assert len(home.segments) == 4
    assert home.segments[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(home.segments))
    assert all(end % PAGE == 0 for _, end in home.segments)
    assert home.segments[-1][1] == home.nbytes
    home.bring_in(1)
    assert [home.resident(i) > 0 for i in range(4)] == [False, True, False, False]
    where = {member.name: member.segment for member in home.members}
    assert where["0.weight"] == 0
    assert where["3.bias"] == 2
    assert where["2.weight"] == 3
    with torch.no_grad():
        model[1].weight.fill_(1)
        model[2].weight.fill_(2)
    assert home.give_back(1) > 0
    assert home.resident(1) == 0
    assert home.changed() == home.changed(3) > 0
    assert (model[1].weight == 1).all()


# --- memory and time ------------------------------------------------------------------------------


def smaps(address: int, end: int) -> int:
    """Rss of a range of addresses, as the kernel adds it up."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = address <= low and high <= end
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4), ("complex128", 8)])
def test_the_map_knows_what_is_written_as_one(folder, dtype, size):
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(torch.zeros(8, 8, dtype=getattr(torch, dtype)))
    model.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    home = Home.adopt(model, folder, "grain")
    assert home.map.grain == size
    home.close()


def test_memory_really_held(folder):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    home = Home.adopt(model, folder, "held")
    address, end = home.map.address, home.map.address + home.map.nbytes
    exact = sum(p.nbytes for p in model.parameters())
    assert smaps(address, end) == 0
    home.bring_in()
    assert exact <= smaps(address, end) == home.nbytes <= exact + PAGE
    with torch.no_grad():
        model(torch.randn(1, 256))
        model[3].weight.add_(1)
    assert smaps(address, end) <= exact + PAGE
    home.give_back()
    assert smaps(address, end) == home.resident() == 0


@pytest.mark.parametrize("method", ["scan", "pagemap", "compare"])
def test_a_kernel_that_cannot_scan(folder, monkeypatch, method):
    """The older ways of finding changes, by the same rules."""
    spill_map = _C.SpillMap
    monkeypatch.setattr(_C, "SpillMap", lambda *place, **more: spill_map(*place, method, **more))
    model = small()
    home = Home.adopt(model, folder, method)
    assert home.map.method == method
    with torch.no_grad():
        model[0].weight.data[3, 3] += 1
        model[2].bias.data.zero_()
    before = state_of(model)
    assert home.changed() == 2 * PAGE
    assert home.give_back() == 2 * PAGE
    assert home.resident() == 0
    assert_state(model, before)


def test_giving_back_is_quick(folder):
    """64 MiB that nobody changed, by the best of some tries: the machine may be busy."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    home = Home.adopt(model, folder, "large")
    seconds = []
    for _ in range(15):
        home.bring_in()
        start = time.perf_counter()
        home.give_back()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3
