"""A home when things go wrong: full disks, files that are cut, no memory, forks."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
from opguard.pools.errors import PoolFileChanged, Unmanageable

PAGE = 4096


@pytest.fixture
def folder(tmp_path):
    made = SpillFolder(tmp_path / "spill")
    yield made
    made.close()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_state(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@contextlib.contextmanager
def files_of_at_most(size: int):
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def spill_path(folder: SpillFolder) -> Path:
    (path,) = folder.path.glob("*.safetensors")
    return path


# --- adopting -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_module_alone(folder):
    model = small()
    before, places = state_of(model), [p.data_ptr() for p in model.parameters()]
    with files_of_at_most(8192), pytest.raises(OSError, match="free some there"):
        Home.adopt(model, folder, "full")
    assert places == [p.data_ptr() for p in model.parameters()]
    assert_state(model, before)
    assert folder.used == 0


def test_a_tensor_that_cannot_be_pointed(folder, monkeypatch):
    """All or none: what was pointed already goes back."""
    from opguard.pools import _homes

    model, point, calls = small(), _homes.point, []
    before, places = state_of(model), [p.data_ptr() for p in model.parameters()]

    def failing(tensor, at):
        calls.append(tensor)
        if len(calls) == 4:
            raise RuntimeError("no")
        point(tensor, at)

    monkeypatch.setattr(_homes, "point", failing)
    with pytest.raises(RuntimeError, match="no"):
        Home.adopt(model, folder, "half")
    assert places == [p.data_ptr() for p in model.parameters()]
    assert_state(model, before)
    assert folder.used == 0


def test_pages_that_cannot_be_given_back_at_first(folder, monkeypatch):
    model = small()
    before, places = state_of(model), [p.data_ptr() for p in model.parameters()]

    def failing(self, segment=None):
        raise OSError(errno.EMFILE, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Home, "give_back", failing)
        with pytest.raises(OSError, match="no"):
            Home.adopt(model, folder, "half")
    assert places == [p.data_ptr() for p in model.parameters()]
    assert_state(model, before)
    assert folder.used == 0


def test_memory_that_two_storages_show_is_refused(folder):
    """To follow both it would have to be one; copied twice they would no longer be tied."""
    import numpy as np

    array = np.zeros(4096, dtype=np.float32)
    model = nn.Linear(2, 2)
    model.tied = nn.Parameter(torch.from_numpy(array))
    model.other = nn.Parameter(torch.from_numpy(array[10:]))
    with pytest.raises(Unmanageable, match=r"tied.*other|other.*tied"):
        Home.adopt(model, folder, "tied")
    del model.other
    Home.adopt(model, folder, "alone").release()


NO_MEMORY = """
import os, resource, sys
import torch
from torch import nn
from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
folder = SpillFolder(sys.argv[1])
model, later = nn.Linear(2048, 2048), nn.Linear(64, 64)
home = Home.adopt(later, folder, "later")
before, place = model.weight.detach()[::64].clone(), model.weight.data_ptr()
pages = int(open("/proc/self/statm").read().split()[0])
kept = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (17 << 20), kept[1]))
try:
    Home.adopt(model, folder, "large")
except MemoryError as error:
    assert "expected memory to map the weights of large" in str(error), error
else:
    raise AssertionError("expected MemoryError")
