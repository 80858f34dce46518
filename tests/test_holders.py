"""who_holds names the variable, attribute, frame or exception, and keeps nothing alive."""

import gc
import sys
import threading
import types
import weakref

import pytest
import torch

from opguard.holders import who_holds

SIZE = 3 << 20


def big(scale=1):
    return torch.zeros(SIZE * scale, dtype=torch.uint8)


def chain_of(tensor, **settings):
    """The chain of the storage with this tensor's bytes; each test uses a size of its own."""
    wanted = tensor.untyped_storage().nbytes() if isinstance(tensor, torch.Tensor) else tensor
    report = who_holds("cpu", **settings)
    found = [holder for holder in report.holders if holder.size == wanted]
    assert len(found) == 1, str(report)
    return found[0]


class Net(torch.nn.Module):
    def __init__(self, numel):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"fc": torch.nn.Module()})
        self.inner["fc"].weight = torch.nn.Parameter(torch.zeros(numel))
        self.inner["fc"].register_buffer("table", torch.zeros(numel + 1))


@pytest.fixture
def module():
    made = types.ModuleType("some_module")
    sys.modules["some_module"] = made
    yield made
    del sys.modules["some_module"]


def test_local_of_a_running_function():
    mine = big()
    holder = chain_of(mine)
    assert holder.chain.startswith(
        "local mine of test_local_of_a_running_function() (test_holders.py:"
    )
    assert holder.what == f"Tensor uint8 ({SIZE},)"
    assert holder.tensors == 1


def test_module_global(module):
    module.kept = big(2)
    assert chain_of(2 * SIZE).chain == "module some_module: kept"


def test_attribute_path_of_a_model(module):
    module.model = Net(SIZE)
    assert chain_of(4 * SIZE).chain == "module some_module: model.inner.fc.weight"
    assert chain_of(4 * (SIZE + 1)).chain == "module some_module: model.inner.fc.table"


def test_a_crowd_of_referrers_does_not_hide_another_storage(module):
    module.model = Net(SIZE + 2)
    gc.collect()  # the model is old then, and referrers are told youngest first
    crowded, crowd = big(6), []
    for _ in range(600):
        one = [crowded]
        for _ in range(8):
            one = [one]
        crowd.append(one)
    module.crowd = crowd
    del crowded, one
    assert chain_of(4 * (SIZE + 3)).chain == "module some_module: model.inner.fc.table"


def test_containers_slots_and_classes(module):
    class Slotted:
        __slots__ = ("held",)

    module.box = {"a": [0, (big(3),)]}
    assert chain_of(3 * SIZE).chain == "module some_module: box['a'][1][0]"
    module.box = Slotted()
    module.box.held = big(3)
    assert chain_of(3 * SIZE).chain == "module some_module: box.held"
    module.box = types.SimpleNamespace(deep=types.SimpleNamespace(held=big(3)))
    assert chain_of(3 * SIZE).chain == "module some_module: box.deep.held"
    module.box = None

    class Owner:
        table = big(3)

    assert chain_of(3 * SIZE).chain.startswith("local Owner of test_containers_slots_and_classes()")
    assert chain_of(3 * SIZE).chain.endswith(".table")
    module.cls = Owner
    del Owner
    assert chain_of(3 * SIZE).chain == f"class {module.cls.__qualname__}.table"


def test_exception_and_the_frame_it_keeps(module):
    def fails():
        activation = big(5)
        raise ValueError(activation.numel())

    try:
        fails()
    except ValueError as error:
        module.last = error
    chain = chain_of(5 * SIZE).chain
    assert chain.startswith("module some_module: last (exception ValueError)")
    assert "-> local activation of" in chain
    assert "fails() (test_holders.py:" in chain
    module.last = None


def test_suspended_generator_and_closure(module):
    def numbers():
        held = big(6)
        yield
        assert held is not None

    module.running = numbers()
    next(module.running)
    assert "module some_module: running (suspended " in chain_of(6 * SIZE).chain
    module.running = None

    def make():
        held = big(6)
        return lambda: held

    module.hook = make()
    assert "module some_module: hook (closure or default of " in chain_of(6 * SIZE).chain


def test_other_threads_are_looked_at():
    ready, done = threading.Event(), threading.Event()

    def work():
        inside = big(7)
        ready.set()
        done.wait(20)
        assert inside is not None

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(20)
    try:
        assert chain_of(7 * SIZE).chain.startswith("local inside of ")
    finally:
        done.set()
        thread.join()


def test_views_share_a_storage_and_count_once():
    base = big(8)
    views = [base[:10], base.view(2, -1)]
    holder = chain_of(base)
    assert holder.tensors == 1 + len(views)
    assert holder.what.startswith("Tensor uint8")


def test_gradients_are_named_by_their_parameter(module):
    module.weight = torch.nn.Parameter(torch.zeros(SIZE * 9))
    (module.weight * 2).sum().backward()
    report = who_holds("cpu")
    chains = [holder.chain for holder in report.holders if holder.size == 36 * SIZE]
    assert sorted(chains) == ["module some_module: weight", "module some_module: weight.grad"]


def test_nothing_is_kept_alive():
    """Neither the report nor a snapshot of any frame's locals holds what was seen."""
    gc.collect()
    mine = big(10)
    box = [mine]
    ref = weakref.ref(mine)
    for _ in range(3):
        report = who_holds("cpu")
    assert ref() is not None
    box.clear()
    del mine
    assert ref() is None
    assert any(holder.size == 10 * SIZE for holder in report.holders)


def test_a_snapshot_of_the_users_is_left_alone():
    mine = big(11)
    mine_too = locals()
    who_holds("cpu")
    assert mine_too["mine"] is mine


def test_report_is_sorted_limited_and_printable():
    held = [big(20 + index) for index in range(5)]
    report = who_holds("cpu", limit=3)
    sizes = [holder.size for holder in report.holders]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 3
    text = str(report)
    assert text.splitlines()[0].startswith("cpu: ")
    assert "MiB  Tensor uint8" in text
    assert "smaller storages" in text
    assert report.size >= sum(tensor.nbytes for tensor in held)
    assert report.elsewhere == 0


def test_an_accelerator_that_is_not_there_holds_nothing():
    report = who_holds("xpu:0")
    assert (report.size, report.storages, report.holders) == (0, 0, ())
    assert str(report) == "xpu:0: 0 B in 0 storages"


def test_hostile_objects_are_passed_over(module):
    class Hostile:
        def __getattribute__(self, name):
            raise SystemExit(name)

        def __repr__(self):
            raise SystemExit("repr")

        def __eq__(self, other):
            raise SystemExit("eq")

        __hash__ = object.__hash__

    hostile = Hostile()
    object.__setattr__(hostile, "held", big(12))
    module.hostile = {hostile: [hostile]}
    assert "Hostile" in chain_of(12 * SIZE).chain or ".held" in chain_of(12 * SIZE).chain


def test_bad_arguments_are_one_sentence():
    with pytest.raises(ValueError, match="limit: expected an int from 0 up, got -1"):
        who_holds("cpu", limit=-1)
    with pytest.raises(ValueError, match="device: expected a device torch knows"):
        who_holds("gpu")


def test_fake_tensors_hold_no_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(1 << 20))
    assert fake.device.type == "cpu"
    before = who_holds("cpu").size  # must not warn: warnings are errors here
    del fake
    assert who_holds("cpu").size == before
