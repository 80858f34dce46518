"""The C side of the guards without torch: fake modes, fake modules, hostile objects."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref

import pytest


class Modes:
    """Stands for torch's thread-local modes."""

    inference = False
    grad = True


class Inference:
    """As torch._C._InferenceMode: enters when made, leaves when released."""

    def __init__(self, on):
        self.before = Modes.inference, Modes.grad
        Modes.inference, Modes.grad = on, not on

    def __del__(self):
        Modes.inference, Modes.grad = self.before


def set_grad(on):
    Modes.grad = on


class Module:
    def __init__(self, *children):
        self.training = True
        self._modules = {str(i): child for i, child in enumerate(children)}

    def train(self, mode=True):
        self.training = mode
        for child in self._modules.values():
            child.train(mode)
        return self


class Autocast:
    log: list = []  # noqa: RUF012

    def __init__(self, *args):
        self.log.append(args)

    def enter(self):
        self.log.append("enter")

    def leave(self):
        self.log.append("leave")

    def suspend(self):
        self.log.append("suspend")

    def resume(self):
        self.log.append("resume")


@pytest.fixture
def Guard(C):
    Modes.inference, Modes.grad = False, True
    Autocast.log.clear()
    C.bind_guards(
        inference_type=Inference,
        is_inference=lambda: Modes.inference,
        set_grad=set_grad,
        is_grad=lambda: Modes.grad,
        module_type=Module,
        module_train=Module.train,
        autocast=Autocast,
        decorate=None,
        release=None,
        measure=None,
        is_oom=None,
    )
    yield C.Guard
    assert (Modes.inference, Modes.grad) == (False, True)


AS_IS, INFERENCE, NO_GRAD, GRAD = range(4)
SANITIZE, TRAIN = 2, 16


def make(Guard, kind=INFERENCE, flags=SANITIZE, **parts):
    names = ("models", "autocast", "devices", "caller", "on_oom", "keep")
    return Guard(kind, flags, *(parts.get(name) for name in names))


# --- modes ----------------------------------------------------------------------------------------


def test_modes(Guard):
    expected = {AS_IS: (False, True), INFERENCE: (True, False), NO_GRAD: (False, False)}
    for kind, inside in expected.items():
        with make(Guard, kind):
            assert (Modes.inference, Modes.grad) == inside
            with make(Guard, GRAD):
                assert (Modes.inference, Modes.grad) == (False, True)
            assert (Modes.inference, Modes.grad) == inside


def test_unbound_is_a_sentence(C, Guard):
    C.bind_guards(inference_type=None)
    with pytest.raises(RuntimeError, match="grad modes to be bound"):
        Guard().__enter__()


def test_bind_guards_refuses(C):
    with pytest.raises(TypeError, match="expected a part of the guards"):
        C.bind_guards(no_such=1)
    with pytest.raises(TypeError, match="expected a part of the guards"):
        C.bind_guards(module_type=3)
    with pytest.raises(TypeError):
        C.bind_guards(1)


def test_autocast_is_entered_and_left(Guard):
    with make(Guard, AS_IS, autocast=("cpu", "bf16")):
        assert Autocast.log == [("cpu", "bf16"), "enter"]
    assert Autocast.log[2:] == ["leave"]


@pytest.mark.parametrize("part", ["is_grad", "set_grad", "inference_type", "autocast"])
def test_entering_that_fails_leaves_everything(C, Guard, part, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda info: None)  # set_grad fails twice

    def fail(*args):
        raise LookupError(part)

    model = Module(Module())
    old = {"set_grad": set_grad}
    C.bind_guards(**{part: fail})
    kind = INFERENCE if part == "inference_type" else NO_GRAD
    guard = make(Guard, kind, models=(model,), autocast=("cpu",))
    try:
        with pytest.raises(LookupError, match=part):
            guard.__enter__()
    finally:
        C.bind_guards(**{part: old.get(part)})
        Modes.inference, Modes.grad = False, True
    assert model.training


