"""AutoManageHook: a module that brings itself in, and is otherwise the module it was."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from opguard import _C
from opguard.pools import _inputs
from opguard.pools._inputs import input_mover, move_inputs
from opguard.pools.hooks import AutoManageHook
from opguard.pools.management import get_management
from opguard.pools.wrappers import auto_manage, manage
from pools_kit import fresh_pools

GRANTED = 0
X = torch.arange(8.0).reshape(2, 4)
META = torch.device("meta")


class Handle:
    """A handle as the hook sees it, over a ledger of its own; loading is a count."""

    def __init__(self, obj: nn.Module, device: str = "cpu") -> None:
        self._obj = weakref.ref(obj)
        self.device = torch.device(device)
        self.ledger = _C.Ledger()
        self.unit = self.ledger.add_unit(self.ledger.add_pool(100), 100)
        self.seat = _C.Seat(self.ledger, (self.unit,), self.enter)
        self.loads: list[float | None] = []
        self.refuse = False

    def enter(self, seat: Any, owner: Any, timeout: float | None) -> None:
        if self.refuse:
            raise LookupError("refused")
        answer = self.ledger.request(owner.id, seat.units)
        assert answer.verdict == GRANTED
        for unit in answer.load:
            self.ledger.loaded(unit)
        self.loads.append(timeout)

    @property
    def obj(self) -> Any:
        return self._obj()

    def get_execution_device(self) -> torch.device:
        return self.device

    @property
    def held(self) -> int:
        return self.ledger.unit(self.unit).leases


class Net(nn.Module):
    """Says how often it is held while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)
        self.seen: list[int] = []
        self.scale = 1.0

    def forward(self, x: torch.Tensor, *, fail: type[BaseException] | None = None) -> torch.Tensor:
        """What forward says."""
        self.look()
        if fail is not None:
            raise fail("mine")
        return self.last(torch.relu(self.first(x))) * self.scale

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.look()
        return self.first(x)

    @torch.compiler.disable
    def look(self) -> None:
        handle = HANDLES.get(id(self))
        if handle is not None:
            self.seen.append(handle.held)


HANDLES: dict[int, Handle] = {}


@pytest.fixture(autouse=True)
def _own_pools(tmp_path):
    with fresh_pools(tmp_path):
        yield
    HANDLES.clear()
    torch._dynamo.reset()


def hooked(net: nn.Module | None = None, **how: Any) -> tuple[Any, Handle, AutoManageHook]:
    net = Net().eval() if net is None else net
    handle = HANDLES[id(net)] = Handle(net)
    return net, handle, AutoManageHook(handle, **how).attach()


# --- calls ---


def test_a_call_holds_a_lease_and_gives_it_back():
    net, handle, _ = hooked()
    assert (handle.held, handle.loads) == (0, [])
    net(X)
    net(x=X)
    assert (net.seen, handle.held, handle.loads) == ([1, 1], 0, [None])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_gives_the_lease_back_and_keeps_no_input(error):
    net, handle, _ = hooked()
    x = torch.ones(2, 4)
    dead = weakref.ref(x)
    with pytest.raises(error):
        net(x, fail=error)
    assert handle.held == 0
    del x
    gc.collect()
    assert dead() is None


def test_the_lease_is_counted():
    net, handle, _ = hooked()
    with _C.Lease(handle.seat), _C.Lease(handle.seat):
        net(X)
        assert (net.seen, handle.held) == ([3], 2)
        with pytest.raises(ValueError, match="mine"):
            net(X, fail=ValueError)
        assert handle.held == 2
    assert handle.held == 0


def test_what_the_user_hooked_runs_inside_the_lease():
    net, handle, hook = hooked()
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append(("pre", handle.held)))
    net.register_forward_hook(lambda *_: seen.append(("post", handle.held)))
    net(X)
    assert seen == [("pre", 1), ("post", 1)]
    hook.remove()
    net(X)
    assert seen[2:] == [("pre", 0), ("post", 0)]


def test_threads_and_tasks_at_once():
    net, handle, _ = hooked()
    expected, wrong = net(X), []

    def use() -> None:
        async def task() -> None:
            for i in range(10):
                try:
                    found = net(X, fail=ValueError if i % 3 == 0 else None)
                    if not torch.equal(found, expected):
                        wrong.append(found)
                except ValueError:
                    await asyncio.sleep(0)

        async def main() -> None:
            await asyncio.gather(*(task() for _ in range(4)))

        asyncio.run(main())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, handle.held, min(net.seen)) == ([], 0, 1)


