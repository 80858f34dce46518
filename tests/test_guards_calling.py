"""The guards around a call: modes, results, exceptions, memory."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from opguard import _C
from opguard.guards import calling
from opguard.guards.calling import (
    AwaitInsideGuardWarning,
    autocast_guard,
    call_guard,
    eval_guard,
    grad_guard,
    vram_guard,
)

ALL = [call_guard, grad_guard, eval_guard, autocast_guard, vram_guard]


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))


def modes() -> tuple[bool, bool]:
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


# --- every guard ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ALL)
def test_usable_with_no_argument(guard):
    before = modes()
    with guard() as g:
        assert g(torch.ones(2)).sum() == 2
        assert g(abs, -3) == 3
    assert modes() == before

    @guard
    def bare(x):
        return x + 1

    @guard()
    def called(x):
        return x + 1

    assert bare(1) == called(1) == 2
    assert modes() == before


@pytest.mark.parametrize("guard", ALL)
def test_keyword_only(guard):
    parameters = list(inspect.signature(guard).parameters.values())
    assert parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY
    assert {p.kind for p in parameters[1:]} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="no_such"):
        guard(no_such=1)


def test_names_of_the_seed():
    names = set(inspect.signature(call_guard).parameters)
    assert names >= {
        "need_grads",
        "effective_dtype",
        "device_list",
        "sanitize_all_exceptions",
        "detach_outputs",
        "caller_fn",
        "models",
        "train_mode",
        "garbage_collect_on_exception",
        "garbage_collect_on_success",
        "on_oom",
    }


# --- autograd's modes -----------------------------------------------------------------------------


def test_inference_mode_by_default():
    with call_guard():
        assert modes() == (True, False)
    assert modes() == (False, True)


def test_no_grad_instead():
    with call_guard(inference=False):
        assert modes() == (False, False)
    with grad_guard(inference=False):
        assert modes() == (False, False)
    assert modes() == (False, True)


def test_need_grads_defeats_an_outer_inference_mode():
    """B: grads are on inside need_grads=True, whatever is outside, and outputs keep them."""
    model = torch.nn.Linear(2, 1)
    with torch.inference_mode():
        with call_guard(need_grads=True) as g:
            assert modes() == (False, True)
            y = g(model, torch.ones(1, 2))
            assert y.requires_grad
            y.sum().backward()
        assert modes() == (True, False)
    assert model.weight.grad is not None


def test_need_grads_with_enable_grad_inside_a_caller():
    def caller(x):
        with torch.enable_grad():
            return (x.requires_grad_() * 2).sum()

    with call_guard(need_grads=True, caller_fn=caller) as g:
        g(torch.ones(2)).backward()


def test_nested_and_reentered():
    guard = call_guard()
    with guard as g, guard, grad_guard(need_grads=True):
        assert modes() == (False, True)
        with guard:
            assert modes() == (True, False)
        assert modes() == (False, True)
        assert g(1) == 1
    assert modes() == (False, True)
    with guard:
        assert modes() == (True, False)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_modes_put_back_on_any_exception(kind):
    model = small()

    def body():
        assert not model[1].training
        assert torch.is_autocast_enabled("cpu")
        raise kind

    with pytest.raises(kind), call_guard(models=model, effective_dtype="bf16"):
        body()
    assert modes() == (False, True)
    assert model[1].training
    assert not torch.is_autocast_enabled("cpu")


def test_a_failing_exit_never_hides_the_users_exception(monkeypatch):
    class Stubborn(torch.nn.Linear):
        def train(self, mode=True):
            if mode:
                raise RuntimeError("will not train")
            return super().train(mode)

    model = Stubborn(1, 1)
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: reported.append(info.exc_value))
    with pytest.raises(KeyError, match="mine"), call_guard(models=model):
        raise KeyError("mine")
    assert [str(error) for error in reported] == ["will not train"]
    model.training = True
    with pytest.raises(RuntimeError, match="will not train"), call_guard(models=model):
        pass
    assert modes() == (False, True)


# --- results --------------------------------------------------------------------------------------


def test_results_are_ordinary_tensors():
    """B: a result made in inference mode can be used in autograd and in place."""
    model = small()
    with call_guard() as g:
        y = g(model, torch.ones(1, 3))
        z = g({"a": y * 2})["a"]
    for out in (y, z):
        assert not out.is_inference()
        out.add_(1)
        (out * torch.ones(1, requires_grad=True)).sum().backward()


def test_output_that_is_a_parameter_is_copied():
    """B: zeroing an output must not zero the weight it was a view of."""
    model = torch.nn.Linear(2, 2)

    class Leaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return self.inner.weight.detach(), self.inner.weight.view(-1)

    before = model.weight.clone()
    with call_guard() as g:
        for out in g(Leaks()):
            out.zero_()
    assert torch.equal(before, model.weight)


def test_need_grads_turns_detaching_off_unless_asked():
    model = torch.nn.Linear(2, 1)
    with call_guard(need_grads=True, detach_outputs=True) as g:
        assert not g(model, torch.ones(1, 2)).requires_grad
    with call_guard(need_grads=True) as g:
        assert g(model, torch.ones(1, 2)).requires_grad


def test_detach_outputs_off_is_honoured():
    """C6: the seed's vram_guard without caller_fn ignored detach_outputs=False."""
    with vram_guard(detach_outputs=False) as g:
        assert g(lambda: torch.ones(1, requires_grad=True) * 2).requires_grad
    with vram_guard() as g:
        assert not g(lambda: torch.ones(1, requires_grad=True) * 2).requires_grad


