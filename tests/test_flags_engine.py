"""The short road of the flag functions: that it is taken, and that it is left where it must be."""

from __future__ import annotations

import enum
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opguard import _C
from opguard.flags import (
    BatchMismatchError,
    CodeError,
    ErrorCode,
    ErrorConfig,
    FlagsError,
    FlagsLayoutError,
    LocationError,
    SeverityError,
    _engine,
    _traced,
)

KEY = ErrorConfig().key
DTYPES = (torch.int64, torch.int32, torch.float64, torch.float32)
LONG = (
    *("check", "check_", "index", "push", "push_", "merge", "merge_", "find", "is_ok", "is_err"),
    *("count", "max_severity", "new", "read", "read_all", "gather"),
)


@contextmanager
def long_road(replacement: Callable[..., Any]) -> Iterator[None]:
    """Every function of the long road is ``replacement(name)`` meanwhile."""
    try:
        _C.flags_bind(**{name: replacement(name) for name in LONG})
        yield
    finally:
        _C.flags_bind(**{name: getattr(_traced, name) for name in LONG})


def refuse(name: str) -> Callable[..., Any]:
    def taken(*args: Any) -> Any:
        raise AssertionError(f"{name} left the short road for {args}")

    return taken


@contextmanager
def long_calls() -> Iterator[list[str]]:
    calls: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        def taken(*args: Any) -> Any:
            calls.append(name)
            return getattr(_traced, name)(*args)

        return taken

    with long_road(noting):
        yield calls


def data(samples: int = 6) -> torch.Tensor:
    x = torch.arange(samples * 5, dtype=torch.float32).reshape(samples, 5)
    x[1, 2] = float("nan")
    x[3, 0] = float("inf")
    x[4, 4] = float("-inf")
    return x


def some_flags(key: int = KEY) -> torch.Tensor:
    return _traced.check(data(), 3, None, 7, key)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# --- it is taken ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 16, 37])
def test_the_short_road_gives_what_the_ops_give(dtype, slots):
    key = ErrorConfig(num_slots=slots, flag_dtype=dtype).key
    x, f, where = data(), some_flags(key), torch.arange(6) % 2 == 0
    g = _traced.push(f, where, 9, 4, None, key)
    ids = torch.tensor([[0, 1], [2, 3], [-1, 0], [9, 9], [10, 0], [5, 5]])
    calls = {
        "check": [(x, 8, f, 7, key), (x, None, None, 3, key), (x.t(), 8, None, 7, key)],
        "index": [(ids, 10, 8, f, key), (ids, 10, 8, None, key)],
        "push": [
            (f, where, 9, 8, None, key),
            (f, None, 9, 8, 1, key),
            (f, where, 15, 8, None, key, 3),
        ],
        "merge": [((f, g), key), ([g, f, f], key)],
        "gather": [(g, ids % 7 - 1, key), (g, ids[:, 0].int() % 6, key), (g, ids[:0], key)],
        "find": [(f, 0x3C, 4)],
        **{name: [(f,)] for name in ("is_ok", "is_err", "count", "max_severity", "read_all")},
        "new": [(6, None, key), (0, None, key)],
        "read": [(g, 1), (g, -2)],
    }
    for name, arguments in calls.items():
        for args in arguments:
            expected = getattr(_traced, name)(*args)
            with long_road(refuse):
                got = getattr(_engine, name)(*args)
            if isinstance(expected, torch.Tensor):
                assert same(got, expected), name
            else:
                assert got == expected, name


def test_in_place_functions_write_into_what_they_return():
    where = torch.arange(6) < 3
    for name, more in (
        ("check_", lambda f: (data(), 9, f, 7, KEY)),
        ("push_", lambda f: (f, where, 13, 9, None, KEY)),
        ("merge_", lambda f: (f, _traced.check(data(), 9, None, 7, KEY), KEY)),
    ):
        expected = getattr(_traced, name)(*more(some_flags()))
        f = some_flags()
        with long_road(refuse):
            assert getattr(_engine, name)(*more(f)) is f
        assert same(f, expected)
        assert not same(f, some_flags())


def test_other_functions_leave_their_flags_alone():
    f, x = some_flags(), data()
    before = f.clone()
    _engine.check(x, 9, f, 7, KEY)
    _engine.push(f, None, 9, 9, None, KEY)
    _engine.merge((f, f), KEY)
    assert same(f, before)


@pytest.mark.parametrize("code", range(16))
def test_severities_of_codes_are_the_tables(code):
    f = _engine.new(1, None, KEY)
    with long_road(refuse):
        for default in (1, 2, 3):
            pushed = _engine.read(_engine.push(f, None, code, 1, None, KEY, default), 0)
            severity = ErrorCode.default_severity(code, default)
            assert pushed == ([(severity, code, 1)] if code and severity else [])