def test_exit_with_anything(Guard):
    for args in ((), (None,), (None, None, None), (3, 4, 5), (ValueError, ValueError("x"), None)):
        guard = Guard()
        guard.__enter__()
        assert guard.__exit__(*args) is False


def test_reentered_and_foreign(Guard):
    guard = Guard()
    with guard, guard:
        box = []

        def other():
            try:
                guard.__exit__(None, None, None)
            except RuntimeError as error:
                box.append(error)
            try:
                guard(1)
            except RuntimeError as error:
                box.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
        assert len(box) == 2
    with pytest.raises(RuntimeError, match="entered before it is exited"):
        guard.__exit__(None, None, None)


def test_foreign_exit_does_not_hide_an_exception(Guard, monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: reported.append(info.exc_value))
    assert Guard().__exit__(ValueError, ValueError("x"), None) is False
    assert "entered before it is exited" in str(reported[0])


def test_a_dropped_guard_leaves(Guard):
    model = Module()
    guard = make(Guard, models=(model,))
    guard.__enter__()
    del guard
    assert model.training


# --- modules --------------------------------------------------------------------------------------


def tree(depth, width=2):
    return Module(*(tree(depth - 1, width) for _ in range(width))) if depth else Module()


def every(module, found=None):
    found = {} if found is None else found
    if id(module) not in found:
        found[id(module)] = module
        for child in module._modules.values():
            if isinstance(child, Module):
                every(child, found)
    return found.values()


def test_trees_are_switched_and_put_back(Guard):
    model = tree(4)
    chosen = random.Random(1)
    for module in every(model):
        module.training = chosen.random() < 0.5
    before = [module.training for module in every(model)]
    for flags, inside in ((SANITIZE, False), (SANITIZE | TRAIN, True)):
        with make(Guard, flags=flags, models=(model,)):
            assert all(module.training is inside for module in every(model))
        assert [module.training for module in every(model)] == before


def test_random_nesting_of_leases(Guard):
    """Any order of entering and leaving within one thread ends as it began."""
    for seed in range(60):
        chosen = random.Random(seed)
        model = tree(3)
        parts = list(every(model))
        for part in parts:
            part.training = chosen.random() < 0.7
        before = [part.training for part in parts]
        held = []
        for _ in range(12):
            if held and chosen.random() < 0.4:
                held.pop().__exit__(None, None, None)
            else:
                flags = SANITIZE | (TRAIN if chosen.random() < 0.5 else 0)
                guard = make(Guard, AS_IS, flags, models=(chosen.choice(parts),))
                guard.__enter__()
                held.append(guard)
        while held:
            held.pop().__exit__(None, None, None)
        assert [part.training for part in parts] == before, seed


def test_same_mode_leases_in_any_order(Guard):
    for seed in range(60):
        chosen = random.Random(seed)
        model = tree(3)
        parts = list(every(model))
        for part in parts:
            part.training = chosen.random() < 0.7
        before = [part.training for part in parts]
        held = [make(Guard, AS_IS, models=(chosen.choice(parts),)) for _ in range(5)]
        for guard in held:
            guard.__enter__()
        chosen.shuffle(held)
        for guard in held:
            guard.__exit__(None, None, None)
        assert [part.training for part in parts] == before, seed


def test_odd_modules(Guard):
    bare = Module()
    del bare.__dict__["_modules"], bare.__dict__["training"]
    with pytest.raises(AttributeError), make(Guard, models=(bare,)):
        pass
    odd = Module()
    odd._modules = 3
    with make(Guard, models=(odd,)):
        assert not odd.training
    mixed = Module(Module())
    mixed._modules.update(none=None, number=3, text="x")
    with make(Guard, models=(mixed,)):
        assert not mixed._modules["0"].training
    strange = Module()
    strange.training = []
    with make(Guard, models=(strange,)):
        pass
    cyclic = Module()
    cyclic._modules["self"] = cyclic
    with make(Guard, models=(cyclic, cyclic)):
        assert not cyclic.training
    assert cyclic.training


class HostileTraining(Module):
    @property
    def training(self):
        raise OSError("no mode")

    @training.setter
    def training(self, value):
        pass


