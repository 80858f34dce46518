"""Streamed models in places where nobody planned them: odd forwards, copies, forks, interrupts."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import os
import pickle
import signal
import threading
import weakref

import pytest
import torch
from torch import nn

from opguard import pools
from pools_kit import fresh_pools, until

SIDE = 64
LAYER = SIDE * SIDE * 4
X = torch.linspace(-1, 1, SIDE).reshape(1, SIDE)


@pytest.fixture
def pool(tmp_path):
    with fresh_pools(tmp_path, 8 * LAYER) as management:
        yield management.pool("cpu")


def layer() -> nn.Linear:
    return nn.Linear(SIDE, SIDE, bias=False)


def layers(count: int = 20) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(layer(), nn.Tanh()) for _ in range(count))).eval()


def held() -> list[str]:
    return [user.name for user in pools.get_management().snapshot().users if user.leases]


# --- what a forward may be ----------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def forward(self, x):
        return self.inner(x)


class Static(Plain):
    @staticmethod
    def forward(x):
        return x * 2


class OfItsClass(Plain):
    @classmethod
    def forward(cls, x):
        return x * 2


class Partial(Plain):
    def times(self, factor, x):
        return self.inner(x) * factor

    forward = functools.partialmethod(times, 3)


@pytest.mark.parametrize("kind", [Plain, Static, OfItsClass, Partial])
def test_any_kind_of_method_may_be_the_forward(pool, kind):
    model = nn.Sequential(*(kind() for _ in range(20)))
    expected = model(X)
    pools.manage(model)
    assert torch.equal(model(X), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_blocks(pool):
    model = layers()
    model[3] = torch.jit.script(model[3])
    expected = model(X)
    pools.manage(model)
    assert torch.equal(model(X), expected)
    assert pool.used <= pool.budget
    with pytest.raises(pools.PoolRefused, match="RecursiveScriptModule"):
        pools.manage(torch.jit.script(layers()))  # what runs in it nobody stops between


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_streamed_model_that_is_scripted_is_told_what_to_do(pool):
    model = layers()
    pools.manage(model)
    with pytest.raises(AttributeError, match="unmanage"):
        torch.jit.script(model)
    pools.unmanage(model)
    assert torch.equal(torch.jit.script(model)(X), model(X))


class Steps(nn.Module):
    def __init__(self, seen: list[list[str]]) -> None:
        super().__init__()
        self.inner, self.seen = layer(), seen

    def forward(self, x):
        for _ in range(2):
            x = nn.functional.linear(x, self.inner.weight)
            self.seen.append(held())
            yield x


class Awaited(Steps):
    async def forward(self, x):
        await asyncio.sleep(0)
        self.seen.append(held())
        return self.inner(x)


def test_a_generator_has_its_weights_from_its_first_step_to_its_last(pool):
    seen: list[list[str]] = []
    model = nn.ModuleList(Steps(seen) for _ in range(20))
    expected = [step for each in model for step in each(X)]
    pools.manage(model, name="model")
    seen.clear()
    assert all(map(torch.equal, (step for each in model for step in each(X)), expected))
    assert seen == [[f"model[{number // 2}]"] for number in range(40)]
    assert not held()


def test_a_coroutine_has_its_weights_while_it_runs(pool):
    seen: list[list[str]] = []
    model = nn.ModuleList(Awaited(seen) for _ in range(20))
    pools.manage(model, name="model")
    assert asyncio.run(model[5](X)).shape == X.shape
    assert seen == [["model[5]"]]
    assert not held()


def test_who_wrapped_a_forward_keeps_it_after_the_model_was_let_go_of(pool):
    """As libraries do that put their own around ``module.forward`` and keep what was there."""
    model = layers()
    expected = model(X)
    pools.manage(model)
    below = model[3].forward
    model[3].forward = functools.partial(below)
    assert torch.equal(model(X), expected)
    pools.unmanage(model)
    assert torch.equal(model(X), expected)
    pools.manage(model)
    assert torch.equal(model(X), expected)


# --- copies -------------------------------------------------------------------------------------


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_a_forward_of_ones_own_is_copied(pool):
    model = layers()
    model[3].forward = abs
    expected = model(X)
    pools.manage(model)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)


class CopiesItself(Plain):
    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class PicklesItself(Plain):
    def __reduce__(self):
        return _made, (type(self), dict(self.__dict__))


def _made(kind, state):
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made


def test_classes_that_copy_themselves_run_their_own_weights(pool):
    model = nn.Sequential(*(CopiesItself() for _ in range(9)))
    pools.manage(model)
    assert not zeroed(copy.deepcopy(model))(X).any()
    assert model(X).any()


def test_classes_that_pickle_themselves_run_their_own_weights(pool):
    model = nn.Sequential(*(PicklesItself() for _ in range(9)))
    pools.manage(model)
    assert not zeroed(pickle.loads(pickle.dumps(model)))(X).any()
    assert model(X).any()


def test_a_copy_goes_at_once_and_its_calls_leave_it_plain(pool):
    model = layers()
    pools.manage(model)
    gc.collect()
    gc.disable()
    try:
        for managed in (False, True):
            copied = copy.deepcopy(model)
            if managed:
                pools.manage(copied)
            copied(X)
            assert managed or not any("forward" in vars(each) for each in copied.modules())
            gone = weakref.ref(copied[0])
            del copied
            assert gone() is None  # without the collector
    finally:
        gc.enable()


# --- budgets ------------------------------------------------------------------------------------


def test_weights_that_are_parts_of_one_storage_are_counted_for_themselves(pool):
    """Weights cut from one flat tensor, and a small one from a huge one."""
    model = layers()
    expected = model(X)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for number, parameter in enumerate(model.parameters()):
        parameter.data = flat[number * SIDE * SIDE :][: SIDE * SIDE].view(SIDE, SIDE)
    assert pools.manage(model).user.largest_need <= 2 * LAYER
    assert torch.equal(model(X), expected)
    small = layer()
    small.weight.data = torch.zeros(40 * SIDE, SIDE)[:SIDE]
    handle = pools.manage(small)
    with handle.lease():
        assert handle.loaded  # whole: it fits


def test_pinned_it_runs_and_what_can_stay_stays(pool):
    model = layers()
    expected = model(X)
    handle = pools.manage(model, pin=True)
    for _ in range(3):
        assert torch.equal(model(X), expected)
    assert handle.pinned
    handle.user.pause()  # what is being fetched is in use
    pools.free()
    kept = pool.used
    assert 0 < kept <= pool.budget - 2 * LAYER
    with pytest.raises(pools.PoolRefused, match="is pinned, or would not go;"):
        pools.manage(layers(3)).load()
    pool.budget = 4 * LAYER
    assert torch.equal(model(X), expected)
    handle.user.pause()
    pools.free()
    assert 0 < pool.used < kept
    handle.pinned = False
    pools.free()
    assert pool.used == 0


@pytest.mark.parametrize("make", [nn.ReLU, nn.Sequential, lambda: nn.ModuleList([nn.ReLU()])])
def test_what_has_no_weights_may_be_streamed(pool, make):
    handle = pools.manage(make(), stream=True)
    with handle.lease():
        assert pool.used == 0


class Tied(nn.Module):
    """Its own forward reads the table's weight; it has no tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.table = layers(12), nn.Embedding(2 * SIDE, SIDE)
        self.seen: list[bool] = []

    def forward(self, ids):
        x = self.layers(self.table(ids))
        self.seen.append(bool(held()))
        return nn.functional.linear(x, self.table.weight)


