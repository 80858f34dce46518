# ruff: noqa: F821 - names of dimensions are no forward references
"""What @tensorcheck checks, what it finds, and where it records it."""

import asyncio
import dataclasses
import logging
import pickle
import sys
import threading
import weakref
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import late_annotations
from opguard.flags import (
    Err,
    ErrorLocation,
    Ok,
    Result,
    _provenance,
    err,
    flags,
    push,
    resolve_location,
    tensorcheck,
    tracked,
)
from opguard.flags.config import ErrorConfig, get_config, set_config
from opguard.flags.errors import CodeError
from opguard.flags.typing import (
    DimensionMismatchError,
    DTypeMismatchError,
    InvalidParameterError,
    InvalidReturnTypeError,
    Tensor,
    TypeMismatchError,
    ValidationError,
    error_t,
    float32_t,
    int64_t,
)

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _fresh():
    before = get_config()
    yield
    set_config(before)


def errors_of(f) -> list[set[str]]:
    return [{e.code_name for e in row} for row in flags.unpack_all(f)]


def bad() -> torch.Tensor:
    return torch.tensor([[1.0, 2.0], [NAN, 1.0], [INF, 1.0], [-INF, NAN]])


FOUND = [set(), {"NAN"}, {"INF"}, {"NAN", "INF"}]


def both_ways(fn):
    return fn, torch.compile(fn, backend="aot_eager", fullgraph=True)


# --- detection ------------------------------------------------------------------------------------