def test_caller_fn():
    with vram_guard(caller_fn=torch.nn.functional.relu) as g:
        assert g(torch.tensor([-1.0])).item() == 0
    with pytest.raises(TypeError, match="caller_fn: expected a callable"):
        call_guard(caller_fn=3)


@pytest.mark.parametrize("builtin", [(len, [1, 2], 2), (abs, -1, 1), ([].append, 1, None)])
def test_builtins_are_called_as_they_are(builtin):
    """C8: the seed's wrapper passed C builtins an argument too many."""
    function, argument, result = builtin
    with call_guard() as g:
        assert g(function, argument) == result
    assert call_guard()(function)(argument) == result
    with call_guard(caller_fn=function) as g:
        assert g(argument) == result


def test_wrapping_a_module_copies_nothing_of_it():
    """C8: the wrapper must not carry the module's __dict__."""
    model = small()
    wrapper = call_guard()(lambda: None)
    assert "_modules" not in vars(calling._decorate(call_guard(), model))
    assert "_modules" not in vars(wrapper)


def test_g_says_what_it_wants():
    with call_guard() as g:
        with pytest.raises(TypeError, match=r"g\(\): expected a model or a callable"):
            g()
        with pytest.raises(TypeError, match="expected a callable before other arguments"):
            g(3, 4)
    with pytest.raises(TypeError, match="expected the guard to be entered by `with`"):
        g(3)
    with pytest.raises(TypeError, match="expected the guard to be entered by `with`"):
        g(3, 4)


# --- eval and train -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: (m,), lambda m: {"a": [m]}, lambda m: {m}])
def test_bare_modules_and_containers(wrap):
    """C1: a bare module counts, dropout is off inside, each module is put back."""
    model = small()
    with call_guard(models=wrap(model)):
        assert not any(m.training for m in model.modules())
    with eval_guard(models_or_loader=wrap(model)):
        assert not any(m.training for m in model.modules())
    with eval_guard(wrap(model)):
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.modules())


