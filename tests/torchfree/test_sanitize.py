"""Sanitizing without torch: tracebacks, payloads and notes, with fake and hostile objects."""

from __future__ import annotations

import collections
import dataclasses
import gc
import os
import sys
import time
import traceback
import types
import weakref

import fakes
import pytest


@pytest.fixture(autouse=True)
def _bound(C):
    C.bind_types(fakes.FakeTensor, fakes.FakeParameter)


@pytest.fixture(autouse=True)
def _no_collector():
    """Nothing here may need the collector to be freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Guard:
    """The least a guard does: sanitize what leaves it."""

    def __init__(self, C, **options):
        self.C = C
        self.options = options

    def __enter__(self):
        self.handled = sys.exc_info()[1]
        return self

    def __exit__(self, kind, exc, trace):
        if exc is not None:
            self.C.sanitize_exit(exc, self.handled, self.options.get("keep", ()))


class Failure(Exception):
    pass


def fail(tensor, refs, kind=Failure):
    activation = fakes.FakeTensor(3, 4)
    refs.append(weakref.ref(activation))
    raise kind("inside")


def guarded(C, refs, kind=Failure):
    """The frame that holds the ``with`` has a tensor of its own."""
    tensor = fakes.FakeTensor(2, 3)
    refs.append(weakref.ref(tensor))
    with Guard(C):
        fail(tensor, refs, kind)


def caught(function, *args, kind=BaseException):
    try:
        function(*args)
    except kind as error:
        return error
    raise AssertionError("expected a failure")


def all_dead(refs):
    return [ref() for ref in refs] == [None] * len(refs)


# --- tracebacks and frames -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [Failure, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError]
)
def test_nothing_stays_alive_and_the_same_exception_goes_on(C, kind):
    refs = []
    made = []

    class Kind(kind):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    error = caught(guarded, C, refs, Kind)
    assert error is made[0]
    assert len(refs) == 2
    assert all_dead(refs)


def test_text_of_the_traceback_is_the_same(C):
    class Holder:
        def method(self, *args, flag=1, **rest):
            cell = [args]

            def inner(value):
                return cell[0] and [value / (item - item) for item in (flag, 2)]

            try:
                return inner(4)
            finally:
                del rest

    def module_level():
        exec(compile("x = 1\nHolder().method(1,\n  2)", "<cell>", "exec"), {"Holder": Holder})

    error = caught(module_level)
    whole = traceback.format_exception(error)
    entries = list(traceback.walk_tb(error.__traceback__))
    shape = [(f.f_code.co_name, f.f_code.co_qualname, f.f_code.co_filename) for f, _ in entries]
    spans = []
    at = error.__traceback__
    while at:
        spans.append((at.tb_lasti, at.tb_lineno, list(at.tb_frame.f_code.co_positions())))
        at = at.tb_next
    del entries, at
    C.sanitize_exception(error)
    assert traceback.format_exception(error) == whole
    at, after, names = error.__traceback__, [], []
    while at:
        code = at.tb_frame.f_code
        assert dict(at.tb_frame.f_locals) == {}
        assert at.tb_frame.f_back is None
        names.append((code.co_name, code.co_qualname, code.co_filename))
        positions = list(code.co_positions())
        # What stands behind the original's instructions says where it failed.
        assert positions[at.tb_frame.f_lasti // 2] == positions[at.tb_lasti // 2]
        assert at.tb_frame.f_lineno == positions[at.tb_lasti // 2][0]
        after.append((at.tb_lasti, at.tb_lineno, positions[:-2]))
        at = at.tb_next
    assert names == shape
    assert after == spans


def test_stale_snapshots_are_dropped(C):
    """Fault A1: a logger that read f_locals pins what clear() frees, also once contextlib has put
    the old traceback back."""
    refs = []

    def logged(tensor):
        try:
            fail(tensor, refs)
        except Failure as error:
            at = error.__traceback__
            while at:
                at.tb_frame.f_locals
                at = at.tb_next
            raise

    def run():
        tensor = fakes.FakeTensor(1)
        refs.append(weakref.ref(tensor))
        logged(tensor)

    error = caught(run)
    old = error.__traceback__
    C.sanitize_exception(error)
    error.__traceback__ = old
    assert len(refs) == 2
    assert all_dead(refs)


def test_a_kept_locals_dict_is_left_to_its_owner(C):
    kept = []

    def run():
        value = 5
        kept.append(locals())
        raise Failure(value)

    C.sanitize_exception(caught(run))
    assert kept[0]["value"] == 5


def test_with_frame_is_freed_while_it_runs(C):
    """Fault A2 and A3: user code failing inside the with, in the frame that holds it."""
    refs = []

    def run():
        tensor = fakes.FakeTensor(1)
        refs.append(weakref.ref(tensor))
        try:
            with Guard(C):
                raise Failure
        except Failure as error:
            del tensor
            assert all_dead(refs)
            return error

    assert isinstance(run(), Failure)


def test_contextmanager_around_a_guard_frees_what_lies_below(C):
    import contextlib

    refs = []

    @contextlib.contextmanager
    def wrapped():
        with Guard(C):
            yield

    def run():
        with wrapped():
            fail(None, refs)

    error = caught(run)
    assert all_dead(refs)
    assert [e.name for e in traceback.extract_tb(error.__traceback__)][-1] == "fail"


def test_chain_and_groups_are_walked(C):
    """Fault A6, and __cause__ and __context__ beside it."""
    refs = []

    def run():
        try:
            fail(None, refs)
        except Failure as first:
            try:
                fail(None, refs, ValueError)
            except ValueError:
                try:
                    fail(None, refs)
                except Failure as third:
                    raise ExceptionGroup("all", [first, ExceptionGroup("in", [third])]) from None

    error = caught(run)
    C.sanitize_exception(error)
    assert len(refs) == 3
    assert all_dead(refs)


def test_cycles_end(C):
    """Fault A8."""
    first, second = caught(fail, None, [], ValueError), caught(fail, None, [])
    first.__cause__, second.__cause__ = second, first
    first.__context__, second.__context__ = second, first
    assert C.sanitize_exception(first) is first
    first.__cause__ = first.__context__ = None


def chain(length):
    error = None
    for _ in range(length):
        try:
            raise Failure from error
        except Failure as made:
            made.__context__ = error
            error = made
    return error


def unchain(error):
    while error is not None:
        after = error.__cause__
        error.__cause__ = error.__context__ = None
        error = after


def test_long_chains_take_linear_time(C):
    """Fault A9: twice the length, about twice the time; 20,000 long."""
    spent = []
    for length in (10_000, 20_000):
        error = chain(length)
        begin = time.perf_counter()
        C.sanitize_exception(error)
        spent.append(time.perf_counter() - begin)
        unchain(error)
    assert spent[1] < 6 * spent[0] + 0.05


def test_what_the_caller_handles_is_left_alone(C):
    """Fault A10: its chain, tracebacks and tensors stay."""
    root = caught(fail, None, [], ValueError)
    tensor = fakes.FakeTensor(1)

    def run():
        local = tensor
        try:
            raise Failure(local) from root
        except Failure as handled:
            before = traceback.format_exception(handled)
            frames = [f for f, _ in traceback.walk_tb(root.__traceback__)]
            error = caught(guarded, C, [], KeyError)
            return (
                error.__context__ is handled
                and traceback.format_exception(handled) == before
                and [f for f, _ in traceback.walk_tb(root.__traceback__)] == frames
                and handled.args[0] is tensor
                and "activation" in frames[-1].f_locals
            )

    assert run()


def test_suspended_generators_go_on(C):
    """Fault A10: a generator whose frame is in the chain and that is suspended again."""

    def survivor():
        own = fakes.FakeTensor(1)
        try:
            yield 1
            raise Failure
        except Failure as error:
            yield error
            yield own

    it = survivor()
    next(it)
    error = next(it)
    C.sanitize_exception(error)
    assert isinstance(next(it), fakes.FakeTensor)


def test_a_generator_the_exception_went_through_is_freed(C):
    refs = []

    def through():
        own = fakes.FakeTensor(1)
        refs.append(weakref.ref(own))
        yield 1
        fail(own, refs)

    def run():
        for _ in through():
            pass

    C.sanitize_exception(caught(run))
    assert len(refs) == 2
    assert all_dead(refs)


def test_reraising_extends_the_empty_traceback(C):
    error = caught(guarded, C, [])

    def again():
        raise error

    with pytest.raises(Failure) as info:
        again()
    names = [e.name for e in traceback.extract_tb(info.value.__traceback__)]
    assert names[-4:] == ["again", "caught", "guarded", "fail"]


def test_hiding_locals_are_kept(C):
    def hidden():
        __tracebackhide__ = True
        _rich_traceback_omit = True
        raise Failure

    error = caught(hidden)
    C.sanitize_exception(error)
    frame = error.__traceback__.tb_next.tb_frame
    assert dict(frame.f_locals) == {"__tracebackhide__": True, "_rich_traceback_omit": True}


def test_keep_frames(C, monkeypatch):
    monkeypatch.setenv("OPGUARD_KEEP_FRAMES", "1")
    refs = []
    error = caught(guarded, C, refs)
    assert not any(ref() is None for ref in refs)
    assert not hasattr(error, "__notes__")


def test_many_code_objects(C):
    """More functions than the cache has room for, twice round."""
    functions = []
    for i in range(1500):
        space = {}
        exec(f"def f{i}(x):\n    raise ValueError(x)", space)
        functions.append(space[f"f{i}"])
    for function in functions * 2:
        error = caught(function, 1)
        C.sanitize_exception(error)
        assert error.__traceback__.tb_next.tb_frame.f_code.co_name == function.__name__


def test_every_place_of_a_function(C):
    """Each offset of a long function: the empty frame stands at the same line and columns."""
    text = "    if x == {0}:\n        y = [x +\n             {0}, '{1}', f(x)(\n\n x, *x, **y)]\n"
    body = "".join(text.format(i, "é" * (i % 90)) for i in range(120))
    space = {}
    exec(compile(f"def f(x):\n{body}    raise KeyError(x)", "<long>", "exec"), space)
    frame = caught(space["f"], -1).__traceback__.tb_next.tb_frame
    positions = list(frame.f_code.co_positions())
    for unit in [*range(0, len(positions), 7), len(positions) - 1]:
        error = Failure().with_traceback(types.TracebackType(None, frame, 2 * unit, 5))
        C.sanitize_exception(error)
        empty = error.__traceback__.tb_frame
        assert error.__traceback__.tb_lasti == 2 * unit
        assert list(empty.f_code.co_positions())[empty.f_lasti // 2] == positions[unit]
        assert empty.f_lineno == positions[unit][0]


# --- the note --------------------------------------------------------------------------------


def notes(error):
    return getattr(error, "__notes__", [])


def test_note_tells_tensors_and_no_other_value(C):
    """Fault A11: shapes, dtypes and devices stay readable; secrets never get in."""

    def inner(x, api_key):
        near = [fakes.FakeTensor(5), "hunter2"]
        table = {"hunter2": fakes.FakeTensor(7, device="cuda:0")}
        raise Failure(len(near), len(table))

    def run():
        outer = fakes.FakeTensor(2, 3)
        with Guard(C):
            inner(outer, "hunter2")

    (note,) = notes(caught(run))
    assert "hunter2" not in note
    assert note.splitlines()[1:] == [
        "  in inner (test_sanitize.py):",
        "    x: [2, 3] float32 cpu, 24 bytes",
        "    near[0]: [5] float32 cpu, 20 bytes",
        "    table[0]: [7] float32 cuda:0, 28 bytes",
        "  in run (test_sanitize.py):",
        "    outer: [2, 3] float32 cpu, 24 bytes",
    ]


def test_note_is_one_under_nested_guards(C):
    def inner():
        deep = fakes.FakeTensor(1)
        with Guard(C):
            raise Failure(deep)

    def middle():
        between = fakes.FakeTensor(2)
        with Guard(C), Guard(C):
            inner()
        del between

    def run():
        with Guard(C):
            middle()

    error = caught(run)
    (note,) = notes(error)
    assert [note.count(name) for name in ("deep:", "between:")] == [1, 1]
    C.sanitize_exception(error)
    C.sanitize_exception(error)
    assert notes(error) == [note]


def test_note_is_bounded(C):
    names = ", ".join(f"a_rather_long_name_of_a_tensor_{i:03}" for i in range(200))
    space = {"make": lambda: [fakes.FakeTensor(*[1000] * 10) for _ in range(200)], "F": Failure}
    exec(f"def run():\n    {names} = make()\n    raise F", space)
    error = caught(space["run"])
    C.sanitize_exception(error)
    (note,) = notes(error)
    assert len(note.encode()) <= 4096
    assert note.count("\n    a_rather") <= 32
    assert note.endswith("and more tensors than are listed")
    error2 = caught(space["run"])
    error2.__notes__ = notes(error)[:]
    C.sanitize_exception(error2)
    assert notes(error2) == [note]


def test_note_joins_the_users_own(C):
    error = caught(guarded, C, [])
    other = Failure()
    other.add_note("mine")
    other.__traceback__ = None
    C.sanitize_exception(other)
    assert notes(other) == ["mine"]
    assert len(notes(error)) == 1


@pytest.mark.parametrize("odd", [None, 3, ("a",), "text", {"a": 1}])
def test_notes_that_are_no_list_stay(C, odd):
    def run():
        tensor = fakes.FakeTensor(1)
        error = Failure()
        error.__notes__ = odd
        raise error from (tensor and None)

    error = caught(run)
    C.sanitize_exception(error)
    assert error.__notes__ == odd


def test_no_tensors_no_note(C):
    assert notes(C.sanitize_exception(caught(lambda: 1 / 0))) == []


# --- the payload -----------------------------------------------------------------------------


def summary(value):
    return type(value).__name__ == "TensorSummary" and tuple(value)


def test_args_become_summaries_and_containers_copies(C):
    """Fault A7."""
    tensor = fakes.FakeTensor(2, 3)
    own = [tensor, {"k": (tensor, 1)}, {tensor}, frozenset([tensor])]
    error = Failure(tensor, own, "text")
    C.sanitize_exception(error)
    assert summary(error.args[0]) == ((2, 3), "fake.float32", "cpu")
    assert error.args[0] is error.args[1][0] is error.args[1][1]["k"][0]
    assert error.args[1] is not own
    assert own[0] is tensor
    assert own[1]["k"][0] is tensor
    assert [type(x) for x in error.args[1][2:]] == [set, frozenset]
    assert error.args[2] == "text"


def test_attributes_slots_and_c_members(C):
    """Fault A7: AttributeError.obj and its like, slots, plain attributes."""
    tensor = fakes.FakeTensor(2)

    class Slotted(Exception):
        __slots__ = ("inner", "unset")

    slotted = Slotted()
    slotted.inner = [tensor]
    slotted.plain = tensor
    attribute = caught(lambda held=tensor: held.nope)
    found = [
        (slotted, lambda e: e.inner[0]),
        (slotted, lambda e: e.plain),
        (attribute, lambda e: e.obj),
        (StopIteration(tensor), lambda e: e.value),
        (SystemExit(tensor), lambda e: e.code),
        (ImportError("x", name=tensor), lambda e: e.name),
        (OSError(1, tensor, tensor), lambda e: e.filename),
    ]
    for error, get in found:
        C.sanitize_exception(error)
        assert summary(get(error)), error
    ref = weakref.ref(tensor)
    del tensor, found[:]
    assert ref() is None


def test_untouched_payloads_keep_their_identity(C):
    own = [1, {"a": (2, "b")}]
    error = Failure(own)
    error.detail = own
    args = error.args
    C.sanitize_exception(error)
    assert error.args is args
    assert error.detail is own


def test_keep(C):
    tensor = fakes.FakeTensor(1)
    for kept in (Failure(tensor), type("Sub", (Failure,), {})(tensor)):
        C.sanitize_exception(kept, None, (Failure,))
        assert kept.args[0] is tensor
    other = ValueError(tensor)
    C.sanitize_exception(other, None, (Failure,))
    assert summary(other.args[0])


def test_types_of_containers_are_kept(C):
    Point = collections.namedtuple("Point", "x y")

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        x: object
        y: int

    @dataclasses.dataclass(slots=True)
    class Slots:
        x: object
        y: int

    class Named(list):
        pass

    class Ordered(collections.OrderedDict):
        def __setitem__(self, key, value):
            raise RuntimeError("not called")

    t = fakes.FakeTensor(1)
    named = Named([t])
    named.extra = t
    ordered = Ordered()
    collections.OrderedDict.__setitem__(ordered, "a", t)
    values = [
        (Point(t, 1), lambda v: v.x),
        (Frozen(t, 1), lambda v: v.x),
        (Slots(t, 1), lambda v: v.x),
        (named, lambda v: v[0]),
        (named, lambda v: v.extra),
        (ordered, lambda v: next(iter(v.items()))[1]),
        (collections.deque([t]), lambda v: v[0]),
        (collections.defaultdict(list, a=t), lambda v: v["a"]),
        (types.SimpleNamespace(a=t, b=2), lambda v: v.a),
    ]
    for value, get in values:
        error = Failure(value)
        C.sanitize_exception(error)
        assert type(error.args[0]) is type(value)
        assert error.args[0] is not value
        assert summary(get(error.args[0])), value
        assert get(value) is t


def test_objects_that_hold_tensors_become_named_summaries(C):
    class Model:
        def __init__(self):
            self.parts = {"weight": fakes.FakeParameter()}

        def forward(self):
            raise Failure(self)

    model = Model()
    ref = weakref.ref(model)
    error = caught(lambda model=model: model.nope)
    bound = Failure(model.forward, lambda model=model: model)
    C.sanitize_exception(error)
    C.sanitize_exception(bound)
    assert type(error.obj).__name__ == "ObjectSummary"
    assert error.obj.type.endswith("Model")
    del model
    assert ref() is None
    plain = Failure(object(), os, len)
    before = plain.args
    C.sanitize_exception(plain)
    assert plain.args is before


def test_cyclic_and_deep_payloads(C):
    t = fakes.FakeTensor(1)
    loop = [t]
    loop.append((loop, {"k": loop}))
    deep = [t]
    for i in range(100_000):
        deep = [deep] if i % 2 else (deep,)
    error = Failure(loop, deep)
    C.sanitize_exception(error)
    copy = error.args[0]
    assert summary(copy[0])
    assert copy[1][0] is copy
    assert copy[1][1]["k"] is copy
    assert loop[1][0] is loop
    assert loop[0] is t
    at = error.args[1]
    while type(at) in (list, tuple):
        at = at[0]
    assert summary(at)


def test_exceptions_and_tracebacks_in_the_payload(C):
    refs = []
    inner = caught(fail, None, refs)
    outer = Failure(inner)
    second = caught(fail, None, refs)
    outer.info = (type(second), second, second.__traceback__)
    third = caught(fail, None, refs)
    outer.trace = third.__traceback__
    del second, third
    C.sanitize_exception(outer)
    assert outer.args[0] is inner
    assert isinstance(outer.trace, types.TracebackType)
    assert len(refs) == 3
    assert all_dead(refs)


# --- hostile objects -------------------------------------------------------------------------


class Bad(Exception):
    pass


class HostileTensor(fakes.FakeTensor):
    def __getattribute__(self, name):
        raise Bad(name)


class HostileError(Exception):
    def __init__(self, needed, *, other):
        super().__init__(needed)

    @property
    def args(self):
        raise Bad("args")

    @property
    def __dict__(self):
        raise Bad("dict")

    @property
    def __class__(self):
        raise Bad("class")

    @property
    def __traceback__(self):
        raise Bad("traceback")

    def __getattribute__(self, name):
        raise Bad(name)

    def __setattr__(self, name, value):
        raise Bad(name)


def test_hostile_objects_do_not_mask_or_crash(C):
    def run():
        hostile = HostileTensor(1)
        raise HostileError([hostile], other=1)

    with pytest.raises(HostileError) as info, Guard(C):
        run()
    (value,) = BaseException.args.__get__(info.value)
    assert tuple(value[0]) == (None, None, None)
    (note,) = object_dict(info.value)["__notes__"]
    assert "hostile: [?] ? ?" in note


def object_dict(error):
    """The instance's dict, past the property that raises."""
    return next(d for d in gc.get_referents(error) if type(d) is dict)