def test_a_parameter_an_inference_tensor_and_a_scalar_go_the_short_road():
    with long_road(refuse):
        p = torch.nn.Parameter(data())
        assert same(_engine.check(p, 3, None, 7, KEY), some_flags())
        with torch.inference_mode():
            f = _engine.check(data(), 3, None, 7, KEY)
            assert f.is_inference()
            assert same(_engine.check_(data(), 3, f, 7, KEY), some_flags())
        assert _engine.read(_engine.check(torch.tensor(float("nan")), 2, None, 7, KEY), 0) == [
            (3, 1, 2)
        ]


def test_results_are_ordinary_tensors():
    f = _engine.check(data(), 3, None, 7, KEY)
    assert type(f) is torch.Tensor
    assert f.data_ptr() % 64 == 0
    assert f.is_contiguous()
    assert not f.requires_grad
    view = f[1:]
    expected = view.clone()
    del f
    gc.collect()
    assert same(view, expected)  # the memory lives as long as a view of it


def test_without_a_dlpack_exchange_torch_makes_the_tensors():
    try:
        _C.flags_bind(exchange=None)
        with long_road(refuse):
            assert same(_engine.check(data(), 3, None, 7, KEY), some_flags())
            assert _engine.is_ok(some_flags()).tolist() == [True, False, True, False, False, True]
    finally:
        _C.flags_bind(exchange=torch.Tensor.__dlpack_c_exchange_api__)


def test_a_torch_that_lacks_a_question_takes_the_long_road():
    try:
        _C.flags_bind(functorch=None)
        with long_calls() as calls:
            assert same(_engine.check(data(), 3, None, 7, KEY), some_flags())
        assert calls == ["check"]
    finally:
        _C.flags_bind(functorch=torch._C._are_functorch_transforms_active)


# --- it is left -----------------------------------------------------------------------------------


class Sub(torch.Tensor):
    pass


def test_subclasses_fakes_and_meta_tensors_leave_it():
    with long_calls() as calls:
        assert same(
            _engine.check(data().as_subclass(Sub), 3, None, 7, KEY).as_subclass(torch.Tensor),
            some_flags(),
        )
        meta = _engine.check(torch.empty(6, 5, device="meta"), 3, None, 7, KEY)
        assert (meta.shape, meta.device.type) == ((6, 4), "meta")
        with FakeTensorMode() as mode:
            fake = _engine.check(torch.empty(6, 5), 3, None, 7, KEY)
            assert fake.shape == (6, 4)
            assert fake.fake_mode is mode
        assert _engine.check(fake, 3, None, 7, KEY).shape == (6, 4)
    assert calls == ["check"] * 4
    assert same(_engine.check(data(), 3, None, 7, KEY), some_flags())  # nothing is poisoned


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunction])
def test_modes_see_the_ops(mode):
    x = data()
    with mode() as seen:
        f = _engine.check(x, 3, None, 7, KEY)
        _engine.push_(f, None, 9, 3, None, KEY)
    assert any("flags_check_new" in name for name in seen.names)
    assert any("flags_push_all_" in name for name in seen.names)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_functorch_functionalize_and_tracing_are_right():
    x, expected = data(), some_flags()
    batched = torch.vmap(lambda row: _engine.check(row, 3, None, 7, KEY), in_dims=0)
    assert same(batched(x.unsqueeze(1)).squeeze(1), expected)

    def loss(values):
        f = _engine.check(values, 3, None, 7, KEY)
        return (values * (~_engine.is_err(f)).unsqueeze(1)).nan_to_num(0, 0, 0).sum()

    gradient = torch.func.grad(loss)(torch.ones(6, 5))
    assert torch.equal(gradient, torch.ones(6, 5))
    functional = torch.func.functionalize(lambda v: _engine.check(v, 3, None, 7, KEY))
    assert same(functional(x), expected)
    graph = make_fx(lambda v: _engine.check(v, 3, None, 7, KEY))(x)
    assert "opguard.flags_check_new" in graph.code
    assert same(graph(x), expected)
    traced = torch.jit.trace(lambda v: _engine.check(v, 3, None, 7, KEY), (x,))
    assert "opguard::flags_check_new" in str(traced.graph)
    assert same(traced(x), expected)


def test_a_default_device_is_heeded():
    with torch.device("meta"):
        assert _engine.new(3, None, KEY).device.type == "meta"
    assert _engine.new(3, None, KEY).device.type == "cpu"


# --- bad input ------------------------------------------------------------------------------------