class Recursive(Net):
    def forward(self, x: torch.Tensor, n: int = 3) -> torch.Tensor:
        self.look()
        return self(self.first(x), n - 1) if n else x


def test_a_module_that_calls_itself():
    net, handle, _ = hooked(Recursive())
    net(X)
    assert (net.seen, handle.held) == ([1, 2, 3, 4], 0)


def test_the_time_a_call_waits_is_passed_on():
    net, handle, _ = hooked(timeout=1.5)
    net(X)
    assert handle.loads == [1.5]


def test_a_refusal_runs_nothing():
    net, handle, _ = hooked()
    handle.refuse = True
    with pytest.raises(LookupError):
        net(X)
    assert (net.seen, handle.held) == ([], 0)


class Streams(Net):
    def forward(self, x: torch.Tensor, kind: str) -> Any:
        return getattr(self, kind)(x)

    def steps(self, x: torch.Tensor) -> Any:
        try:
            for _ in range(3):
                self.look()
                x = self.first(x)
                yield x
        finally:
            self.look()
        return "end"

    async def awaited(self, x: torch.Tensor) -> torch.Tensor:
        self.look()
        await asyncio.sleep(0)
        self.look()
        return self.first(x)

    async def asteps(self, x: torch.Tensor) -> Any:
        for _ in range(3):
            self.look()
            sent = yield x
            if sent is not None:
                x = sent


def test_a_generator_holds_from_its_first_step_to_its_last():
    net, handle, _ = hooked(Streams())
    body = net(X, "steps")
    assert inspect.isgenerator(body)
    assert handle.held == 0
    next(body)
    assert handle.held == 1
    assert len(list(body)) == 2
    assert (handle.held, set(net.seen)) == (0, {1})
    body = net(X, "steps")
    next(body)
    with pytest.raises(KeyError):
        body.throw(KeyError("mine"))
    assert handle.held == 0
    body = net(X, "steps")
    next(body)
    del body  # nobody goes on with it
    gc.collect()
    assert (handle.held, set(net.seen)) == (0, {1})


def test_coroutines_and_async_generators_hold_while_they_run():
    net, handle, _ = hooked(Streams())
    with _C.Lease(handle.seat):  # there, as tasks may find it
        pass

    async def main() -> list[Any]:
        await net(X, "awaited")
        body = net(X, "asteps")
        got = [await anext(body), await body.asend(X + 1), await anext(body)]
        await body.aclose()
        return got

    got = asyncio.run(main())
    assert torch.equal(got[1], X + 1)
    assert (handle.held, set(net.seen)) == (0, {1})


# --- on and off ---