def test_hostile_containers(C):
    t = fakes.FakeTensor(1)

    class L(list):
        def __iter__(self):
            raise Bad

        def __len__(self):
            return 10**9

        def __getitem__(self, at):
            raise Bad

    class D(dict):
        def keys(self):
            raise Bad

        def items(self):
            raise Bad

        def __init__(self):
            raise Bad

    class S(set):
        def __iter__(self):
            raise Bad

    class N(tuple):
        def __new__(cls, needed, more):
            return tuple.__new__(cls, (needed, more))

    class Key:
        def __init__(self):
            self.calm = True

        def __hash__(self):
            if not self.calm:
                raise Bad
            return 1

    d = D.__new__(D)
    dict.__setitem__(d, "k", t)
    key = Key()
    keyed = {key: t, "b": t}
    key.calm = False
    error = Failure(L([t]), d, S([t]), N(t, t), keyed)
    C.sanitize_exception(error)
    a, b, c, n, k = error.args
    assert summary(list.__getitem__(a, 0))
    assert summary(dict.__getitem__(b, "k"))
    assert len(c) == 1
    assert type(n) is N
    assert summary(n[1])
    assert summary(k["b"])


def test_payload_changed_during_the_walk(C):
    victim = []

    class Evil(fakes.FakeTensor):
        @property
        def shape(self):
            victim.clear()
            error.args = ()
            error.__dict__.clear()
            error.__cause__ = None
            return (1,)

        @shape.setter
        def shape(self, value):
            pass

    victim.extend([Evil(1), [Evil(1)], {"a": Evil(1)}])
    error = Failure(victim)
    error.more = victim
    error.__cause__ = Failure(Evil(1))
    assert C.sanitize_exception(error) is error