F = some_flags()
BAD = {
    "location": (LocationError, "check_", (data(), 1024, F, 7, KEY)),
    "huge location": (LocationError, "check_", (data(), 1 << 80, F, 7, KEY)),
    "negative location": (LocationError, "push_", (F, None, 1, -1, None, KEY)),
    "code": (CodeError, "push_", (F, None, 16, 1, None, KEY)),
    "severity": (SeverityError, "push_", (F, None, 1, 1, 4, KEY)),
    "batch": (BatchMismatchError, "check_", (data(5), 1, F, 7, KEY)),
    "broadcast": (BatchMismatchError, "check_", (data()[1:2], 1, F, 7, KEY)),
    "mask": (BatchMismatchError, "push_", (F, torch.ones(5, dtype=torch.bool), 1, 1, None, KEY)),
    "float mask": (FlagsError, "push_", (F, torch.ones(6), 1, 1, None, KEY)),
    "1-D flags": (FlagsLayoutError, "check_", (data(), 1, F[0], 7, KEY)),
    "no words": (FlagsLayoutError, "is_ok", (F[:, :0],)),
    "dtype": (FlagsLayoutError, "find", (F.to(torch.int16), 0x3C, 4)),
    "capacity": (FlagsLayoutError, "merge", ((F, F[:, :2]), KEY)),
    "batches": (BatchMismatchError, "merge_", (F, F[:2], KEY)),
    "nothing": (FlagsError, "merge", ((), KEY)),
    "row": (FlagsError, "read", (F, 6)),
    "row to gather": (FlagsError, "gather", (F, torch.tensor([6]), KEY)),
    "index of rows": (FlagsError, "gather", (F, torch.zeros(6), KEY)),
    "3-D index": (FlagsError, "gather", (F, torch.zeros(1, 1, 1).long(), KEY)),
    "list of rows": (FlagsError, "gather", (F, [1, 2], KEY)),
    "name of a code": (CodeError, "push_", (F, None, "NAN", 1, None, KEY)),
    "half a code": (CodeError, "push", (F, None, 1.5, 1, None, KEY)),
    "codes": (CodeError, "push", (F, None, torch.tensor([1, 2]), 1, None, KEY)),
    "name of a severity": (SeverityError, "push_", (F, None, 1, 1, "WARN", KEY)),
    "list of flags": (FlagsLayoutError, "is_ok", ([0, 0],)),
    "list for a mask": (FlagsError, "push_", (F, [True] * 6, 1, 1, None, KEY)),
    "size below 0": (FlagsError, "index", (torch.zeros(6).long(), -1, 1, F, KEY)),
    "half a size": (FlagsError, "index_clamp", (torch.zeros(6).long(), 2.5, 1, None, KEY)),
    "list of values": (TypeError, "check", ([1.0], 1, None, 7, KEY)),
    "array of values": (TypeError, "check_", (data().numpy(), 1, F, 7, KEY)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case):
    kind, name, args = BAD[case]
    before = F.clone()
    with pytest.raises(kind) as caught:
        getattr(_engine, name)(*args)
    assert str(caught.value).startswith("expected ")
    assert "\n" not in str(caught.value)
    assert same(F, before)


@pytest.mark.parametrize("args", [(), (1,), (data(), 1, None, 7, KEY, 9, 9), (data(), 1, None, 7)])
def test_a_wrong_number_of_arguments_is_a_type_error(args):
    with pytest.raises(TypeError):
        _C.flags_check(*args)


@pytest.mark.parametrize("junk", [None, 3, "x", [1], object(), torch.Tensor])
def test_what_is_no_tensor_is_refused(junk):
    for name, args in (
        ("flags_check", (junk, 1, None, 7, KEY)),
        ("flags_check_", (data(), 1, junk, 7, KEY)),
        ("flags_find", (junk, 60, 4)),
        ("flags_merge", ((F, junk), KEY)),
        ("flags_gather", (F, junk, KEY)),
        ("flags_gather", (junk, torch.tensor([0]), KEY)),
        ("flags_read", (junk, 0)),
        ("flags_out_check", (junk, data(), 1, 7)),
    ):
        with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError)):
            getattr(_C, name)(*args)
    with pytest.raises(RuntimeError):
        _C.flags_out_check_new(data(), 1, 7, KEY, out=junk)


# --- locations ------------------------------------------------------------------------------------


class Place(enum.IntEnum):
    HERE = 77


class Raising:
    def __getattribute__(self, name):
        raise RuntimeError(f"asked for {name}")


def place(location: Any) -> int:
    ((_, _, found),) = _engine.read(
        _engine.push(_engine.new(1, None, KEY), None, 1, location, 3, KEY), 0
    )
    return found