# There is no room to take pages away to either: they are dropped where they are.
large = Home.adopt(nn.Linear(1024, 1024), folder, "fits")
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096, kept[1]))
large.bring_in()
tensor = large.members[0].base
tensor.data[3] = 7
assert large.give_back() > 0 and large.resident() == 0, large.resident()
resource.setrlimit(resource.RLIMIT_AS, kept)
assert (tensor[3] == 7).all()
assert model.weight.data_ptr() == place and torch.equal(model.weight.detach()[::64], before)
assert folder.used < 10 << 20, folder.used
"""


def test_no_memory_to_map(tmp_path):
    import opguard

    environment = {**os.environ, "PYTHONPATH": str(Path(opguard.__file__).parents[1])}
    command = [sys.executable, "-c", NO_MEMORY, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)


# --- giving back ----------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_was_changed(folder):
    model = small()
    home = Home.adopt(model, folder, "full")
    with torch.no_grad():
        model[0].weight.fill_(3)
    with files_of_at_most(8192), pytest.raises(OSError, match="still in memory"):
        home.give_back()
    assert (model[0].weight == 3).all()
    assert home.changed() >= model[0].weight.nbytes
    assert home.give_back() >= model[0].weight.nbytes
    assert (model[0].weight == 3).all()


@pytest.mark.parametrize("how", ["cut", "emptied", "written"])
@pytest.mark.parametrize("here", [True, False], ids=["resident", "absent"])
def test_our_file_is_changed_by_others(folder, how, here):
    """An exception at the next step, and the process goes on whatever was read meanwhile."""
    model = small()
    home = Home.adopt(model, folder, "cut")
    if here:
        home.bring_in()
    path = spill_path(folder)
    if how == "written":
        with open(path, "r+b") as file:
            file.seek(PAGE)
            file.write(b"x")
    else:
        os.truncate(path, PAGE * 2 if how == "cut" else 0)
    for step in (home.bring_in, home.give_back):
        with pytest.raises(PoolFileChanged, match="expected the weights of cut in their spill"):
            step()
    model(torch.randn(2, 64))  # reads what is gone
    with pytest.raises(PoolFileChanged) if how != "written" else contextlib.nullcontext():
        home.raise_if_broken()
    if how == "cut":
        assert path.stat().st_size == PAGE * 2  # and was not made whole with zeros


def test_a_name_that_is_gone_harms_nothing(folder):
    """The file itself is held: to remove or replace its name changes no weight."""
    model = small()
    before, home = state_of(model), Home.adopt(model, folder, "gone")
    path = spill_path(folder)
    path.unlink()
    path.write_bytes(b"another")
    home.bring_in()
    home.give_back()
    assert_state(model, before)
    home.raise_if_broken()


# --- the user's files -----------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path):
    """A model whose weights safetensors has mapped from a file of the user's."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = small()
    save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path), assign=True)
    return model, path


def test_a_trusted_file_is_read_and_never_written(folder, mapped):
    model, path = mapped
    before, content = state_of(model), path.read_bytes()
    home = Home.adopt(model, folder, "theirs", trust_files=True)
    assert folder.used == 0
    assert home.resident() == 0
    home.bring_in()
    assert home.resident() == home.nbytes > 0
    with torch.no_grad():
        model[0].weight[5] = 3
    before["0.weight"][5] = 3
    assert home.give_back() == 0
    assert 0 < home.resident() == home.changed() <= 3 * PAGE
    assert_state(model, before)
    assert path.read_bytes() == content


def test_a_checkpoint_of_many_tensors_takes_few_descriptors(folder, tmp_path):
    """Neighbours in a file are one range; a home of ours keeps one descriptor."""
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
    before = state_of(model)
    save_file(before, tmp_path / "many.safetensors")
    folder.path
    count = len(os.listdir("/proc/self/fd"))
    ours = Home.adopt(model, folder, "ours")
    assert len(os.listdir("/proc/self/fd")) == count + 1
    model.load_state_dict(load_file(tmp_path / "many.safetensors"), assign=True)
    theirs = Home.adopt(model, folder, "theirs", trust_files=True)
    assert len(os.listdir("/proc/self/fd")) <= count + 2
    assert theirs.nbytes <= sum(value.nbytes for value in before.values()) + 2 * PAGE
    theirs.bring_in()
    assert_state(model, before)
    ours.close()


def test_without_trust_they_are_copied(folder, mapped):
    model, path = mapped
    before = state_of(model)
    home = Home.adopt(model, folder, "ours")
    assert folder.used >= sum(value.nbytes for value in before.values())
    os.truncate(path, 0)
    home.bring_in()
    assert_state(model, before)


