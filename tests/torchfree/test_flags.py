"""The flag functions where there is no torch: every call is handed to the function bound for it."""

from __future__ import annotations

import enum
import sys

import pytest
from fakes import FakeTensor

NAMES = (
    *("check", "check_", "index", "push", "push_", "merge", "merge_", "find", "is_ok", "is_err"),
    *("count", "max_severity", "new", "read", "read_all"),
)


@pytest.fixture
def calls(C):
    made = []
    C.flags_bind(**{name: lambda *args, name=name: made.append((name, args)) for name in NAMES})
    try:
        yield made
    finally:
        C.flags_bind(**dict.fromkeys((*NAMES, "resolve"), None))
        C.flags_epoch(0)


class Place(enum.IntEnum):
    HERE = 7


class Refusing:
    def __getattribute__(self, name):
        raise ZeroDivisionError(name)


class Slotted:
    __slots__ = ()


def placed(value):
    class Module:
        pass

    module = Module()
    module._opguard_location = value
    return module


def test_arguments_arrive_as_they_came(C, calls):
    t = FakeTensor(2, 3)
    given = {
        "check": (t, 5, None, 7, 16),
        "check_": (t, None, t, 7, 16),
        "index": (t, 9, 5, t, 16),
        "push": (t, t, 1, 5, None, 16),
        "push_": (t, None, 15, 5, 3, 16, 2),
        "merge": ([t, t], 16),
        "merge_": (t, t, 16),
        "find": (t, 60, 4),
        "new": (3, None, 16),
        "read": (t, 0, None),
        "read_all": (t, None),
        **dict.fromkeys(("is_ok", "is_err", "count", "max_severity"), (t,)),
    }
    for name, args in given.items():
        assert getattr(C, f"flags_{name}")(*args) is None
        assert calls[-1] == (name, args)
        assert all(a is b for a, b in zip(calls[-1][1], args, strict=True))


def test_wrong_arguments_are_for_the_bound_function_to_refuse(C, calls):
    t = FakeTensor(2)
    for args in ((), (t,), (t,) * 40, (t, 1 << 99, t, "x", []), (t, True, t, 7, 16)):
        C.flags_check(*args)
        assert calls[-1] == ("check", args)
    for junk in ([], [t] * 40, None, {}, (t,)):
        C.flags_merge(junk, 16)
        assert calls[-1] == ("merge", (junk, 16))
    for junk in (1, (1, 2, 3, 4), (int, (), (), len), (tuple, ("",) * 4, ("",) * 16, len)):
        C.flags_read(t, 0, junk)
        assert calls[-1] == ("read", (t, 0, junk))


def test_hostile_locations(C, calls):
    asked = []
    C.flags_bind(resolve=lambda place: asked.append(place) or 5)
    C.flags_epoch(9)
    t = FakeTensor(2)
    values = [(9, 3), (9, 4000), (8, 3), (9,), ("x", 3), (9, "x"), [9, 3], None, (1 << 90, 1)]
    for location in ([placed(v) for v in values], [Slotted(), t, "name", 1.5, placed, type, Place]):
        for one in location:
            C.flags_check(t, one, None, 7, 16)
            assert calls[-1][1][1] is one
    assert len(asked) >= len(values) - 2  # all but those that know their place
    C.flags_push(t, None, 1, Place.HERE, None, 16)  # an int of a kind of its own
    assert calls[-1][0] == "push"

    def fails(place):
        raise KeyError(place)

    C.flags_bind(resolve=fails)
    with pytest.raises(KeyError):
        C.flags_check(t, Refusing(), None, 7, 16)
    with pytest.raises(KeyError):
        C.flags_push_(t, None, 1, "name", None, 16)


def test_a_bound_function_may_bind_another(C, calls):
    def replacing(*args):
        C.flags_bind(check=None)
        return len(args)

    C.flags_bind(check=replacing)
    before = sys.getrefcount(replacing)
    assert C.flags_check(1, 2, 3) == 3
    assert sys.getrefcount(replacing) == before - 1
    with pytest.raises(RuntimeError, match=r"import opguard\.flags"):
        C.flags_check(1, 2, 3)


def test_parts_and_epochs_are_checked(C):
    for junk in ("x", 1.5, None, []):
        with pytest.raises(TypeError):
            C.flags_epoch(junk)
    with pytest.raises(OverflowError):
        C.flags_epoch(1 << 64)
    with pytest.raises(TypeError, match="got 'nobody'"):
        C.flags_bind(nobody=1)
    with pytest.raises(TypeError, match="by name only"):
        C.flags_bind(1)
    C.flags_bind(exchange="not a capsule")
    C.flags_bind(exchange=None)


def test_what_compiled_code_calls_needs_the_ops(C):
    t = FakeTensor(2)
    for name, count in (
        ("check", 5),
        ("check_new", 4),
        ("index", 5),
        ("index_new", 4),
        ("push", 4),
        ("push_all", 3),
        ("merge", 3),
        ("chain", 2),
    ):
        function = getattr(C, f"flags_out_{name}")
        for args in ((), (t,) * count, (t,) * 40):
            with pytest.raises(RuntimeError):
                function(*args, out=t)
            with pytest.raises(RuntimeError):
                function(*args)