def test_the_documented_model():
    @tracked
    class SafeModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        @tensorcheck
        def forward(self, x):
            f = err.new(x)
            out = self.layer(x)
            return out, f

        @tensorcheck(auto_detect={err.NAN})
        def nan_only(self, x):
            f = err.new(x)
            return self.layer(x), f

        @tensorcheck(auto_detect=False)
        def no_detect(self, x):
            f = err.new(x)
            return self.layer(x), f

    model = SafeModel()
    for run in both_ways(model):
        out, f = run(bad())
        assert errors_of(f) == FOUND
        assert torch.equal(out.isnan(), bad().isnan())
        here = {ErrorLocation.name(resolve_location(model))}
        assert {e.location_name for row in flags.unpack_all(f) for e in row} == here
    for run in both_ways(model.nan_only):
        assert errors_of(run(bad())[1]) == [found - {"INF"} for found in FOUND]
    assert errors_of(model.no_detect(bad())[1]) == [set()] * 4
    for nothing in (None, False, ()):
        assert not err.any_err(tensorcheck(auto_detect=nothing)(model.no_detect)(bad())[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_every_carrier(dtype):
    set_config(ErrorConfig(flag_dtype=dtype))

    @tensorcheck
    def fn(x):
        f = err.new(x)
        return x * 1, f

    for run in both_ways(fn):
        f = run(bad())[1]
        assert f.dtype is dtype
        assert errors_of(f) == FOUND


def test_features_are_not_taken_for_flags():
    @tensorcheck
    def features(x):
        return x * 1, torch.zeros(4, 4, dtype=torch.long)

    @tensorcheck
    def both(x):
        f = err.new(x)
        f = push(f, err.OVERFLOW, "here")
        return x * 1, f, torch.zeros(4, 4, dtype=torch.long)

    for run in both_ways(features):
        assert not run(bad())[1].any()
    for run in both_ways(both):
        _, f, counts = run(bad())
        assert not counts.any()
        assert errors_of(f) == [{"OVERFLOW"} | found for found in FOUND]


def test_float_features_are_looked_through_and_not_written_into():
    set_config(ErrorConfig(flag_dtype=torch.float32))

    @tensorcheck
    def fn(x):
        f = err.new(x)
        return torch.full((4, 8), NAN), f

    for run in both_ways(fn):
        x, f = run(bad())
        assert x.isnan().all()
        assert errors_of(f) == [{"NAN"}] * 4


Pair = namedtuple("Pair", "flags out")


@dataclasses.dataclass
class Output:
    flags: torch.Tensor
    out: torch.Tensor


LAYOUTS = {
    "first": lambda x, f: (f, x),
    "middle": lambda x, f: (x, f, x.sum(1)),
    "list": lambda x, f: [x, f],
    "dict": lambda x, f: {"out": x, "flags": f},
    "ordered": lambda x, f: OrderedDict(out=x, flags=f),
    "nested": lambda x, f: {"a": [{"h": x}, (x, {"deep": f})], "n": 3, "none": None},
    "named": lambda x, f: Pair(f, x),
    "dataclass": lambda x, f: Output(f, x),
    "cloned": lambda x, f: (x, f.clone()),
    "joined": lambda x, f: (x, torch.where(torch.ones(4, 1, dtype=torch.bool), f, f)),
}


def find_flags(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.dtype is torch.int64 else []
    if dataclasses.is_dataclass(value):
        return find_flags(value.flags)
    parts = value.values() if isinstance(value, dict) else value
    return [
        f for v in parts if isinstance(v, torch.Tensor | list | tuple | dict) for f in find_flags(v)
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_flags_are_found_wherever_they_are(name):
    layout = LAYOUTS[name]

    @tensorcheck
    def fn(x):
        f = err.new(x)
        return layout(x * 1, f)

    plain = layout(bad(), err.new(bad()))
    ways = both_ways(fn) if name in ("nested", "first", "cloned", "named", "dict") else [fn]
    for run in ways:
        result = run(bad())
        (f,) = find_flags(result)
        assert errors_of(f) == FOUND
        assert type(result) is type(plain)


def test_annotated_flags_need_no_history():
    @tensorcheck
    def fn(x, f) -> tuple[Tensor[float32_t], Tensor[error_t, ("N", "words")]]:
        return x * 1, f * 1

    given = err.new(bad())
    for run in both_ways(fn):
        assert errors_of(run(bad(), given)[1]) == FOUND
    assert not given.any()
    assert errors_of(late_annotations.flagged(bad(), given)["flags"]) == [set()] * 4


def test_flags_given_and_returned_are_not_written_into():
    @tensorcheck
    def fn(x, f):
        f = push(f, err.OVERFLOW, 3)
        return x * 1, f

    given = err.new(bad())
    assert errors_of(fn(bad(), given)[1]) == [{"OVERFLOW"} | found for found in FOUND]
    assert not given.any()


def test_flags_that_cannot_be_told_are_logged_once(caplog):
    @tensorcheck
    def fn(x, f):
        return x * 1, f

    with caplog.at_level(logging.WARNING, "opguard.flags"):
        for _ in range(2):
            fn(bad(), err.new(bad()))
    assert [r for r in caplog.messages if "error_t" in r] == caplog.messages[:1] != []


def test_checked_modules_inside_checked_modules():
    @tensorcheck
    def inner(x):
        f = err.new(x)
        return x * 1, f

    @tensorcheck
    def outer(x):
        out, f = inner(x)
        return out.nan_to_num() + torch.tensor([[INF], [0], [0], [0]]), f

    for run in both_ways(outer):
        assert errors_of(run(bad())[1]) == [{"INF"}, {"NAN"}, {"INF"}, {"NAN", "INF"}]


def test_scalars_and_other_batches_count_for_every_sample():
    @tensorcheck
    def fn(x):
        f = err.new(x)
        return x.sum(), f

    @tensorcheck
    def single(x):
        f = err.new(x)
        return x * 1, f

    for run in both_ways(fn):
        loss, f = run(bad())
        assert loss.dim() == 0
        assert errors_of(f) == [{"NAN"}] * 4
        assert errors_of(run(torch.ones(4, 2))[1]) == [set()] * 4
    assert errors_of(single(torch.tensor(NAN))[1]) == [{"NAN"}]
    assert fn(torch.ones(0, 2))[1].shape[0] == 0


def test_complex_half_and_integer_outputs():
    @tensorcheck
    def fn(x):
        f = err.new(x)
        return x.to(torch.complex64), torch.arange(4), f

    @tensorcheck
    def half(x):
        f = err.new(x)
        return x.to(torch.bfloat16), f

    assert errors_of(fn(bad())[2]) == FOUND
    assert errors_of(half(bad())[1]) == FOUND


@pytest.mark.parametrize("codes", [{err.ZERO_OUTPUT}, [err.NAN, 99], {"NAN"}])
def test_codes_that_cannot_be_detected(codes):
    with pytest.raises(CodeError, match=r"err\.NAN and err\.INF"):
        tensorcheck(auto_detect=codes)


def test_what_can_be_decorated():
    class Thing:
        @tensorcheck
        @staticmethod
        def static(x):
            f = err.new(x)
            return x * 1, f

        @staticmethod
        @tensorcheck
        def other(x):
            f = err.new(x)
            return x * 1, f

        @tensorcheck()
        @classmethod
        def of_class(cls, x):
            f = err.new(x)
            return x * 1, f

    for fn in (Thing.static, Thing.other, Thing().of_class):
        f = fn(bad())[1]
        assert errors_of(f) == FOUND
        assert flags.unpack(f, 1)[0].location_name == fn.__name__
    for bad_target in (Thing, 3, nn.Linear):
        with pytest.raises(TypeError, match="function or method"):
            tensorcheck(bad_target)

    @tensorcheck
    def documented(x):
        """Text."""

    assert (documented.__name__, documented.__doc__) == ("documented", "Text.")


def test_async_methods_interleaved():
    @tensorcheck
    async def fn(x, wait) -> tuple[Tensor[float32_t, ("N", 2)], Tensor[error_t]]:
        f = err.new(x)
        await asyncio.sleep(wait)
        return x * 1, f

    @tensorcheck
    async def plain(x, wait):
        f = err.new(x)
        await asyncio.sleep(wait)
        return x * 1, f

    async def main():
        return await asyncio.gather(
            fn(bad(), 0.02), plain(bad(), 0.01), plain(bad(), 0.03), plain(bad(), 0)
        )

    for _, f in asyncio.run(main()):
        assert errors_of(f) == FOUND
    with pytest.raises(DimensionMismatchError):
        asyncio.run(fn(torch.ones(4, 3), 0))


def test_calls_that_overlap_for_ever_keep_no_tensors():
    @tensorcheck
    async def fn(x):
        f = err.new(x)
        made.append(weakref.ref(f))
        await asyncio.sleep(0.01)
        return x * 1, f

    async def serve():
        last = None
        for _ in range(20):  # there is always one under way, as in a server that is never idle
            task = asyncio.create_task(fn(bad()))
            await asyncio.sleep(0.006)
            if last is not None:
                assert errors_of((await last)[1]) == FOUND
            last = task
            alive.append(sum(f() is not None for f in made))
        await last

    made, alive = [], []
    asyncio.run(serve())
    assert max(alive) <= 3
    assert not _provenance._asking


def test_a_task_notes_for_the_call_that_began_it_as_long_as_that_runs():
    async def branch(x, wait):
        await asyncio.sleep(wait)
        return err.new(x)

    @tensorcheck
    async def fn(x):
        late.append(asyncio.create_task(branch(x, 0.02)))
        return x * 1, await asyncio.create_task(branch(x, 0))

    async def main():
        _, f = await fn(bad())
        assert errors_of(await late[0]) == [set()] * 4
        return f

    late = []
    assert errors_of(asyncio.run(main())) == FOUND


def test_a_coroutine_may_end_in_another_thread():
    @tensorcheck
    async def fn(x):
        f = err.new(x)
        await asyncio.sleep(0)
        return x * 1, f

    def end():
        try:
            coroutine.send(None)
        except StopIteration as stop:
            ended.append(errors_of(stop.value[1]))

    ended = []
    coroutine = fn(bad())
    coroutine.send(None)
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert ended == [FOUND]
    _provenance._asker.set(None)  # this thread never saw the end
    assert not _provenance._asking


def test_what_yields_is_refused():
    def each(x):
        yield x, err.new(x)

    async def each_later(x):
        yield x, err.new(x)

    for fn in (each, each_later):
        with pytest.raises(TypeError, match="yields them; decorate what makes each value"):
            tensorcheck(fn)
    values, f = next(tensorcheck(auto_detect=False)(each)(bad()))
    assert errors_of(f) == [set()] * 4
    assert values.shape == (4, 2)


def test_a_broken_graph_does_not_pass_for_nothing_found(caplog):
    @tensorcheck
    def plain(x):
        f = err.new(x)
        torch._dynamo.graph_break()
        return x * 1, f

    @tensorcheck
    def annotated(x) -> tuple[Tensor[float32_t], Tensor[error_t]]:
        f = err.new(x)
        torch._dynamo.graph_break()
        return x * 1, f

    with caplog.at_level(logging.WARNING, "opguard.flags"):
        assert errors_of(torch.compile(annotated, backend="eager")(bad())[1]) == FOUND
        assert not caplog.messages
        torch.compile(plain, backend="eager")(bad())
    (said,) = caplog.messages
    assert "nothing was looked for; annotate it as Tensor[error_t, ...]" in said


def test_threads_do_not_see_each_other():
    @tensorcheck
    def fn(x):
        f = err.new(x)
        return x * 1, f

    wrong = []

    def work():
        for _ in range(200):
            if errors_of(fn(bad())[1]) != FOUND:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not _provenance._asking


def test_nothing_is_kept_after_an_exception():
    @tensorcheck
    def fn(x):
        err.new(x)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        fn(bad())
    assert not _provenance._asking
    assert _provenance._asker.get() is None


# With strict=True torch says so of the list in which the flag functions note their results, which
# is as empty after the call as before.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    class Model(nn.Module):
        @tensorcheck
        def forward(self, x):
            f = err.new(x)
            return x * 1, f

    program = torch.export.export(Model(), (torch.ones(4, 2),), strict=strict)
    assert errors_of(program.module()(bad())[1]) == FOUND


def test_each_function_has_a_compile_cache_of_its_own():
    def one(n):
        @tensorcheck
        def fn(x):
            f = err.new(x)
            return x * n, f

        return fn

    for n in range(12):  # Dynamo's limit is 8 a code object
        run = torch.compile(one(n), backend="eager", fullgraph=True)
        assert errors_of(run(bad())[1])[1] == {"NAN"}


def test_a_method_of_an_untracked_module_records_its_class():
    class Untracked(nn.Module):
        @tensorcheck
        def forward(self, x):
            f = err.new(x)
            return x * 1, f

    for run in both_ways(Untracked()):
        assert flags.unpack(run(bad())[1], 1)[0].location_name == "Untracked"


def test_gradients_pass():
    @tensorcheck
    def fn(x):
        f = err.new(x)
        return x * 2, f

    x = torch.ones(4, 2, requires_grad=True)
    for run in both_ways(fn):
        x.grad = None
        run(x)[0].sum().backward()
        assert torch.equal(x.grad, torch.full((4, 2), 2.0))


# --- checking -------------------------------------------------------------------------------------


class Layer(nn.Module):
    in_features = 4

    @tensorcheck
    def forward(
        self, x: Tensor[float32_t, ("N", 4)], y: Tensor[int64_t, ("N",)] | None = None
    ) -> Tensor[float32_t, ("N", 4)]:
        return x

    @tensorcheck
    def narrow(self, x: Tensor[float32_t, ("N", 4)]) -> Tensor[float32_t, ("N", 3)]:
        return x

    @tensorcheck
    def two(self, x) -> tuple[Tensor[float32_t, ("N", 3)], Tensor[int64_t]]:
        return x, x


def test_one_argument_raises_the_error_of_its_kind():
    layer = Layer()
    with pytest.raises(DTypeMismatchError, match=r"float32, got torch\.int64") as caught:
        layer(torch.zeros(2, 4, dtype=torch.int64))
    error = caught.value
    assert isinstance(error, InvalidParameterError)
    assert not isinstance(error, DimensionMismatchError)
    assert (error.parameter, error.function, error.num_errors) == ("x", "forward", 1)
    assert (error.expected, error.actual) == (torch.float32, torch.int64)
    with pytest.raises(DimensionMismatchError, match="dimension 1 of x to be 4, got 5"):
        layer(torch.zeros(2, 5))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.errors) == (type(error), str(error), error.errors)


def test_several_arguments_raise_one_error_with_all():
    with pytest.raises(InvalidParameterError, match=r"x to be 4.*y in torch\.int64") as caught:
        Layer()(torch.zeros(2, 5), torch.zeros(2))
    error = caught.value
    assert isinstance(error, DTypeMismatchError)
    assert isinstance(error, DimensionMismatchError)
    assert error.num_errors == 2
    assert [type(e) for e in error.errors] == [DimensionMismatchError, DTypeMismatchError]


def test_returned_values():
    with pytest.raises(DimensionMismatchError, match="returned value"):
        Layer().narrow(torch.zeros(2, 4))
    with pytest.raises(TypeMismatchError) as caught:
        Layer().two(torch.zeros(2, 4))
    assert isinstance(caught.value, DTypeMismatchError)
    assert caught.value.num_errors == 2

    @tensorcheck
    def short(x) -> tuple[Tensor[float32_t], Tensor[float32_t]]:
        return (x,)

    with pytest.raises(TypeMismatchError, match="a tuple of 2"):
        short(torch.ones(1))


def test_optional_defaults_lists_and_dictionaries():
    layer = Layer()
    x = torch.zeros(2, 4)
    assert layer(x) is x
    assert layer(x, None) is x
    assert layer(x, y=torch.zeros(2, dtype=torch.int64)) is x
    with pytest.raises(DimensionMismatchError):
        layer(x, torch.zeros(3, dtype=torch.int64))

    @tensorcheck
    def fn(
        xs: list[Tensor[float32_t, ("N",)]],
        named: dict[str, Tensor[float32_t]],
        either: Tensor[float32_t] | float = 1.0,
        default: Tensor[float32_t] = None,
        *rest: Tensor[float32_t, ("N",)],
        **more: Tensor[float32_t],
    ):
        return None

    one = torch.ones(2)
    fn([one, one], {"a": one})
    fn([], {}, 2.0, one, one, one, more=one)
    for args, kwargs in (
        (([one, torch.ones(3)], {}), {}),
        (([one], {"a": one.long()}), {}),
        (([one], {}, "no"), {}),
        (([one], {}, 1.0, one, torch.ones(3)), {}),
        (([one], {}), {"more": one.long()}),
        ((one, {}), {}),
        (([one], {}, 1.0, [1.0]), {}),
    ):
        with pytest.raises(InvalidParameterError):
            fn(*args, **kwargs)


def test_results():
    @tensorcheck
    def fn(x, how) -> Result[Tensor[float32_t, (2,)], Exception]:
        return {"ok": Ok(x), "err": Err(KeyError("inside")), "bare": x}[how]

    assert fn(torch.ones(2), "ok").unwrap().shape == (2,)
    with pytest.raises(DimensionMismatchError):
        fn(torch.ones(3), "ok")
    with pytest.raises(KeyError, match="inside"):
        fn(torch.ones(2), "err")
    with pytest.raises(InvalidReturnTypeError):
        fn(torch.ones(2), "bare")


def test_annotations_that_are_strings():
    model = late_annotations.Model()
    x = torch.ones(2, 4)
    model(x, torch.ones(2))
    with pytest.raises(DTypeMismatchError):
        model(torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(DimensionMismatchError):
        model(x, torch.ones(3))
    late_annotations.later(torch.ones(5))
    with pytest.raises(DimensionMismatchError):
        late_annotations.later(torch.ones(6))
    inner = late_annotations.make()
    inner.method(torch.ones(2), torch.ones(3))
    with pytest.raises(InvalidParameterError) as caught:
        inner.method(torch.ones(3), torch.ones(2))
    assert caught.value.num_errors == 2


def test_annotations_that_name_nothing_are_told():
    with pytest.warns(UserWarning, match="'Nowhere' of x in never"):
        late_annotations.never(torch.ones(1))
    with pytest.raises(DTypeMismatchError):
        late_annotations.never(torch.ones(1, dtype=torch.int8))
    set_config(ErrorConfig(strict_validation=True))
    strict = tensorcheck(late_annotations.never.__wrapped__)
    with pytest.raises(ValidationError, match="Nowhere"):
        strict(torch.ones(1))


def test_compiled_code_is_not_checked():
    run = torch.compile(Layer(), backend="eager", fullgraph=True)
    assert run(torch.zeros(2, 5)).shape == (2, 5)


def test_python_o_leaves_the_checks_out():
    # Compiled as with -O, in this process: importing all of torch so takes 15 s.
    source = Path(sys.modules[tensorcheck.__module__].__file__).read_text()
    optimized: dict[str, Any] = {"__name__": "optimized"}
    exec(compile(source, "optimized", "exec", dont_inherit=True, optimize=1), optimized)

    def fn(x: Tensor[float32_t, (1, 9)]):
        f = err.new(x)
        return x / 0, f

    with pytest.raises(DimensionMismatchError):
        tensorcheck(fn)(torch.zeros(1, 2))
    assert errors_of(optimized["tensorcheck"](fn)(torch.zeros(1, 2))[1]) == [{"NAN"}]


def test_the_location_is_the_modules():
    @tracked
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            return self.part(x)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        @tensorcheck
        def forward(self, x):
            f = err.new(x)
            return x * self.weight, f

    ErrorLocation.reset()
    model = Outer()
    for run in both_ways(model):
        assert flags.unpack(run(bad())[1], 1)[0].location_name == "part"