@pytest.mark.parametrize("how", ["cut", "replaced", "removed", "written"])
@pytest.mark.parametrize("here", [True, False], ids=["resident", "absent"])
def test_a_trusted_file_that_changes(folder, mapped, how, here):
    model, path = mapped
    home = Home.adopt(model, folder, "theirs", trust_files=True)
    if here:
        home.bring_in()
    if how == "cut":
        os.truncate(path, 100)
    elif how == "removed":
        path.unlink()
    elif how == "written":
        path.write_bytes(path.read_bytes())
    else:
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    with pytest.raises(PoolFileChanged, match=r"in .*model.safetensors as they were mapped"):
        home.bring_in()
    model(torch.randn(2, 64))
    with pytest.raises(PoolFileChanged) if how == "cut" else contextlib.nullcontext():
        home.raise_if_broken()


def test_two_files_one_of_which_has_changed(folder, tmp_path):
    """Where not all can be brought in, nothing is."""
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    for index, layer in enumerate(model):
        save_file(layer.state_dict(), tmp_path / f"{index}.safetensors")
        layer.load_state_dict(load_file(tmp_path / f"{index}.safetensors"), assign=True)
    home = Home.adopt(model, folder, "two", trust_files=True)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(PoolFileChanged):
        home.bring_in()
    assert home.resident() == 0
    (tmp_path / "0.safetensors").unlink()


def test_trust_where_there_is_no_file(folder):
    model = small()
    before = state_of(model)
    home = Home.adopt(model, folder, "plain", trust_files=True)
    assert folder.used > 0
    assert home.resident() == 0
    assert_state(model, before)


# --- forks ----------------------------------------------------------------------------------------


def test_parent_and_child_write_apart(folder):
    """After a fork each has its own weights, also those that only the other one changes."""
    model = small()
    home = Home.adopt(model, folder, "forked")
    first, second = os.pipe(), os.pipe()
    with torch.no_grad():
        model[0].weight.fill_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and later, of threads
        child = os.fork()
    if child == 0:
        good = False
        try:
            with torch.no_grad():
                model[0].bias.fill_(2)
                home.give_back()
                os.write(first[1], b"x")
                os.read(second[0], 1)
                home.bring_in()
                good = bool(
                    (model[0].weight == 1).all()
                    and (model[0].bias == 2).all()
                    and not (model[2].weight == 4).any()
                )
                home.close()
        finally:
            os._exit(0 if good else 1)
    os.read(first[0], 1)
    with torch.no_grad():
        model[0].weight.fill_(3)
        model[2].weight.fill_(4)
    assert home.give_back() > 0
    assert home.resident() == 0
    os.write(second[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    home.bring_in()
    assert (model[0].weight == 3).all()
    assert (model[2].weight == 4).all()
    assert not (model[0].bias == 2).any()
    assert len(list(folder.path.glob("*.safetensors"))) == 1
    with torch.no_grad():
        model[2].weight.fill_(5)
    home.give_back()
    assert (model[2].weight == 5).all()
    for end in (*first, *second):
        os.close(end)


def test_a_fork_in_the_middle_of_an_eviction(folder):
    """Another thread held the locks: the child can use its weights all the same."""
    home = Home.adopt(small(), folder, "forked")
    with home._lock.here, folder._lock.here, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            good = False
            try:
                home.bring_in()
                home.give_back()
                Home.adopt(small(), folder, "own")
                good = True
            finally:
                folder.close()
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    home.bring_in()


def test_many_homes_leave_nothing(folder):
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(".saf")

    model = small()
    Home.adopt(model, folder, "first").release()
    before = held()
    for number in range(20):
        home = Home.adopt(model, folder, f"again {number}")
        home.bring_in()
        with torch.no_grad():
            model[0].weight.add_(1)
        home.give_back()
        if number % 2 == 0:
            home.close()  # the next one takes the weights from what is still mapped
    home.release()
    del home
    assert held() == before
    assert folder.used == 0