def test_the_module_is_untouched_but_for_its_dictionary():
    net = Net()
    before = dict(vars(net)), dict(vars(nn.Module)), dict(vars(Net))
    weights = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    _, _, hook = hooked(net)
    assert type(net) is Net
    assert net.forward == Net.forward.__get__(net)
    assert list(net.state_dict()) == list(Net().state_dict())
    assert weights == {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    assert repr(net) == repr(Net())
    hook.remove()
    assert (dict(vars(net)), dict(vars(nn.Module)), dict(vars(Net))) == before


def test_attached_twice_and_removed_twice():
    net, handle, hook = hooked()
    hook.attach()
    other = AutoManageHook(handle).attach()
    net(X)
    assert net.seen == [1]
    hook.remove()
    hook.remove()
    assert (hook.attached, other.attached) == (False, True)
    net(X)
    other.remove()
    net(X)
    other.remove()
    assert net.seen == [1, 1, 0]
    AutoManageHook(handle).attach()
    net(X)
    assert net.seen == [1, 1, 0, 1]


def test_a_hook_is_a_context_manager_and_one_a_module():
    net = Net()
    handle = HANDLES[id(net)] = Handle(net)
    with AutoManageHook(handle) as hook:
        net(X)
        assert hook.attached
    net(X)
    assert net.seen == [1, 0]
    one, two = (AutoManageHook.manage_module(handle) for _ in range(2))
    net(X)
    one.remove()
    assert not two.attached
    net(X)
    assert net.seen == [1, 0, 1, 0]


def test_others_who_hook_before_and_after():
    """As accelerate does: ``forward`` replaced on the instance, and put back later."""
    net = Net()
    calls = []

    def replace(name: str) -> Any:
        before = net.__dict__.get("forward", net.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return before(*args, **kwargs)

        net.forward = forward
        return before

    replace("before")
    _, handle, hook = hooked(net)
    theirs = replace("after")
    net(X)
    assert (calls, net.seen) == (["after", "before"], [1])
    hook.remove()
    net(X)
    assert (net.seen, handle.held) == ([1, 0], 0)
    net.forward = theirs
    net(X)
    assert calls == ["after", "before", "after", "before", "before"]


def test_accelerate_hooks_before_and_after():
    hooks = pytest.importorskip("accelerate.hooks")
    for first in (True, False):
        net = Net()
        expected = net(X)
        if first:
            hooks.add_hook_to_module(net, hooks.ModelHook())
        _, _handle, hook = hooked(net)
        if not first:
            hooks.add_hook_to_module(net, hooks.ModelHook())
        assert torch.equal(net(X), expected)
        assert net.seen == [1]
        if first:
            hook.remove()
            hooks.remove_hook_from_module(net)
        else:
            hooks.remove_hook_from_module(net)
            hook.remove()
        assert torch.equal(net(X), expected)
        assert net.seen == [1, 0]
        assert "_compiled_call_impl" not in vars(net)


def test_removed_while_a_call_runs():
    net, handle, hook = hooked()
    net.register_forward_pre_hook(lambda *_: hook.remove())
    net(X)
    net(X)
    assert (net.seen, handle.held) == ([1, 0], 0)


class OwnCall(Net):
    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


def test_a_class_with_a_call_of_its_own():
    net, handle, hook = hooked(OwnCall())
    net(X)
    assert (net.seen, handle.held) == ([1], 0)
    assert inspect.signature(net.forward) == inspect.signature(Net().forward)
    made = copy.deepcopy(net)
    assert "forward" in vars(made)
    hook.remove()
    assert "forward" not in vars(net)


def test_a_model_that_nobody_names_goes_at_once():
    net, _, hook = hooked(methods=("encode",))
    HANDLES.clear()
    dead = weakref.ref(net)
    gc.collect()
    gc.disable()
    try:
        net.__dict__.pop("seen")
        del net
        assert dead() is None
    finally:
        gc.enable()
    assert hook.module is None
    assert not hook.attached
    hook.remove()
    with pytest.raises(ReferenceError):
        hook.attach()
    assert _ is not None


def test_more_methods():
    net, handle, hook = hooked(methods=("encode",))
    net.encode(X)
    net(X)
    assert (net.seen, handle.held) == ([1, 1], 0)
    assert net.encode.__name__ == "encode"
    wrapped = net.encode
    net.encode = lambda x: wrapped(x).relu()  # somebody over ours
    hook.remove()
    net.encode(X)
    assert net.seen == [1, 1, 0]
    del net.encode
    net.encode(X)
    for wrong in (3, SimpleNamespace(obj=3), "text"):
        with pytest.raises(TypeError, match=r"nn\.Module"):
            AutoManageHook(wrong)
    with pytest.raises(TypeError, match="no_such"):
        AutoManageHook(net, methods=("no_such",))


def test_forward_itself_may_take_leases():
    net, _, hook = hooked(methods=("forward",))
    net.forward(X)
    net(X)
    assert net.seen == [1, 2]
    assert inspect.signature(net.forward) == inspect.signature(Net().forward)
    wrapped = functools.wraps(net.forward)(lambda *a: None)
    assert (wrapped.__name__, wrapped.__doc__) == ("forward", "What forward says.")
    hook.remove()
    assert "forward" not in vars(net)


# --- copies ---


class OwnCopy(Net):
    """Copies its dictionary before anybody knows of the copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = OwnCopy.__new__(OwnCopy)
        state = copy.deepcopy(self.__dict__, memo)
        made.__dict__.update(state)
        return made


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("kind", [Net, OwnCall])
def test_a_copy_is_its_own_model(how, kind):
    net = kind().eval()
    hooks = AutoManageHook(net, methods=("encode",)).attach()
    expected = net(X).clone()
    made = how(net)
    try:
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
        assert not made(X).any()
        assert not made.encode(X).any()
        assert torch.equal(net(X), expected)
        users = {id(entry) for entry in get_management().entries.values()}
        assert id(manage(made).entry) in users
        assert manage(made).entry is not manage(net).entry
        assert manage(made).entry.seat.leases == 0
        assert made.__dict__["_compiled_call_impl"].seat is manage(made).seat
        AutoManageHook(made).attach().remove()
        made(X)
    finally:
        hooks.remove()


def test_a_copy_that_a_class_makes_its_own_way():
    net, _, _ = hooked(OwnCopy(), methods=("encode",))
    made = copy.deepcopy(net)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert not made(X).any()
    assert not made.encode(X).any()
    assert not made.encode(X).any()
    assert net(X).any()
    again = copy.deepcopy(net)
    again.compile(backend="eager")
    with torch.no_grad():
        again.last.weight.zero_()
        again.last.bias.zero_()
    assert not again(X).any()


def test_copies_of_classes_that_pickle_themselves():
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    expected = net(X)
    hook = AutoManageHook(Handle(net)).attach()
    for how in (copy.deepcopy, by_pickle):
        made = how(net)
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
        assert not made(X).any()
        assert torch.equal(net(X), expected)
    hook.remove()


def test_a_shallow_copy_runs_its_own():
    net, _, _ = hooked()
    made = copy.copy(net)
    made.scale = 0.0
    assert not made(X).any()
    assert net(X).any()


def test_copies_of_a_removed_hook_are_plain():
    net, _, hook = hooked()
    hook.remove()
    assert vars(by_pickle(net)).keys() == vars(Net()).keys()
    assert vars(copy.deepcopy(net)).keys() == vars(Net()).keys()


# --- compiled ---


class Counting:
    """A backend that counts graphs and says how often the model is held while they run."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.graphs = handle, 0
        self.held: list[int] = []

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.held.append(self.handle.held)
            return graph.forward(*args)

        return run


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("when", ["before", "after", "in place before", "in place after"])
def test_a_compiled_module_stays_one_graph_inside_the_lease(when):
    net = Plain()
    expected = net(X)
    handle = Handle(net)
    backend = Counting(handle)
    run: Any = net
    how: dict[str, Any] = {"backend": backend, "fullgraph": True}
    if when == "in place before":
        net.compile(**how)
    elif when == "before":
        run = torch.compile(net, **how)
        handle = backend.handle = Handle(run)
    hook = AutoManageHook(handle).attach()
    if when == "in place after":
        net.compile(**how)
    elif when == "after":
        run = torch.compile(net, **how)
    for _ in range(3):
        assert torch.equal(run(X), expected)
    assert (backend.graphs, backend.held, handle.held) == (1, [1, 1, 1], 0)
    hook.remove()
    assert torch.equal(run(X), expected)
    assert (backend.held[3:], handle.held) == ([0], 0)
    assert backend.graphs <= 2


def test_compiled_inside_a_lease():
    net = Plain()
    handle = Handle(net)
    backend = Counting(handle)
    AutoManageHook(handle).attach()
    expected = net(X)
    with _C.Lease(handle.seat):
        compiled = torch.compile(lambda x: net(x) + 1, backend=backend, fullgraph=True)
        assert torch.equal(compiled(X), expected + 1)
    assert (backend.graphs, handle.held) == (1, 0)


def test_a_managed_part_of_what_is_compiled():
    net = Plain()
    handle = Handle(net)
    backend = Counting(handle)
    whole = nn.Sequential(net, nn.ReLU())
    AutoManageHook(handle).attach()
    compiled = torch.compile(whole, backend=backend, fullgraph=True)
    assert torch.equal(compiled(X), torch.relu(net(X)))
    assert (backend.graphs, handle.held) == (1, 0)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripting_tracing_and_export():
    net = Plain().eval()
    expected = net(X)
    handle = Handle(net)
    AutoManageHook(handle).attach()
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(net, X)(X), expected)
    assert torch.equal(torch.jit.script(net)(X), expected)
    graph = torch.fx.symbolic_trace(net)
    assert torch.equal(graph(X), expected)
    exported = torch.export.export(net, (X,))
    assert torch.equal(exported.module()(X), expected)
    assert torch.equal(torch.func.functional_call(net, dict(net.named_parameters()), X), expected)
    assert handle.held == 0


# --- inputs ---

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    n: int = 3


def test_inputs_move_at_any_depth():
    here = torch.ones(2)
    value = {
        "list": [here, (here, 3, "text")],
        "pair": Pair(here, None),
        "record": Record(here),
        "dict": collections.OrderedDict(k=here),
        "default": collections.defaultdict(list, k=here),
        "user": collections.UserDict(k=here),
        "size": torch.Size([2, 3]),
        "packed": pack_sequence([torch.ones(3), torch.ones(2)]),
    }
    before = copy.copy(value)
    moved = move_inputs(value, META)
    assert moved["list"][0].device.type == "meta"
    assert moved["list"][0] is moved["list"][1][0]
    assert moved["list"][1][1:] == (3, "text")
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].a.device.type == "meta"
    assert moved["pair"].b is None
    assert isinstance(moved["record"], Record)
    assert (moved["record"].x.device.type, moved["record"].n) == ("meta", 3)
    assert list(moved["dict"]) == ["k"]
    assert moved["default"].default_factory is list
    assert isinstance(moved["user"], collections.UserDict)
    for name in ("dict", "default", "user"):
        assert type(moved[name]) is type(value[name])
        assert moved[name]["k"].device.type == "meta"
        assert value[name]["k"] is here  # the caller's are as they were
    assert moved["size"] is value["size"]
    assert isinstance(moved["packed"], PackedSequence)
    assert moved["packed"].data.device.type == "meta"
    assert value == before
    assert value["list"][0] is here
    assert value["record"].x is here


