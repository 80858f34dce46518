"""What users do to managed models that nobody had in mind."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import threading
import time

import pytest
import torch
from torch import nn

from opguard import pools
from opguard.pools import AutoManageHook, PoolError, PoolFileChanged, Unmanageable
from pools_kit import Thing, ThingUser, fresh_pools, tiny, until


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "4MiB") as management:
        yield management


X = torch.linspace(-1, 1, 512).reshape(1, 512)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_another_default_device_is_no_concern_of_the_weights(cpu, device):
    model = tiny(2)
    expected, x = model(X), X.clone()
    with torch.device(device):
        handle = pools.manage(model)
        cpu.free()
        with pools.auto_manage(model):
            pass
        pools.unmanage(model)
        with pools.auto_manage(model):
            pass
    assert handle.obj is model
    assert torch.equal(model(x), expected)


def test_unmanaged_a_module_is_without_hooks(cpu):
    model = tiny(1)
    expected = model(X)
    hook = AutoManageHook(model).attach()
    assert torch.equal(model(X), expected)
    pools.unmanage(model)
    assert not hook.attached
    assert torch.equal(model(X), expected)
    assert cpu.find(model) is None
    hook.remove()
    hook.attach()
    assert torch.equal(model(X), expected)
    assert cpu.find(model) is not None


def test_a_handle_of_what_is_managed_no_more_says_so(cpu):
    model = tiny(1)
    handle = pools.manage(model, name="encoder")
    pools.unmanage(model)
    for use in (handle.load, handle.let_go, handle.lease, lambda: pools.auto_manage(handle)):
        with pytest.raises(PoolError, match="expected 'encoder' to be managed"):
            use()
    with pytest.raises(PoolError, match="encoder"):
        handle.pinned = True
    others = set(threading.enumerate())
    handle.prefetch()  # a thread of its own, which says nothing
    until(lambda: set(threading.enumerate()) <= others)
    assert not handle.loaded
    with pools.auto_manage(model) as fresh:
        assert fresh is not handle


def test_a_lease_made_before_it_was_let_go_of_says_so(cpu):
    model = tiny(1)
    lease = pools.manage(model).lease()
    pools.unmanage(model)
    with pytest.raises(PoolError, match="manage again"), lease:
        pass


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.handle = pools.manage(self.inner, priority=3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_handle_is_on_the_copied_model(cpu, copied):
    owner = Owner()
    with owner.handle.lease():
        twin = copied(owner)
    assert twin.handle.obj is twin.inner
    assert torch.equal(twin.inner.weight, owner.inner.weight)
    with twin.handle.lease():
        twin.inner.weight.data.zero_()
    twin.handle.offload()
    cpu.free()
    assert owner.inner.weight.any()
    assert not twin.inner.weight.any()
    assert twin.handle.entry is not owner.handle.entry
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        owner.handle.lode()


class Itself(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.handle = pools.manage(self)


def test_a_model_that_keeps_its_own_handle_can_be_copied(cpu):
    model = Itself()
    twin = copy.deepcopy(model)
    with twin.handle.lease():
        twin.layer.weight.data.zero_()
    assert model.layer.weight.any()


def test_lazy_modules_are_refused_in_our_words(cpu):
    with pytest.raises(Unmanageable, match="run the model once first"):
        pools.manage(nn.LazyLinear(4))


def spilled(folder):
    return next(folder.rglob("*.safetensors"))


def cut(path):
    os.truncate(path, 4096)


def cut_while_used(folder, model, handle):
    with handle.lease():
        cut(spilled(folder))
        model(X)


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_that_is_cut_under_a_lease_is_told_at_its_end_and_ever_after(cpu, tmp_path, stream):
    model = tiny(2)
    handle = pools.manage(model, stream=stream)
    with pytest.raises(PoolFileChanged):
        cut_while_used(tmp_path, model, handle)
    with pytest.raises(PoolFileChanged), handle.lease():
        model(X)
    with AutoManageHook(model), pytest.raises(PoolFileChanged):
        model(X)
    cpu.free()
    with pytest.raises(PoolFileChanged), handle.lease():
        model(X)
    other = tiny(2, seed=1)
    expected = other(X)
    with pools.auto_manage(other):  # nobody else is harmed
        assert torch.equal(other(X), expected)


def test_a_cut_file_is_told_to_a_call(cpu, tmp_path):
    model = tiny(2)
    AutoManageHook(model).attach()
    model(X)
    cut(spilled(tmp_path))
    for _ in range(2):
        with pytest.raises(PoolFileChanged):
            model(X)


def test_a_cut_file_that_nobody_read_is_told_when_it_is_brought_in(cpu, tmp_path):
    """It cannot be written to, and does not stay for that: its bytes are given back."""
    model = tiny(2)
    handle = pools.manage(model)
    with handle.lease():
        model[0].weight.data.add_(1)
    cut(spilled(tmp_path))
    cpu.free()
    assert cpu.pool("cpu").used == 0
    with pytest.raises(PoolFileChanged), handle.lease():
        pass


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_file_is_told_to_who_lets_go_of_its_model(cpu, tmp_path, stream):
    """Its weights are zeros from then on, and no lease is left to say so."""
    model = tiny(2)
    pools.manage(model, stream=stream)
    cut(spilled(tmp_path))
    with pytest.raises(PoolFileChanged, match="load the model again"):
        pools.unmanage(model)
    assert cpu.find(model) is None
    pools.unmanage(model)


def test_a_cut_file_is_told_to_who_lets_go_of_a_pipeline_of_it(cpu, tmp_path):
    model = tiny(1)
    handle = pools.manage({"encoder": model})
    cut(spilled(tmp_path))
    with pytest.raises(PoolFileChanged, match="encoder"):
        pools.unmanage(handle)
    assert cpu.find(model) is None


def test_a_spill_folder_that_is_tidied_away_is_made_again(cpu, tmp_path):
    model = tiny(1)
    handle = pools.manage(model)
    for each in tmp_path.iterdir():
        shutil.rmtree(each)
    with handle.lease():
        model[0].weight.data.add_(1)
        expected = model(X)
    cpu.free()
    other = tiny(1, seed=1)
    pools.manage(other)
    assert cpu.folder.used > 1 << 20
    assert torch.equal(model(X), expected)
    pools.unmanage(model)
    pools.unmanage(other)
    assert cpu.folder.used == 0


def test_what_would_not_go_is_asked_again_by_free(cpu, monkeypatch):
    """A full disk: after there is room again free() frees."""
    model = tiny(1)
    handle = pools.manage(model)
    with handle.lease():
        model[0].weight.data.add_(1)
    full = {"yes": True}
    give_back = type(handle.user).give_back

    def refuse(user):
        if full["yes"]:
            raise OSError(28, "No space left on device")
        return give_back(user)

    monkeypatch.setattr(type(handle.user), "give_back", refuse)
    assert cpu.free() == 0
    full.clear()
    full["yes"] = False
    assert cpu.free() > 0
    assert not handle.loaded


def test_names_that_are_used_once_are_not_kept(cpu):
    """A service that names each request's model would keep them all."""
    for number in range(20):
        pools.manage(nn.Linear(2, 2), name=f"request {number}")
    cpu.drain()
    assert len(cpu._names) <= 2
    kept = [pools.manage(nn.Linear(2, 2), name="same") for _ in range(3)]
    del kept[0]
    cpu.drain()
    kept += [pools.manage(nn.Linear(2, 2), name="same") for _ in range(2)]
    assert len({handle.name for handle in kept}) == 4