def test_modes_put_back_per_submodule():
    """C1: a frozen batch norm stays frozen."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    model[1].eval()
    with call_guard(models=model):
        assert not model.training
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    with eval_guard(models_or_loader=model, train_mode=True):
        assert model[1].training
    assert not model[1].training


def test_g_runs_the_model_in_eval():
    seen = []
    model = small()
    model.register_forward_hook(lambda m, *_: seen.append([x.training for x in m.modules()]))
    with call_guard() as g:
        x = torch.ones(1, 3)
        assert torch.equal(g(model, x), g(model, x))
        assert model.training
    assert not any(map(any, seen))


def test_foreign_train_methods_are_left_alone():
    """C2: what has a train() of another kind is not called."""

    class Tokenizer:
        def train(self, files):
            raise AssertionError("called")

    with call_guard(models=(Tokenizer(), small(), None, "name")), eval_guard([Tokenizer()]):
        pass


def test_pipelines_by_their_components():
    class Pipeline:
        def __init__(self):
            self.components = {"unet": small(), "tokenizer": object()}

        def __call__(self):
            raise AssertionError("called")

    pipeline = Pipeline()
    with eval_guard(models_or_loader=pipeline):
        assert not pipeline.components["unet"].training
    assert pipeline.components["unet"].training


def test_a_loader_is_wrapped():
    with eval_guard(models_or_loader=lambda size: (small(), size)) as load:
        model, size = load(3)
    assert size == 3
    assert not any(m.training for m in model.modules())


def test_train_methods_of_submodules_are_called():
    calls = []

    class Frozen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.norm.eval()
            self.rest = torch.nn.Linear(1, 1)

        def train(self, mode=True):
            calls.append(mode)
            super().train(mode)
            self.norm.eval()
            return self

    model = torch.nn.Sequential(Frozen(), torch.nn.Linear(1, 1))
    with call_guard(models=model):
        assert not any(m.training for m in model.modules())
    assert calls == [False, True]
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


def test_train_shadowed_on_the_instance():
    model = small()
    model[0].train = lambda mode=True: model[0]
    with call_guard(models=model):
        assert model[0].training
        assert not model[1].training
    assert model[1].training


def test_shared_cyclic_and_deep_trees():
    shared = torch.nn.Linear(1, 1)
    model = torch.nn.Sequential(shared, shared)
    object.__getattribute__(shared, "_modules")["back"] = model
    with call_guard(models=model):
        assert not shared.training
    assert shared.training
    model.training = shared.training = False
    with call_guard(models=model):
        pass
    top = chain = torch.nn.Module()
    for _ in range(30):  # 2**30 paths
        below = torch.nn.Module()
        chain.left = chain.right = below
        chain = below
    with call_guard(models=top):
        assert not chain.training
    assert chain.training
    top = torch.nn.Module()
    for _ in range(20_000):
        above = torch.nn.Module()
        above._modules["x"] = top
        top = above
    with call_guard(models=top):
        assert not top.training
    assert top.training
    while top is not None:  # a chain this long must not be freed by recursion
        top = top._modules.pop("x", None)


def test_switching_that_fails_changes_nothing():
    class No(torch.nn.Linear):
        def train(self, mode=True):
            raise ValueError("no")

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), No(1, 1), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no"), call_guard(models=model):
        raise AssertionError("entered")
    assert all(m.training for m in model.modules())
    assert modes() == (False, True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_modules():
    plain = small()
    compiled = torch.compile(plain, backend="eager")
    with call_guard(models=compiled):
        assert not plain[1].training
    assert plain[1].training
    scripted = torch.jit.script(small())
    with call_guard(models=scripted):
        assert not any(m.training for m in scripted.modules())
    assert all(m.training for m in scripted.modules())


# --- leases ---------------------------------------------------------------------------------------


def in_thread(function):
    box = []

    def run():
        try:
            box.append(function())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return box[0]


def test_threads_agree_or_get_a_sentence():
    model = small()

    def other(train_mode):
        with eval_guard(models_or_loader=model, train_mode=train_mode):
            return model[1].training

    with eval_guard(models_or_loader=model):
        assert in_thread(lambda: other(False)) is False
        error = in_thread(lambda: other(True))
        assert isinstance(error, RuntimeError)
        assert "another thread's guard holds it in eval mode" in str(error)
        assert not model[1].training
        with eval_guard(models_or_loader=model, train_mode=True):
            assert model[1].training
            assert "holds it in train mode" in str(in_thread(lambda: other(False)))
        assert not model[1].training
    assert model[1].training


def test_the_last_lease_puts_back():
    model = small()
    first, second = eval_guard(models_or_loader=model), eval_guard(models_or_loader=model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model[1].training
    second.__exit__(None, None, None)
    assert all(m.training for m in model.modules())


def test_leases_left_out_of_order():
    model = small()
    outer, inner = eval_guard(model), eval_guard(model, train_mode=True)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert model[1].training
    inner.__exit__(None, None, None)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_modes_left_in_any_order_end_with_the_last(order):
    guards = [call_guard(), autocast_guard(dtype="bfloat16"), grad_guard(need_grads=True)]
    for guard in guards:
        guard.__enter__()
    for at in order:
        guards[at].__exit__(None, None, None)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_tasks_that_await_inside_overlapping_guards_leave_no_mode():
    async def task(begin, end):
        for _ in range(begin):
            await asyncio.sleep(0)
        with call_guard():
            for _ in range(end):
                await asyncio.sleep(0)

    async def both():
        await asyncio.gather(task(0, 3), task(1, 5))

    with pytest.warns(AwaitInsideGuardWarning):
        asyncio.run(both())
    assert not torch.is_inference_mode_enabled()


def test_part_of_a_model_is_handed_over():
    model = small()
    whole, part = eval_guard(model), eval_guard(model[1])
    whole.__enter__()
    part.__enter__()
    whole.__exit__(None, None, None)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    part.__exit__(None, None, None)
    assert model[1].training


def test_sixteen_threads_on_one_module():
    model = torch.nn.Sequential(*(small() for _ in range(8)))
    wrong = []
    start = threading.Barrier(16)

    def work():
        start.wait()
        for _ in range(60):
            with call_guard(models=model) as g:
                if any(m.training for m in model.modules()):
                    wrong.append("training")
                g(model[0], torch.ones(1, 3))
            with call_guard() as g:
                g(model, torch.ones(1, 3))

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
    assert all(m.training for m in model.modules())


def test_foreign_exit_is_refused():
    guard = call_guard()
    guard.__enter__()
    error = in_thread(lambda: guard.__exit__(None, None, None))
    assert isinstance(error, RuntimeError)
    assert "in the thread that entered it" in str(error)
    assert "thread that entered" in str(in_thread(lambda: guard(1)))
    assert modes() == (True, False)
    guard.__exit__(None, None, None)
    assert modes() == (False, True)
    with pytest.raises(RuntimeError, match="to be entered before it is exited"):
        guard.__exit__(None, None, None)


def test_a_dropped_guard_leaves():
    model = small()
    call_guard(models=model).__enter__()
    assert modes() == (False, True)
    assert model.training


# --- autocast -------------------------------------------------------------------------------------


def test_cpu_bf16_is_a_choice():
    """C9: bf16 on the cpu, and no autocast for cuda where there is none."""
    model = torch.nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with call_guard(effective_dtype=torch.bfloat16, device_list="cpu") as g:
            assert g(model, torch.ones(1, 2)).dtype is torch.bfloat16
        with autocast_guard(dtype="bf16", device_list="cpu"):
            assert torch.is_autocast_enabled("cpu")
    with call_guard() as g:
        assert g(model, torch.ones(1, 2)).dtype is torch.float32
    with autocast_guard(dtype="fp32"), autocast_guard(dtype="bf16", enabled_override=False):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="to autocast to"):
        call_guard(effective_dtype=torch.float64)


# --- exceptions -----------------------------------------------------------------------------------


class Held(torch.nn.Module):
    def __init__(self, kind=RuntimeError):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.kind = kind
        self.seen = []

    def forward(self, x):
        activation = self.layer(x) * 2
        self.seen += [weakref.ref(activation), weakref.ref(x)]
        raise self.kind("inside")


def failing(kind=RuntimeError):
    """A failing guarded call, its exception, and weak references to what it held."""
    model = Held(kind)
    seen = model.seen
    seen.append(weakref.ref(model))

    def body(model):
        with call_guard() as g:
            g(model, torch.ones(1, 4))

    try:
        body(model)
    except kind as error:
        return error, seen
    raise AssertionError


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_inside_the_call_stays_alive(no_collector, kind):
    """A2, A5: the kept exception holds neither activation, input nor model; no gc."""
    model = Held(kind)
    x = torch.ones(1, 4)
    refs = [weakref.ref(model), weakref.ref(x)]

    def body(holder):
        with call_guard() as g:
            g(holder[0], holder[1])

    holder = [model, x]
    del model, x
    try:
        body(holder)
    except kind as error:
        kept = error
    refs += holder[0].seen
    holder.clear()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert "inside" in str(kept)
    assert kept.__traceback__ is not None


def test_a_users_helper_that_fails_inside_the_with(no_collector):
    """A3: a failure inside the block but outside g(...) is sanitized too."""
    refs = []

    def helper():
        model = small()
        refs.append(weakref.ref(model))
        refs.append(weakref.ref(model[0].weight))
        raise ValueError("helper")

    def block():
        with call_guard():
            inside = torch.ones(7)
            refs.append(weakref.ref(inside))
            helper()

    try:
        block()
    except ValueError as error:
        kept = error
    assert [ref() for ref in refs] == [None, None, None]
    assert kept.__traceback__.tb_next is not None


def test_a_decorated_function_that_fails(no_collector):
    """A2: neither the wrapper's arguments nor the function's locals stay."""
    refs = []

    @call_guard
    def function(x):
        y = x * 2
        refs.extend([weakref.ref(x), weakref.ref(y)])
        raise KeyboardInterrupt

    try:
        function(torch.ones(3))
    except KeyboardInterrupt as error:
        kept = error
    assert [ref() for ref in refs] == [None, None]
    assert kept.__traceback__ is not None


def test_caught_inside_the_block(no_collector):
    model = Held()
    kept = None
    with call_guard() as g:
        try:
            g(model, torch.ones(1, 4))
        except RuntimeError as error:
            kept = error
    assert [ref() for ref in model.seen] == [None, None]
    assert kept is not None


def test_the_same_exception_goes_on():
    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, call_guard():
        raise mine
    assert caught.value is mine


def test_what_the_caller_was_handling_is_left_alone():
    """A10: only what is raised inside is sanitized."""
    try:
        outer_local = torch.ones(2)
        raise KeyError("outer")
    except KeyError as outer:
        frames = outer.__traceback__
        with pytest.raises(ValueError, match="inner"), call_guard():
            raise ValueError("inner")  # noqa: B904
        assert outer.__traceback__ is frames
        assert frames.tb_frame.f_locals["outer_local"] is outer_local


def test_sanitizing_can_be_turned_off():
    def body():
        secret = torch.ones(3)
        raise ValueError("x", secret.shape)

    with pytest.raises(ValueError, match="x") as caught, call_guard(sanitize_all_exceptions=False):
        body()
    assert "secret" in caught.traceback[-1].frame.f_locals


def test_keep():
    class Mine(Exception):
        pass

    with pytest.raises(Mine) as caught, call_guard(keep=(Mine,)):
        raise Mine(torch.ones(2))
    assert isinstance(caught.value.args[0], torch.Tensor)
    with pytest.raises(Mine) as caught, call_guard():
        raise Mine(torch.ones(2))
    assert not isinstance(caught.value.args[0], torch.Tensor)
    with pytest.raises(TypeError, match="keep: expected exception types"):
        call_guard(keep=(3,))
    with pytest.raises(TypeError, match=r"keep: expected exception types, got 3; write"):
        call_guard(keep=3)


def test_errors_in_entering_are_not_masked():
    """A12: the real error shows, not a NameError of the clean-up."""
    with pytest.raises(ValueError, match="device"), call_guard(device_list="nonsense"):
        pass


# --- memory ---------------------------------------------------------------------------------------


def test_empty_cache_and_gc_only_where_needed(monkeypatch):
    """C10: nothing is waited for, emptied or collected on success."""
    calls = []
    monkeypatch.setattr(calling.devices, "synchronize", lambda d=None: calls.append("sync"))
    monkeypatch.setattr(calling.devices, "empty_cache", lambda d=None: calls.append("empty"))
    monkeypatch.setattr(calling.gc, "collect", lambda: calls.append("gc"))
    cached = 0
    monkeypatch.setattr(calling.devices, "memory_cached", lambda device: cached)
    with call_guard() as g:
        g(torch.ones(1))
    assert calls == []
    with pytest.raises(ValueError, match="x"), call_guard():
        raise ValueError("x")
    assert calls == ["sync"]  # no memory was released
    calls.clear()
    cached = 1
    with pytest.raises(ValueError, match="x"), call_guard():
        raise ValueError("x")
    assert calls == ["sync", "empty"]
    calls.clear()
    with pytest.raises(ValueError, match="x"), call_guard(garbage_collect_on_exception=True):
        raise ValueError("x")
    assert calls == ["sync", "gc", "empty"]
    calls.clear()
    with call_guard(garbage_collect_on_success=True):
        pass
    assert "gc" in calls


def test_memory_of_a_block():
    with call_guard(device_list="cpu") as g:
        before = g.memory["cpu"].before
        held = torch.ones(8_000_000)
        held.add_(1)
    use = g.memory["cpu"]
    assert use.before == before > 1_000_000
    assert use.after >= before + 30_000_000
    assert use.peak >= use.after - 1_000_000
    assert list(g.memory) == [torch.device("cpu")]
    with pytest.raises(KeyError, match="device_list"):
        g.memory["meta"]
    with call_guard() as g:
        g(1)
    assert g.memory["cpu"].before > 0
    with call_guard() as g:
        pass
    with pytest.raises(RuntimeError, match="pass device_list= or call g"):
        _ = g.memory


@pytest.mark.parametrize("models", ["bert", 3, torch.ones(1)])
def test_models_that_are_none_get_one_sentence(models):
    with pytest.raises(TypeError, match=r"^models: expected a module .*; pass models=model"):
        call_guard(models=models)


class Oom:
    def __init__(self, times, error=None):
        self.left, self.calls = times, 0
        self.error = error or torch.OutOfMemoryError("out of memory")

    def __call__(self, x=0):
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return x


def test_on_oom_raise_is_the_default():
    oom = Oom(1)
    with pytest.raises(torch.OutOfMemoryError), call_guard() as g:
        g(oom)
    assert oom.calls == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_on_oom_retry_once(monkeypatch, error):
    freed = []
    monkeypatch.setattr(calling.gc, "collect", lambda: freed.append(1))
    with call_guard(on_oom="retry") as g:
        assert g(Oom(1, error), 5) == 5
    assert freed == [1]
    twice = Oom(2, error)
    with pytest.raises(type(error)), call_guard(on_oom="retry") as g:
        g(twice)
    assert twice.calls == 2
    assert call_guard(on_oom="retry")(Oom(1, error))(4) == 4
    other = Oom(1, ValueError("xx"))
    with pytest.raises(ValueError, match="x"), call_guard(on_oom="retry") as g:
        g(other)
    assert other.calls == 1


def test_on_oom_hook():
    seen = []

    def hook(error):
        seen.append(error)
        return len(seen) < 3

    with call_guard(on_oom=hook) as g:
        assert g(Oom(2), 1) == 1
    assert len(seen) == 2
    with pytest.raises(torch.OutOfMemoryError), call_guard(on_oom=hook) as g:
        g(Oom(9))

    def bad(error):
        raise LookupError("hook")

    with pytest.raises(LookupError, match="hook") as caught, call_guard(on_oom=bad) as g:
        g(Oom(1))
    assert isinstance(caught.value.__context__, torch.OutOfMemoryError)
    with pytest.raises(ValueError, match="on_oom: expected"):
        call_guard(on_oom="again")


def test_the_first_try_holds_nothing_at_the_second(no_collector):
    refs, alive = [], []

    def attempt():
        if refs:
            alive.append(refs[0]())
            return 1
        big = torch.ones(1000)
        refs.append(weakref.ref(big))
        raise MemoryError

    with call_guard(on_oom="retry") as g:
        assert g(attempt) == 1
    assert alive == [None]


# --- event loops ----------------------------------------------------------------------------------


def test_await_inside_with_is_noticed():
    async def bad():
        with call_guard():
            await asyncio.sleep(0)

    async def good():
        with call_guard() as g:
            g(1)
        await asyncio.sleep(0)

    with pytest.warns(AwaitInsideGuardWarning, match="decorate the coroutine"):
        asyncio.run(bad())
    asyncio.run(good())


def test_await_is_noticed_without_hiding_an_exception():
    async def bad():
        with call_guard():
            await asyncio.sleep(0)
            raise KeyError("mine")

    with pytest.warns(AwaitInsideGuardWarning), pytest.raises(KeyError, match="mine"):
        asyncio.run(bad())


# --- the settings by position ---------------------------------------------------------------------


def test_the_c_type_checks_what_it_is_given():
    Guard = _C.Guard
    for wrong in (
        (1,),
        (9, 0, None, None, None, None, None, None),
        (1, 99, None, None, None, None, None, None),
        (1, 0, [small()], None, None, None, None, None),
        (1, 0, (3,), None, None, None, None, None),
        (1, 0, None, 3, None, None, None, None),
        ("x", 0, None, None, None, None, None, None),
    ):
        with pytest.raises((TypeError, ValueError)):
            Guard(*wrong)
    with pytest.raises(TypeError):
        Guard(kind=1)


def test_no_leak():
    script = Path(__file__).parent / "isolated" / "leak_guards.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_failing_allocations():
    pytest.importorskip("_testcapi")
    script = Path(__file__).parent / "isolated" / "nomemory_guards.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