class HostileTrain(Module):
    def train(self, mode=True):
        raise OSError("no train")


class GrowingTrain(Module):
    def train(self, mode=True):
        self._modules[str(len(self._modules))] = Module()
        super().train(mode)
        gc.collect()


class GuardingTrain(Module):
    """Enters a guard on itself while it is being switched."""

    guard = None

    def train(self, mode=True):
        super().train(mode)
        if self.guard is not None and not mode:
            with self.guard:
                pass


def test_hostile_modules(Guard):
    for hostile in (HostileTraining(), HostileTrain()):
        model = Module(Module(), hostile, Module())
        with pytest.raises(OSError, match="no "), make(Guard, models=(model,)):
            pass
        assert model._modules["0"].training
        assert model._modules["2"].training
    growing = GrowingTrain(Module())
    with make(Guard, models=(growing,)):
        assert not growing.training
    assert growing.training
    guarding = GuardingTrain(Module())
    GuardingTrain.guard = make(Guard, models=(guarding,))
    try:
        with make(Guard, models=(guarding,)):
            assert not guarding._modules["0"].training
        assert guarding._modules["0"].training
    finally:
        GuardingTrain.guard = None


def test_deep_and_shared_trees(Guard):
    top = Module()
    for _ in range(2000):
        top = Module(top)
    with make(Guard, models=(top,)):
        assert not top.training
    assert top.training
    while top is not None:
        top = top._modules.pop("0", None)
    low = Module()
    top = low
    for _ in range(40):
        top = Module(top, top)
    with make(Guard, models=(top,)):
        assert not low.training
    assert low.training
    low.training = False
    with make(Guard, flags=TRAIN, models=(top,)):
        assert low.training
    assert not low.training


def test_threads(Guard):
    """Leases of one mode from many threads, with a train() that lets others run."""

    class Slow(Module):
        def train(self, mode=True):
            for _ in range(20):
                pass
            super().train(mode)

    model = Module(Slow(Module()), Module(), Slow(Slow(Module())))
    wrong = []

    def work():
        for _ in range(40):
            with make(Guard, AS_IS, models=(model,)):
                wrong.extend(m for m in every(model) if m.training)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert all(m.training for m in every(model))