IDS = torch.arange(4).reshape(1, 4)


def test_a_model_without_tensors_of_its_own_learns_what_it_reads(pool):
    model = Tied().eval()
    expected = model(IDS)
    pools.manage(model)
    model.seen.clear()
    for _ in range(4):
        assert torch.equal(model(IDS), expected)
        assert pool.used <= pool.budget
    until(lambda: not held())
    assert model.seen[-1]


def test_threads_that_learn_while_others_wait_leave_no_lease(pool):
    wrong: list[object] = []

    def work(model: nn.Module, expected: torch.Tensor) -> None:
        try:
            for _ in range(4):
                if not torch.equal(model(IDS), expected):
                    wrong.append("other values")
        except BaseException as error:
            wrong.append(error)

    for _ in range(5):
        model = Tied().eval()
        expected = model(IDS)
        pools.manage(model)
        threads = [threading.Thread(target=work, args=(model, expected)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not wrong
        until(lambda: not held())


def test_what_was_learned_is_forgotten_with_the_budget_it_was_learned_in(pool):
    model = Tied().eval()
    expected = model(IDS)
    handle = pools.manage(model)
    for _ in range(4):
        assert torch.equal(model(IDS), expected)
    pool.budget = handle.user.largest_need  # enough, as long as the table is not held all the time
    assert torch.equal(model(IDS), expected)


def test_pages_that_segments_share_teach_nothing(pool, tmp_path):
    """In the user's file weights lie beside each other, and what is read brings in neighbours."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = layers()
    expected = model(X)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), assign=True)
    pools.manage(model, trust_files=True)
    for _ in range(4):
        assert torch.allclose(model(X), expected)
        assert pool.used <= pool.budget


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("when", ["seat", "request"])
def test_let_go_of_while_a_block_is_about_to_run_it_runs_as_an_ordinary_model(
    pool, monkeypatch, hooked, when
):
    model = layers()
    if hooked:
        model[3].register_forward_hook(lambda *_: None)
    expected = model(X)
    management = pools.get_management()
    user = pools.manage(model).user
    block_seat, is_there = user.block_seat, management._refuse_gone

    def seat(number):
        found = block_seat(number)
        if user.cut.blocks[number].name.startswith("3"):
            if when == "seat":
                pools.unmanage(model)
            else:
                monkeypatch.setattr(management, "_refuse_gone", let_go)
        return found

    def let_go(units):
        monkeypatch.undo()
        is_there(units)
        pools.unmanage(model)

    monkeypatch.setattr(user, "block_seat", seat)
    for entry in user.members:
        management.condemn(entry)
    pools.free()
    with torch.no_grad():
        assert torch.allclose(model(X), expected)
    assert user.closed
    assert not held()


# --- interrupts and forks -----------------------------------------------------------------------


def test_interrupts_leave_no_block_counted(pool):
    model = layers()
    expected = model(X)
    handle = pools.manage(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + number * 0.00005)
                try:
                    model(X)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
    until(lambda: not held())
    stream = handle.user
    assert not any(stream._runs(number) for number in range(len(stream.cut.blocks)))
    assert torch.equal(model(X), expected)


def test_interrupted_while_it_is_managed_it_is_a_plain_model(pool, monkeypatch):
    from opguard.pools import streaming

    made: list[object] = []

    class Interrupted(streaming.BlockForward):
        def __init__(self, *args) -> None:
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(args)
            super().__init__(*args)

    model = layers()
    expected = model(X)
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "BlockForward", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            pools.manage(model)
    assert not any("forward" in vars(each) for each in model.modules())
    pools.get_management().drain()
    assert not pools.get_management().snapshot().users
    pools.manage(model)
    assert torch.equal(model(X), expected)


def test_a_model_that_dies_while_a_block_of_it_is_fetched_stops_no_fetching(pool, monkeypatch):
    """Whoever asks buries who died: the thread that fetches meets its own model there."""
    from opguard.pools import streaming

    models, management = [layers()], pools.get_management()
    pools.manage(models[0])
    models[0](X)
    fetching, go_on, buried = threading.Event(), threading.Event(), threading.Event()

    def bury(_ask):
        fetching.set()
        go_on.wait(20)
        management.drain()
        buried.set()

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "enter", bury)
        until(lambda: models[0](X) is not None and fetching.wait(0.01))
        management.stop()  # nobody else does it
        models.clear()
        go_on.set()
        assert buried.wait(5)
    assert not management.snapshot().users


def test_a_child_forked_while_a_block_is_fetched_goes_on(pool, monkeypatch):
    model = layers()
    handle = pools.manage(model)
    model(X)
    fetching, go_on = threading.Event(), threading.Event()

    def wait(*_args, **_kwargs):
        fetching.set()
        go_on.wait(20)

    from opguard.pools import streaming

    monkeypatch.setattr(streaming, "enter", wait)
    until(lambda: model(X) is not None and fetching.wait(0.01))
    child = os.fork()
    if child == 0:  # the thread that fetches is not here
        signal.alarm(10)
        go_on.set()
        try:
            model(X)
            handle.offload()
            os._exit(0)
        finally:
            os._exit(1)
    go_on.set()
    assert os.waitpid(child, 0)[1] == 0
