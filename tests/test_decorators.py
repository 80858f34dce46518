"""Guards as decorators: every kind of function keeps its kind, and modes stay with own frames."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch

from opguard.guards._base import Guard
from opguard.guards.calling import autocast_guard, call_guard, eval_guard, grad_guard, vram_guard

count = [0]


class Counting(Guard):
    """A guard written in Python: count tells how often it is entered."""

    def _enter(self):
        count[0] += 1

    def _exit(self, error):
        count[0] -= 1


class Lasting(Counting):
    """One that is entered once for a whole body."""

    log: list[str] = []  # noqa: RUF012

    def suspend(self):
        self.log.append("suspend")
        self.__exit__(None, None, None)

    def resume(self):
        self.log.append("resume")
        self.__enter__()


def inside() -> bool:
    return torch.is_inference_mode_enabled() or count[0] > 0


GUARDS = [
    pytest.param(call_guard, id="C"),
    pytest.param(Counting, id="Python"),
    pytest.param(Lasting, id="lasting"),
]


@call_guard
def at_module_level(x: int, *, y: int = 2) -> int:
    """Documented."""
    return x + y


@call_guard()
async def coroutine_at_module_level():
    return 1


# --- kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", GUARDS)
def test_kinds_are_kept(guard):
    def function(): ...
    def generator():
        yield

    async def coroutine(): ...
    async def async_generator():
        yield

    for fn in (function, generator, coroutine, async_generator):
        made = guard()(fn)
        for ask in (
            inspect.isfunction,
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        ):
            assert ask(made) == ask(fn), (fn, ask)
        assert made.__name__ == fn.__name__
        assert made.__wrapped__ is fn
        assert inspect.signature(made) == inspect.signature(fn)


def test_signature_doc_and_pickle():
    assert str(inspect.signature(at_module_level)) == "(x: 'int', *, y: 'int' = 2) -> 'int'"
    assert at_module_level.__doc__ == "Documented."
    with pytest.MonkeyPatch.context() as patch:
        # under importlib mode a test module is not importable by name
        import sys

        patch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())
        for function in (at_module_level, coroutine_at_module_level):
            assert pickle.loads(pickle.dumps(function)) is function


def _this():
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    return module


@pytest.mark.parametrize("guard", GUARDS)
def test_methods_bind(guard):
    class Model:
        @guard()
        def method(self, x):
            assert inside()
            return self, x

        @guard()
        @classmethod
        def of_class(cls):
            assert inside()
            return cls

        @guard()
        @staticmethod
        def static(x):
            assert inside()
            return x

        @guard()
        def steps(self):
            assert inside()
            yield self

    model = Model()
    assert model.method(1) == (model, 1)
    assert Model.of_class() is Model
    assert Model.static(3) == 3
    assert next(model.steps()) is model


def test_partials_and_callable_objects():
    async def add(x, y):
        assert inside()
        return x + y

    class Caller:
        def __call__(self, x):
            return inside() and x

    made = call_guard()(functools.partial(add, 1))
    assert inspect.iscoroutinefunction(made)
    assert asyncio.run(made(2)) == 3
    assert call_guard()(Caller())(5) == 5
    with pytest.raises(TypeError, match="to be entered by `with`"):
        call_guard()(5)


# --- plain functions ------------------------------------------------------------------------------


def test_return_values_are_detached():
    weight = torch.ones(2, requires_grad=True)

    def double():
        return {"y": weight * 2}

    for guard in (call_guard(inference=False), vram_guard(), call_guard()):
        y = guard(double)()["y"]
        assert not y.requires_grad
        assert not y.is_inference()
    assert call_guard(need_grads=True)(double)()["y"].requires_grad


@pytest.mark.parametrize("guard", [grad_guard, eval_guard, autocast_guard])
def test_single_guards_decorate(guard):
    assert guard()(lambda x: x)(4) == 4
    assert list(guard()(lambda: (yield 1))()) == [1]


def test_models_are_leased_for_the_call():
    model = torch.nn.Dropout()
    assert call_guard(models=model)(lambda: model.training)() is False
    assert model.training

    @call_guard(models=model)
    def steps():
        yield model.training
        yield model.training

    for training in steps():
        assert training is False
        assert model.training


# --- generators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", GUARDS)
def test_generators_are_guarded_while_they_run(guard):
    """C3: the body runs inside, the consumer never is."""
    seen = []

    @guard()
    def steps(n):
        try:
            for i in range(n):
                seen.append(inside())
                got = yield i
                seen.append(inside())
                if got:
                    seen.append(got)
        finally:
            seen.append(inside())
        return "end"

    def driver():
        return (yield from steps(2))

    iterator = driver()
    assert next(iterator) == 0
    assert not inside()
    assert iterator.send("sent") == 1
    assert not inside()
    with pytest.raises(StopIteration) as stop:
        next(iterator)
    assert stop.value.value == "end"
    assert "sent" in seen
    assert all(seen)
    assert count[0] == 0


@pytest.mark.parametrize("guard", GUARDS)
def test_throw_and_close(guard):
    seen = []

    @guard()
    def steps():
        try:
            while True:
                try:
                    yield 1
                except KeyError:
                    seen.append(inside())
                    yield "caught"
        finally:
            seen.append(inside())

    iterator = steps()
    next(iterator)
    assert iterator.throw(KeyError("x")) == "caught"
    assert not inside()
    iterator.close()
    assert seen == [True, True]
    assert not inside()
    iterator = steps()
    next(iterator)
    with pytest.raises(LookupError):
        iterator.throw(LookupError("y"))
    with pytest.raises(StopIteration):
        next(iterator)
    iterator = steps()
    next(iterator)
    del iterator
    assert seen == [True] * 4
    assert not inside()


@pytest.mark.parametrize("value", [None, 1, (1, 2), ValueError("a value"), StopIteration(3)])
@pytest.mark.parametrize("guard", GUARDS)
def test_the_return_value_of_a_generator_is_kept(guard, value):
    @guard()
    def steps():
        yield 1
        return value

    iterator = steps()
    next(iterator)
    with pytest.raises(StopIteration) as stop:
        next(iterator)
    assert stop.value.value is value


def test_yielded_and_returned_tensors_are_detached():
    weight = torch.ones(2, requires_grad=True)

    @call_guard(inference=False)
    def steps():
        with torch.enable_grad():
            yield weight * 2
            return weight * 3

    def driver():
        return (yield from steps())

    iterator = driver()
    assert not next(iterator).requires_grad
    with pytest.raises(StopIteration) as stop:
        next(iterator)
    assert torch.equal(stop.value.value, torch.full((2,), 3.0))
    assert not stop.value.value.requires_grad


NO_GRAD = {"inference": False}


def state():
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, (True, False)),
        (NO_GRAD, (False, False)),
        ({"need_grads": True}, (False, True)),
    ],
)
@pytest.mark.parametrize("outer", [None, torch.inference_mode, torch.no_grad])
def test_the_bodys_own_modes_are_put_back(options, own, outer):
    """`with enable_grad(): yield` inside a body holds after the yield, and only there."""
    bad = []

    def check(expected):
        if state() != expected:
            bad.append((state(), expected))

    @call_guard(**options)
    def steps():
        for _ in range(2):
            own = state()
            with torch.enable_grad():
                yield
                check((own[0], True))
                with torch.inference_mode(False):
                    yield
                    check((False, True))
                    with torch.no_grad():
                        yield
                        check((False, False))
            check(own)
            with torch.inference_mode():
                yield
                check((True, False))
                yield
                check((True, False))
            check(own)

    def consume():
        before = state()
        # no_grad leaves an outer inference mode as it is
        call_guard(**options)(
            lambda: check((before[0] if options == NO_GRAD else own[0], own[1]))
        )()
        for _ in steps():
            check(before)
        check(before)

    consume()
    if outer is not None:
        with outer():
            consume()
    assert not bad


def test_autocast_of_the_body_is_put_back():
    @call_guard(effective_dtype="bf16", device_list="cpu")
    def steps():
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            yield torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") is torch.float16
        assert torch.is_autocast_enabled("cpu")
        yield True
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16

    for enabled in steps():
        assert enabled
        assert not torch.is_autocast_enabled("cpu")
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        assert depth == 1
    assert not torch.is_autocast_enabled("cpu")


def test_a_generator_may_change_threads():
    @call_guard()
    def steps():
        for i in range(4):
            assert inside()
            with torch.inference_mode(False):
                yield i
                assert not inside()

    iterator = steps()
    assert next(iterator) == 0
    box = []

    def other():
        box.append((next(iterator), inside()))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    assert box == [(1, False)]
    assert list(iterator) == [2, 3]
    assert not inside()


def test_a_body_that_calls_itself_while_it_runs():
    @call_guard()
    def steps():
        yield next(iterator)

    iterator = steps()
    with pytest.raises(ValueError, match="already executing"):
        next(iterator)
    assert not inside()


@pytest.mark.parametrize("guard", [call_guard, Counting])
def test_a_failing_generator_holds_nothing(guard):
    refs = []

    @guard()
    def steps(x):
        y = x * 2
        refs.extend([weakref.ref(x), weakref.ref(y)])
        yield 1
        raise RuntimeError("body")

    gc.disable()
    try:
        iterator = steps(torch.ones(2))
        next(iterator)
        try:
            next(iterator)
        except RuntimeError as error:
            kept = error
        assert [ref() for ref in refs] == [None, None]
        assert str(kept) == "body"
    finally:
        gc.enable()


def test_a_lasting_guard_is_entered_once():
    entered = []

    class Once(Lasting):
        def _enter(self):
            entered.append(1)
            super()._enter()

        def suspend(self):
            count[0] -= 1

        def resume(self):
            count[0] += 1

    @Once()
    def steps():
        for i in range(3):
            assert count[0] == 1
            yield i

    for _ in steps():
        assert count[0] == 0
    assert count[0] == 0
    assert entered == [1]


# --- coroutines and async generators --------------------------------------------------------------


@pytest.mark.parametrize("guard", GUARDS)
def test_siblings_never_see_the_modes(guard):
    """C3: coroutines are guarded where they run; other tasks of the loop are not."""
    leaks, misses = [], []

    @guard()
    async def guarded(n):
        for _ in range(n):
            misses.append(not inside())
            await asyncio.sleep(0)
        return n

    @guard()
    async def numbers(n):
        try:
            for i in range(n):
                misses.append(not inside())
                await asyncio.sleep(0)
                got = yield i
                misses.append(not inside())
                if got:
                    yield got
        finally:
            misses.append(not inside())

    async def free():
        for _ in range(20):
            leaks.append(inside())
            await asyncio.sleep(0)

    async def consumer():
        got = []
        async for i in numbers(3):
            leaks.append(inside())
            got.append(i)
            await asyncio.sleep(0)
        return got

    async def early():
        agen = numbers(5)
        assert await agen.__anext__() == 0
        assert await agen.asend("extra") == "extra"
        with pytest.raises(KeyError):
            await agen.athrow(KeyError("k"))
        agen = numbers(5)
        async for _ in agen:
            break
        await agen.aclose()
        leaks.append(inside())

    async def main():
        return await asyncio.gather(
            *(guarded(4) for _ in range(4)), *(free() for _ in range(4)), consumer(), early()
        )

    results = asyncio.run(main())
    assert results[:4] == [4] * 4
    assert results[8] == [0, 1, 2]
    assert not any(leaks)
    assert not any(misses)
    assert count[0] == 0


@pytest.mark.parametrize("guard", GUARDS)
def test_cancel_and_timeout(guard):
    seen = []

    @guard()
    async def sleeper():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append(inside())
            await asyncio.sleep(0)
            raise

    async def main():
        task = asyncio.create_task(sleeper())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sleeper(), 0.01)
        assert not inside()

    asyncio.run(main())
    assert seen == [True, True]


def test_an_abandoned_async_generator_is_closed_by_the_loop():
    seen = []

    @call_guard()
    async def numbers():
        try:
            yield 1
        finally:
            seen.append(inside())

    async def main():
        async for _ in numbers():
            break

    asyncio.run(main())
    gc.collect()
    assert seen == [True]


def test_results_of_coroutines_are_detached_and_futures_are_not_touched():
    weight = torch.ones(2, requires_grad=True)

    @call_guard(inference=False)
    async def work(future):
        first = await future
        with torch.enable_grad():
            return first, weight * 2

    @call_guard(inference=False)
    async def numbers():
        with torch.enable_grad():
            yield weight * 2

    async def main():
        future = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(work(future))
        await asyncio.sleep(0)
        future.set_result("set")
        async for y in numbers():
            assert not y.requires_grad
        return await task

    first, y = asyncio.run(main())
    assert first == "set"
    assert not y.requires_grad


def test_a_failing_coroutine_holds_nothing():
    refs = []

    @call_guard()
    async def work(x):
        y = x * 2
        refs.extend([weakref.ref(x), weakref.ref(y)])
        await asyncio.sleep(0)
        raise RuntimeError("body")

    @call_guard()
    async def numbers(x):
        refs.append(weakref.ref(x))
        yield 1
        raise RuntimeError("body")

    async def drain():
        async for _ in numbers(torch.ones(1)):
            pass

    kept = []
    for make in (lambda: work(torch.ones(2)), drain):
        try:
            asyncio.run(make())
        except RuntimeError as error:
            kept.append(error)
    assert [ref() for ref in refs] == [None] * 3
    assert [str(error) for error in kept] == ["body", "body"]


def test_no_await_warning_for_decorated_coroutines():
    @call_guard()
    async def work():
        await asyncio.sleep(0)
        return 1

    assert asyncio.run(work()) == 1


# --- guards written in Python ---------------------------------------------------------------------


def test_python_guards_nest_and_share():
    guard = Counting()
    with guard, guard:
        assert count[0] == 2
    assert count[0] == 0
    guard.__enter__()
    box = []

    def other():
        try:
            guard.__exit__(None, None, None)
        except RuntimeError as error:
            box.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    guard.__exit__(None, None, None)
    assert "in the thread and task that entered it" in box[0]
    assert count[0] == 0


def test_python_guards_never_hide_the_users_exception(monkeypatch):
    import sys

    class Bad(Guard):
        def _exit(self, error):
            raise LookupError("leaving")

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: reported.append(info.exc_value))
    with pytest.raises(KeyError, match="mine"), Bad():
        raise KeyError("mine")
    assert [str(error) for error in reported] == ["leaving"]
    with pytest.raises(LookupError, match="leaving"), Bad():
        pass


def test_python_guards_sanitize():
    refs = []

    def body():
        x = torch.ones(2)
        refs.append(weakref.ref(x))
        raise ValueError("x")

    def run():
        with Counting():
            body()

    try:
        run()
    except ValueError as error:
        kept = error
    assert refs[0]() is None
    assert kept.__traceback__ is not None


def test_bodies_of_one_lasting_guard_take_turns():
    """Two bodies of one guard object, which has been entered itself, do not share entries."""
    left = []

    class Named(Guard):
        def _enter(self):
            self.mine = object()
            left.append(self.mine)

        def _exit(self, error):
            left.remove(self.mine)

        def suspend(self):
            pass

        def resume(self):
            pass

    guard = Named()
    with guard:

        @guard
        def steps():
            yield 1
            yield 2

        first, second = steps(), steps()
        next(first), next(second)
        mine = list(left)
        assert list(first) == [2]
        assert left == [mine[0], mine[2]]
        assert list(second) == [2]
    assert left == []