def test_inputs_that_are_there_are_given_back_themselves():
    ring: list[Any] = [X]
    ring.append(ring)
    value = {"a": [X, (X, {"b": Record(X)})], "ring": ring, "net": Plain()}
    assert move_inputs(value, torch.device("cpu")) is value
    assert move_inputs(value, X.device) is value


def test_a_transformers_batch_is_not_changed():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"ids": X})
    moved = move_inputs(batch, META)
    assert isinstance(moved, transformers.BatchEncoding)
    assert moved["ids"].device.type == "meta"
    assert batch["ids"] is X


class Echo(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def test_a_call_moves_its_inputs_to_where_it_runs():
    net = Echo()
    handle = Handle(net, "meta")
    hook = AutoManageHook(handle).attach()
    (first, (second,)), named = net(X, (X,), y=[X])
    assert {t.device.type for t in (first, second, named["y"][0])} == {"meta"}
    hook.remove()
    (first, _), _ = net(X, (X,))
    assert first is X


def test_plain_inputs_that_are_there_are_looked_at_once(monkeypatch):
    """A call of which nothing has to move makes no memo and takes nothing apart."""
    move = input_mover(META)
    there = torch.ones(2, device="meta")
    monkeypatch.setattr(_inputs, "_move", lambda *given: pytest.fail("taken apart"))
    args, kwargs = (there, None, 3, there), {"y": there, "name": "text"}
    moved = move(args, kwargs)
    assert (moved[0] is args, moved[1] is kwargs) == (True, True)
    assert move(args, None) == (args, None)
    monkeypatch.undo()
    (first, second), named = move((there, X), {"y": [X]})
    assert first is there
    assert {t.device.type for t in (second, named["y"][0])} == {"meta"}
    assert move((), {"y": X})[1]["y"].device.type == "meta"


def test_no_accelerator_costs_no_move():
    if torch.accelerator.is_available():
        pytest.skip("inputs may be in two places here")
    assert input_mover(torch.device("cpu")) is None
    assert input_mover(META) is not None


# --- what it costs ---


def test_a_call_of_what_is_there_costs_less_than_a_microsecond():
    """A hook by torch's own pre and post hooks costs 2 to 4, with a context variable 21."""
    bare, net = (nn.Linear(4, 4).requires_grad_(False) for _ in range(2))
    handle = Handle(net)
    AutoManageHook(handle).attach()

    def time_of(run: Any) -> int:
        start = time.perf_counter_ns()
        for _ in range(200):
            run(X)
        return time.perf_counter_ns() - start

    more = 0.0
    for _ in range(5):  # a busy machine slows either
        both = [(time_of(bare), time_of(net)) for _ in range(60)]
        more = (min(b for _, b in both) - min(a for a, _ in both)) / 200
        if more < 1000:
            break
    assert more < 1000, f"{more:.0f} ns more a call"


# --- with the pools ---


def test_a_hooked_model_in_the_pools():
    net = Plain()
    expected = net(X).clone()
    with AutoManageHook(net):
        handle = manage(net)
        assert torch.equal(net(X), expected)
        assert handle.loaded
        with auto_manage(net), torch.no_grad():
            assert handle.seat.leases == 1
            assert torch.equal(net(X), expected)
        assert handle.seat.leases == 0
    assert torch.equal(net(X), expected)


@pytest.mark.slow
def test_nothing_leaks():
    script = Path(__file__).parent / "isolated" / "leak_pools.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