def test_opposite_modes_of_threads(Guard):
    model = Module(Module())
    box = []

    def other():
        try:
            with make(Guard, AS_IS, SANITIZE | TRAIN, models=(model,)):
                pass
        except RuntimeError as error:
            box.append(str(error))

    with make(Guard, AS_IS, models=(model,)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
    assert "another thread's guard holds it in eval mode" in box[0]


# --- calling --------------------------------------------------------------------------------------


def test_g_calls(Guard):
    with make(Guard) as g:
        assert g(max, 1, 2) == 2
        assert g(dict, a=1) == {"a": 1}
        with pytest.raises(TypeError):
            g()
        with pytest.raises(TypeError):
            g(1, 2)
        with pytest.raises(TypeError):
            g(1, a=2)
    with make(Guard, caller=max) as g:
        assert g(3, 4) == 4
    with pytest.raises(RuntimeError, match="to be entered before it is called"):
        g(1)


def test_run_and_step_refuse(Guard):
    guard = Guard()
    for wrong in ((), (1,), (len, [], {}), (len, (), ())):
        with pytest.raises(TypeError):
            guard.run(*wrong)
    with pytest.raises(TypeError):
        guard.step(1)
    with pytest.raises(TypeError):
        guard.run(3, (), {})


def test_on_oom(C, Guard):
    C.bind_guards(is_oom=lambda error: isinstance(error, MemoryError))
    tries = []

    def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise MemoryError
        return 5

    with pytest.raises(MemoryError), make(Guard, on_oom=True) as g:
        g(flaky)
    assert len(tries) == 2
    tries.clear()
    with make(Guard, on_oom=lambda error: True) as g:
        assert g(flaky) == 5
    tries.clear()
    with pytest.raises(ZeroDivisionError), make(Guard, on_oom=lambda error: 1 / 0) as g:
        g(flaky)
    C.bind_guards(is_oom=lambda error: 1 / 0)
    with pytest.raises(ZeroDivisionError), make(Guard, on_oom=True) as g:
        g(flaky)


# --- steppers -------------------------------------------------------------------------------------


def test_steps(Guard):
    seen = []

    def body():
        seen.append(Modes.inference)
        got = yield 1
        seen.append((Modes.inference, got))
        return (1, 2)

    stepper = Guard().step(body(), True)
    assert iter(stepper) is stepper
    assert next(stepper) == 1
    assert not Modes.inference
    with pytest.raises(StopIteration) as stop:
        stepper.send("sent")
    assert stop.value.value == (1, 2)
    assert seen == [True, (True, "sent")]
    with pytest.raises(StopIteration):
        next(stepper)
    assert stepper.close() is None


def test_steps_of_what_is_no_body(Guard):
    for inner in (3, None, object()):
        stepper = Guard().step(inner, True)
        with pytest.raises((TypeError, AttributeError)):
            next(stepper)
    assert list(Guard().step(iter([1, 2]), True)) == [1, 2]
    with pytest.raises(AttributeError):
        Guard().step(iter([1]), True).throw(ValueError)
    Guard().step(iter([1]), True).close()


def test_throw_into_steps(Guard):
    def body():
        try:
            yield 1
        except KeyError:
            yield Modes.inference
        return 7

    stepper = Guard().step(body(), True)
    next(stepper)
    assert stepper.throw(KeyError("k")) is True
    with pytest.raises(OSError, match="o"):
        stepper.throw(OSError("o"))
    stepper = Guard().step(body(), True)
    next(stepper)
    stepper.throw(KeyError)
    with pytest.raises(StopIteration) as stop:
        next(stepper)
    assert stop.value.value == 7


def test_own_modes_of_a_body(Guard):
    for kind in (INFERENCE, NO_GRAD, GRAD):

        def body():
            inside = Modes.inference, Modes.grad
            mode = Inference(not inside[0])
            yield
            assert (Modes.inference, Modes.grad) == (not inside[0], inside[0])
            yield
            del mode
            assert (Modes.inference, Modes.grad) == inside
            set_grad(not inside[1])
            yield
            assert Modes.grad is not inside[1]
            set_grad(inside[1])

        for _ in make(Guard, kind).step(body(), True):
            assert (Modes.inference, Modes.grad) == (False, True)


def test_autocast_of_steps(Guard):
    def body():
        yield 1
        yield 2

    assert list(make(Guard, AS_IS, autocast=("cpu",)).step(body(), True)) == [1, 2]
    assert Autocast.log == [
        ("cpu",),
        *["enter", "suspend", "resume", "suspend", "resume", "leave"],
    ]


def test_steppers_are_collected(Guard):
    class Holder:
        pass

    def body(holder):
        yield holder

    holder = Holder()
    guard = Guard()
    holder.stepper = guard.step(body(holder), False)
    ref = weakref.ref(holder)
    del holder
    gc.collect()
    assert ref() is None


def test_guards_are_collected(Guard):
    class Hook:
        def __call__(self, error):
            return False

    hook = Hook()
    hook.guard = make(Guard, on_oom=hook)
    ref = weakref.ref(hook)
    del hook
    gc.collect()
    assert ref() is None


def test_guard_sanitize_refuses(C):
    for wrong in ((), (1,), (3, None, None), (ValueError(), None, [3])):
        with pytest.raises(TypeError):
            C.guard_sanitize(*wrong)
    assert C.guard_sanitize(ValueError("x"), None, None) is None


def test_any_guard_and_any_call(Guard):
    """Hostile settings and arguments: an exception or a result, never a crash, modes put back."""
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies

    class Hostile:
        def __getattr__(self, name):
            raise LookupError(name)

        def __bool__(self):
            raise LookupError("bool")

        def __eq__(self, other):
            raise LookupError("eq")

        __hash__ = None

        def __call__(self, *args, **kwargs):
            raise LookupError("call")

    values = strategies.sampled_from(
        [
            None,
            0,
            1,
            (),
            ("cpu",),
            (Module(),),
            [Module()],
            Module(),
            Hostile(),
            len,
            True,
            (3,),
            {},
        ]
    )

    @hypothesis.settings(max_examples=150, deadline=None, database=None)
    @hypothesis.given(
        strategies.lists(values, min_size=8, max_size=8),
        strategies.lists(values, max_size=3),
        strategies.integers(-1, 5),
        strategies.integers(-1, 40),
    )
    def check(parts, args, kind, flags):
        try:
            guard = Guard(kind, flags, *parts[2:])
        except (TypeError, ValueError, LookupError):
            return
        for attempt in (
            lambda: guard(*args),
            lambda: guard.run(*args),
            lambda: guard.step(*args),
            lambda: next(guard.step(args[0] if args else None, True)),
        ):
            for entered in (False, True):
                if entered:
                    try:
                        guard.__enter__()
                    except (TypeError, ValueError, LookupError, AttributeError):
                        continue
                try:
                    attempt()
                except (TypeError, ValueError, LookupError, AttributeError, RuntimeError):
                    pass
                finally:
                    if entered:
                        guard.__exit__(None, None, None)
        assert (Modes.inference, Modes.grad) == (False, True)

    check()


# --- what a review found --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["next", "send", "throw", "close"])
def test_a_body_that_steps_itself_leaves_the_modes_whole(Guard, how):
    """A nested step once took the place of the outer one's modes: they stayed on for good."""
    seen = []

    def body():
        try:
            step = getattr(stepper, how if how != "next" else "__next__")
            step(*{"send": (None,), "throw": (KeyError(),)}.get(how, ()))
        except ValueError as error:
            seen.append(str(error))
        yield 1
        seen.append(Modes.inference)
        yield 2

    stepper = make(Guard).step(body(), True)
    assert next(stepper) == 1
    assert (Modes.inference, Modes.grad) == (False, True)
    assert next(stepper) == 2
    stepper.close()
    assert "already executing" in seen[0]
    assert seen[1] is True


@pytest.mark.parametrize("part", ["is_grad", "set_grad", "is_inference", "autocast"])
def test_parts_that_are_not_bound_are_a_sentence(C, Guard, part):
    C.bind_guards(**{part: None})
    with pytest.raises(RuntimeError, match="modes to be bound"):
        make(Guard, GRAD, autocast=("cpu",)).__enter__()
    Modes.inference, Modes.grad = False, True


def test_a_hook_that_raises_what_it_was_given_makes_no_ring(C, Guard):
    C.bind_guards(is_oom=lambda error: True)

    def hook(error):
        assert sys.exc_info()[1] is error
        raise error

    def again(error):
        raise KeyError("new")

    def fail():
        raise LookupError

    for function, kind in ((hook, LookupError), (again, KeyError)):
        guard = make(Guard, on_oom=function)
        with pytest.raises(kind) as caught, guard:
            guard(fail)
        context = caught.value.__context__
        assert context is None if function is hook else type(context) is LookupError
    assert sys.exc_info()[1] is None
    C.bind_guards(is_oom=None)


def test_exit_by_hand_leaves_the_context_alone(Guard):
    error = ValueError()
    guard = make(Guard).__enter__()
    try:
        raise KeyError
    except KeyError:
        guard.__exit__(ValueError, error, None)
    assert error.__context__ is None


def test_a_guard_freed_after_its_module_was_cleared():
    """The collector clears the module first: lock, names and modes are gone then."""
    from conftest import load_extension

    C = load_extension()
    C.bind_guards(
        inference_type=Inference,
        is_inference=lambda: Modes.inference,
        set_grad=set_grad,
        is_grad=lambda: Modes.grad,
        module_type=Module,
        module_train=Module.train,
    )
    C.kept = make(C.Guard, AS_IS, models=(Module(Module()),)).__enter__()
    lost = weakref.ref(C)
    del C
    gc.collect()
    assert lost() is None