def test_weights_that_got_another_name_are_still_followed(cpu):
    """As by peft, which puts layers of its own around a model's, and by parametrizations."""
    from torch.nn.utils import parametrize

    model = tiny(2)
    handle = pools.manage(model)
    before = {id(tensor) for _, tensor in handle.user.home.tensors()}
    model[0] = nn.Sequential(model[0], nn.Identity())
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    assert {id(tensor) for _, tensor in handle.user.home.tensors()} == before
    assert handle.user.home.astray() == []


def test_an_interrupt_never_leaves_a_home_locked(cpu):
    """Ctrl-C between taking the lock and having entered: all who need the model hung from then."""
    model = tiny(1)
    expected = model(X)
    home = pools.manage(model).user.home
    random = torch.Generator().manual_seed(0)
    interrupts = 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            try:
                wait = float(torch.rand((), generator=random)) * 2e-4 + 2e-5
                signal.setitimer(signal.ITIMER_REAL, wait)
                for _ in range(50):
                    home.give_back()
            except KeyboardInterrupt:
                interrupts += 1
            assert home._lock.here.acquire(blocking=False)
            home._lock.here.release()
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 100
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("name", [5, b"encoder", ["encoder"]])
def test_a_name_is_text(cpu, name):
    with pytest.raises(TypeError, match="expected the name of what is managed as text"):
        pools.manage(tiny(1), name=name)


def test_names_may_be_any_text(cpu):
    for name in ("a/../b", "é" * 300, "", "a\0b", "..", "%s"):
        with pools.manage(tiny(1), name=name).lease() as handle:
            assert handle.loaded


def test_what_kept_it_from_going_is_not_said_of_one_that_went(cpu):
    thing = Thing()
    handle = pools.manage(thing, name="thing")
    thing.does["out"] = lambda: 1 / 0
    for said in (True, False):
        with handle.lease():
            pass
        assert (cpu.free() == 0) is said
        assert ("'thing' would not go: ZeroDivisionError" in str(pools.report())) is said
        thing.does.clear()


def test_a_registered_type_that_cannot_be_held_weakly_is_told_so(cpu):
    class Slots:
        __slots__ = ("weight",)

    pools.register_user(Slots, ThingUser)
    with pytest.raises(Unmanageable, match=r"got Slots; .*held weakly.*__weakref__"):
        pools.manage(Slots())