def test_modules_names_and_int_subclasses_are_resolved():
    from opguard.flags import ErrorLocation, tracked

    @tracked
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

    model = Model()
    with long_road(refuse):
        assert ErrorLocation.name(place(model.inner)) == "inner"
        assert ErrorLocation.name(place("by name")) == "by name"
        assert place(None) == 0
    assert place(Place.HERE) == 77
    kept = model.inner.__dict__["_opguard_location"]
    for stale in [(0, 5), (kept[0] - 1, 5), (kept[0],), "junk", None, (kept[0], 5000), ("a", "b")]:
        model.inner.__dict__["_opguard_location"] = stale
        try:
            found = place(model.inner)
        except (LocationError, TypeError, IndexError):
            continue
        assert ErrorLocation.name(found) == "inner" or found in {kept[1], 0}
    model.inner.__dict__["_opguard_location"] = kept
    assert place(model.inner) == kept[1]
    del model.inner.__dict__["_opguard_location"]
    assert ErrorLocation.name(place(model.inner)) == "inner"


@pytest.mark.parametrize("junk", [Raising, object, float, bytes, list])
def test_what_names_no_place_is_refused(junk):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        place(junk())


def test_epochs_are_ints():
    for junk in ("x", 1.5, None):
        with pytest.raises(TypeError):
            _C.flags_epoch(junk)
    with pytest.raises(OverflowError):
        _C.flags_epoch(1 << 70)
    with pytest.raises(TypeError, match="got 'nobody'"):
        _C.flags_bind(nobody=1)
    with pytest.raises(TypeError):
        _C.flags_bind(1)


# --- reading --------------------------------------------------------------------------------------


def test_reading_into_a_class_of_ones_own():
    from opguard.flags.inspection import UnpackedError

    def name_of(location: int) -> str:
        return f"at {location}"

    how = (UnpackedError, ("OK", "W", "E", "C"), tuple(map(str, range(16))), name_of)
    f = some_flags()
    with long_road(refuse):
        assert _engine.read(f, 1, how) == [UnpackedError(3, 1, 3, "C", "1", "at 3")]
        assert [len(errors) for errors in _engine.read_all(f, how)] == [0, 1, 0, 1, 1, 0]
        assert type(_engine.read(f, 1, how)[0]) is UnpackedError

    def fails(location: int) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _engine.read(f, 1, (*how[:3], fails))
    for junk in [(1, 2), (int, *how[1:]), (UnpackedError, (), *how[2:])]:
        with pytest.raises((TypeError, ValueError, IndexError)):
            _C.flags_read(f, 1, junk)


# --- under Inductor -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_inductor_calls_the_c_functions_and_copies_nothing():
    from torch._inductor.utils import run_and_get_code

    def step(x, where):
        x = torch.relu(x)
        f = _engine.check(x, 3, None, 7, KEY)
        f = _engine.check(x * 2, 4, f, 7, KEY)
        g = _engine.push(f, where, 9, 5, None, KEY)
        return x, _engine.merge((g, f), KEY)

    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        compiled = torch.compile(step, fullgraph=True, dynamic=True)
        where = torch.arange(6) % 2 == 0
        (_, f), (code,) = run_and_get_code(compiled, data(), where)
    for name in ("check_new", "check", "push", "merge"):
        assert f"torch.ops.opguard.core.flags_out_{name}(" in code
        assert f"torch.ops.opguard.flags_{name}.default(" not in code
    assert same(f, step(data(), where)[1])
    with torch.no_grad():
        assert same(
            compiled(data(9), torch.ones(9, dtype=torch.bool))[1],
            step(data(9), torch.ones(9, dtype=torch.bool))[1],
        )


# --- threads and leaks ----------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other():
    big = torch.zeros(64, 4096)
    big[7, 7] = float("nan")
    errors: list[BaseException] = []

    def work(location: int) -> None:
        try:
            for _ in range(50):
                f = _engine.check(big, location, None, 7, KEY)
                assert _engine.read(_engine.check_(big, location, f, 7, KEY), 7) == [
                    (3, 1, location)
                ]
                assert int(_engine.is_err(f).sum()) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_no_reference_is_kept_or_lost():
    x, f, where = data(), some_flags(), torch.arange(6) % 2 == 0
    g = some_flags()

    class Odd:
        pass

    def once() -> None:
        _engine.check(x, 3, f, 7, KEY)
        _engine.check_(x, 3, g, 7, KEY)
        _engine.push(f, where, 9, 900, None, KEY)
        _engine.merge([f, g], KEY)
        _engine.max_severity(f)
        _engine.read_all(f)
        with pytest.raises(TypeError):
            _engine.check(x, Odd(), f, 7, KEY)
        with pytest.raises(BatchMismatchError):
            _engine.check(x[1:], 3, f, 7, KEY)

    watched = [x, f, g, where, KEY, _traced.check, None]
    for _ in range(20):
        once()
    gc.collect()
    counts, blocks = [sys.getrefcount(one) for one in watched[:4]], sys.getallocatedblocks()
    for _ in range(200):
        once()
    gc.collect()
    assert [sys.getrefcount(one) for one in watched[:4]] == counts
    assert sys.getallocatedblocks() - blocks < 100