def test_bad_arguments_are_one_sentence(C):
    for args in ((1,), (Failure,), (Failure(), None, [Failure]), (Failure(), None, (int,))):
        with pytest.raises(TypeError, match=r"expected .* got .*; "):
            C.sanitize_exception(*args)


def test_an_exception_that_is_set_stays_set(C):
    """The walk runs Python code that raises; the caller's own state must not see it."""

    def run():
        try:
            raise Failure("mine")
        finally:
            C.sanitize_exception(ValueError(HostileTensor(1)))

    with pytest.raises(Failure, match="mine"):
        run()


def test_random_payloads(C):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    leaf = st.one_of(
        st.integers(), st.text(), st.none(), st.builds(fakes.FakeTensor, st.integers(0, 3))
    )
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.text(max_size=2), inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
            st.lists(inner, max_size=3).map(collections.deque),
        ),
        max_leaves=20,
    )

    def expected(value):
        if isinstance(value, fakes.FakeTensor):
            return (value.shape, value.dtype, value.device)
        if isinstance(value, dict):
            return {k: expected(v) for k, v in value.items()}
        if isinstance(value, list | tuple | collections.deque):
            return type(value)(expected(v) for v in value)
        return value

    @hypothesis.settings(max_examples=25, deadline=None, database=None)
    @hypothesis.given(tree)
    def check(value):
        before = expected(value)
        error = Failure(value)
        error.more = value
        C.sanitize_exception(error)
        assert error.args[0] == before
        assert error.more is error.args[0]
        assert expected(value) == before

    check()


def test_a_forged_note_that_fills_the_buffer(C):
    """A note of nearly 4 KiB that starts like ours once wrote past the buffer's end."""

    def told():
        activation = fakes.FakeTensor(3, 4)
        raise Failure(str(activation.shape))

    try:
        told()
    except Failure as error:
        C.sanitize_exception(error)
        (note,) = error.__notes__
    head = note.split("\n")[0]
    for size in range(4000, 4100, 3):
        try:
            told()
        except Failure as error:
            error.add_note(head + "x" * (size - len(head)))
            C.sanitize_exception(error)
            assert all(len(text) <= 4096 + 64 for text in error.__notes__)


def test_a_running_frame_with_a_code_as_its_trace_is_not_cleared(C):
    """f_trace may be any object; a code there once made a running frame look finished."""
    kept = ["alive"]
    frame = sys._getframe()
    frame.f_trace = frame.f_code
    try:
        try:
            raise Failure
        except Failure as error:
            C.sanitize_exception(error)
    finally:
        frame.f_trace = None
    assert kept == ["alive"]
