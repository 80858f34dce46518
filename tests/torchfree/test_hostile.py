"""Every C entry point with arguments nobody would pass: a result or an exception, no crash.

With hypothesis where it is installed, else with a fixed set of the same values.
"""

from __future__ import annotations

import collections
import inspect
import random
import types

import fake_modes
import pytest
from fakes import FakeParameter, FakeTensor


class RaisingGetattr:
    def __getattr__(self, name):
        raise ZeroDivisionError(name)


class LyingLen(list):
    def __len__(self):
        return 1 << 40


class NegativeLen(dict):
    def __len__(self):
        return -5  # noqa: PLE0303


class GrowingIter(list):
    def __iter__(self):
        self.append(1)
        return super().__iter__()


class OddConstructor(list):
    def __init__(self, one, two, three):
        super().__init__([one, two, three])


class OddNew(dict):
    def __new__(cls, *args):
        if not args:
            raise KeyError("odd")
        return super().__new__(cls)


class NotItsClass:
    @property
    def __class__(self):
        return dict


class BadEq:
    __hash__ = object.__hash__

    def __eq__(self, other):
        raise OverflowError


class BadHash:
    def __hash__(self):
        raise OverflowError


class RaisingDict:
    @property
    def __dict__(self):
        raise ZeroDivisionError


class BadError(Exception):
    @property
    def args(self):
        raise ZeroDivisionError

    def __getattribute__(self, name):
        if name.startswith("__") and name != "__class__":
            raise ZeroDivisionError(name)
        return super().__getattribute__(name)


class BadTensor(FakeTensor):
    def detach(self):
        raise ZeroDivisionError

    @property
    def nbytes(self):
        return -1


class WrongTensor(FakeTensor):
    def detach(self):
        return "no tensor"


class BadModule(fake_modes.FakeModule):
    @property
    def training(self):
        raise ZeroDivisionError

    @training.setter
    def training(self, mode):
        pass

    def train(self, mode=True):
        raise ZeroDivisionError


def generator():
    yield FakeTensor(1)


def ring():
    made = {}
    made["me"] = [made]
    return made


MAKERS = [
    lambda: None, lambda: 0, lambda: -1, lambda: 2**70, lambda: 1.5, lambda: "text",
    lambda: b"\xff", lambda: "\ud800", lambda: (), lambda: [], dict, object, lambda: type,
    lambda: int, lambda: len,
    lambda: types.SimpleNamespace(t=FakeTensor(2)), generator, ring, RaisingGetattr, LyingLen,
    NegativeLen, lambda: GrowingIter([FakeTensor(1)]), lambda: OddConstructor(1, FakeTensor(2), 3),
    lambda: OddNew([]), NotItsClass, BadEq, lambda: {BadEq(): FakeTensor(1)}, BadHash, RaisingDict,
    lambda: BadError("x", FakeTensor(3)), lambda: BadTensor(2, requires_grad=True),
    lambda: WrongTensor(2, requires_grad=True), lambda: [WrongTensor(1, device="far")], BadModule,
    lambda: fake_modes.FakeModule(BadModule()), lambda: (fake_modes.FakeModule(),),
    lambda: (ValueError,), lambda: (ValueError, 3), lambda: ValueError("v", FakeTensor(1)),
    lambda: BaseExceptionGroup("g", [BadError(), KeyboardInterrupt()]), lambda: StopIteration(1),
    lambda: collections.deque([FakeTensor(1, requires_grad=True)], 1),
    lambda: (lambda *args, **kwargs: FakeTensor(1)), FakeParameter,
]  # fmt: skip

ORDINARY = (Exception, KeyboardInterrupt)


@pytest.fixture(scope="module")
def entries(C):
    """Every function and class of the module: names to callables."""
    fake_modes.bind(C)
    # What binds would change the module for the others; load_ops would open a library.
    left_out = {"bind_types", "bind_guards", "detach_bind", "load_ops", "register_detach"}
    names = [n for n in dir(C) if not n.startswith("__") and n not in left_out]
    assert {"detach", "sanitize_exception", "Guard", "guard_sanitize"} <= set(names)
    return {name: getattr(C, name) for name in names if callable(getattr(C, name))}


def provoke(entries, name, args):
    try:
        result = entries[name](*args)
    except SystemError:
        raise  # a result with an exception set, or neither: a fault of the C code
    except ORDINARY:
        return
    if name == "Guard":
        provoke_guard(result, args)


def provoke_guard(guard, args):
    """Enters it and calls everything it offers."""
    for use in (
        lambda: guard(*args),
        lambda: guard.run(*args[:3]),
        lambda: guard.run(args[0], tuple(args), {}),
        lambda: list(guard.step(args[0], True)),
        lambda: guard.step(generator(), args[0]).throw(*args[:1]),
        lambda: guard.__exit__(*args[:3]),
    ):
        try:
            use()
        except SystemError:
            raise
        except ORDINARY:
            pass
    try:
        with guard as g:
            g(*args)
    except SystemError:
        raise
    except ORDINARY:
        pass
    assert fake_modes.state() == (False, True)


def test_every_entry_point_with_single_values(entries):
    for name in entries:
        for make in MAKERS:
            provoke(entries, name, [make()])
            provoke(entries, name, [make(), make()])
    assert fake_modes.state() == (False, True)


def test_every_entry_point_with_many_values(entries):
    """Reproducible without hypothesis: the same seed, the same calls."""
    choose = random.Random(0)
    for name in entries:
        for _ in range(150):
            count = 8 if name == "Guard" and choose.random() < 0.8 else choose.randrange(6)
            args = [choose.choice(MAKERS)() for _ in range(count)]
            if name == "Guard" and count == 8 and choose.random() < 0.8:
                args[:2] = [choose.randrange(4), choose.randrange(32)]
                args[2] = choose.choice([None, (), (fake_modes.FakeModule(BadModule()),)])
                args[3] = choose.choice([None, (), ("cpu", None)])
                args[7] = choose.choice([None, (), (ValueError,)])
            provoke(entries, name, args)
    assert fake_modes.state() == (False, True)


def test_every_entry_point_under_hypothesis(entries):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    leaf = st.sampled_from(MAKERS).map(lambda make: make())
    value = st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        ),
        max_leaves=6,
    )

    @hypothesis.settings(max_examples=150, deadline=None, database=None)
    @hypothesis.given(st.sampled_from(sorted(entries)), st.lists(value, max_size=4))
    def check(name, args):
        provoke(entries, name, args)

    check()
    assert fake_modes.state() == (False, True)


def test_register_detach_with_hostile_values(C):
    for make in MAKERS:
        for other in MAKERS[:12]:
            kind, fn = make(), other()
            try:
                C.register_detach(kind, fn)
            except SystemError:
                raise
            except ORDINARY:
                continue
            C.register_detach(kind, None)


def test_signatures_are_told(entries):
    for name, entry in entries.items():
        if not name.endswith("Summary"):
            inspect.signature(entry)
