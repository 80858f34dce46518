"""Ctrl-C at any step of a block of patches: no turn, lease or weight is left half-way."""

from __future__ import annotations

import contextlib
import dis
import gc
import sys
import weakref

import pytest
import torch

from opguard import pools
from opguard.pools import AttributeCommit, CommitObjectProxy, _patched, _undoing
from pools_kit import MIB, Adds, Thing, elsewhere, fresh_pools

# After these an interpreter looks whether there was a signal.
BREAKS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}


def interrupted_at(step, function, second=None):
    """Raises KeyboardInterrupt at so many-th of the steps of the pools; where that was, or None.

    Args:
        second: again so many steps later, in the cleaning up.
    """
    count, goal, before, came = 0, step, {}, []

    def trace(frame, event, _arg):
        nonlocal count, goal
        code = frame.f_code
        if "/opguard/pools/" not in code.co_filename or code.co_name == "forget":
            return None  # an interrupt in a finalizer is nobody's
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            was = before.get(id(frame))
            before[id(frame)] = dis.opname[code.co_code[frame.f_lasti]]
            count += was in BREAKS
            if was in BREAKS and count == goal:
                came.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
                goal = count + second if second and len(came) == 1 else 0
                before.clear()
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def go_on(frame, _event, _arg):
        """A trace that raised is off; a profile, which is not, puts it on again."""
        if goal and len(came) == 1 and sys.gettrace() is None:
            sys.settrace(trace)
            while frame is not None:
                if "/opguard/pools/" in frame.f_code.co_filename:
                    frame.f_trace, frame.f_trace_lines = trace, False
                    frame.f_trace_opcodes = True
                frame = frame.f_back

    outer, profile = sys.gettrace(), sys.getprofile()
    sys.setprofile(go_on if second else profile)
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        assert came
    finally:
        sys.settrace(outer)
        sys.setprofile(profile)
    return " and ".join(came) or None


@pytest.mark.parametrize("make", [Adds, lambda: AttributeCommit("mark", 3)], ids=["delta", "set"])
@pytest.mark.parametrize("managed", [False, True], ids=["bare", "managed"])
def test_an_interrupt_at_any_step_of_a_block(tmp_path, make, managed):
    stride, hits = 5 if managed else 3, 0
    with fresh_pools(tmp_path, MIB) as management:
        step, came = 1, ""
        while came is not None:
            model = torch.nn.Linear(8, 8).requires_grad_(False)
            handle = pools.manage(model) if managed else None
            before, commit = model.weight.clone(), make()
            proxy = CommitObjectProxy(model, [commit])

            def block(proxy=proxy):
                with proxy:
                    pass

            came = interrupted_at(step, block)
            hits += came is not None

            def again(model=model, commit=commit, before=before):
                with CommitObjectProxy(model, [commit], timeout=5):
                    assert hasattr(model, "mark") or not torch.equal(model.weight, before)
                with CommitObjectProxy(model, [], timeout=5):
                    assert torch.equal(model.weight, before)

            elsewhere(again, 10, f"after {came}")
            assert torch.equal(model.weight, before), came
            assert not hasattr(model, "mark"), came
            assert id(model.weight) not in _patched._states
            if handle is not None:
                units = handle.entry.all_units
                assert not any(management.ledger.holders(unit) for unit in units), came
            del proxy, block, again, model, handle
            step += stride
        gc.collect()
    assert hits > 20


# One that comes in a finalizer is swallowed and said; what the proxy left is in order all the same.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", [Adds, lambda: AttributeCommit("mark", 3)], ids=["delta", "set"])
def test_a_second_interrupt_inside_the_cleaning_up(make):
    hits, step = 0, 1
    while True:
        came = None
        for second in (2, 5, 11, 23):
            model = torch.nn.Linear(8, 8).requires_grad_(False)
            before, commit = model.weight.clone(), make()
            proxy = CommitObjectProxy(model, [commit])

            def block(proxy=proxy):
                with proxy:
                    pass

            came = interrupted_at(step + second % 3, block, second)
            hits += " and " in (came or "")
            del proxy, block
            with CommitObjectProxy(model, [commit], timeout=0):
                assert hasattr(model, "mark") or not torch.equal(model.weight, before), came
            assert torch.equal(model.weight, before), came
            assert not hasattr(model, "mark"), came
            assert id(model.weight) not in _patched._states, came
        if came is None:
            break
        step += 7
    assert hits > 20


def test_weights_that_are_back_already_are_not_said_to_have_changed(monkeypatch):
    """Both interrupts come after they were pointed back, and before that is noted."""
    strike, calls = _patched._Patch._strike, []

    def interrupted(patch):
        calls.append(patch)
        if len(calls) <= 2:
            raise KeyboardInterrupt
        strike(patch)

    monkeypatch.setattr(_patched._Patch, "_strike", interrupted)
    model = torch.nn.Linear(8, 8).requires_grad_(False)
    before, proxy = model.weight.clone(), CommitObjectProxy(model, [Adds()])
    with pytest.raises(KeyboardInterrupt), proxy:
        pass
    del proxy
    gc.collect()
    assert len(calls) > 2
    assert torch.equal(model.weight, before)
    assert id(model.weight) not in _patched._states


def what_evicts(how, management, handles):
    return {
        "free": pools.free,
        "request": lambda: handles[2].lease().__enter__(),
        "budget": lambda: setattr(management.pool("cpu"), "budget", MIB),
        "offload": lambda: (handles[0].let_go(), management.reclaim_idle()),
    }[how]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["free", "request", "budget", "offload"])
def test_what_the_ledger_says_after_an_interrupt_is_so(tmp_path, monkeypatch, how):
    wrong, step, came = [], 1, ""
    with fresh_pools(tmp_path, 2 * MIB) as management:
        monkeypatch.setattr(management._reclaimer, "start", lambda: None)
        while came is not None:
            things = [Thing() for _ in range(3)]
            handles = [pools.manage(thing) for thing in things]
            for handle in handles[:2]:
                with handle.lease():
                    pass
            came = interrupted_at(step, what_evicts(how, management, handles))
            management.pool("cpu").budget = 2 * MIB
            for handle, thing in zip(handles, things, strict=True):
                there = thing.log[-1:] == ["in"]
                if handle.loaded != there:
                    wrong.append(f"{came}: {handle.name} is in: {there}, said: {handle.loaded}")
            del things, handles, handle, thing
            management.drain()
            step += 1
    assert step > 50
    assert not wrong


def test_a_second_interrupt_keeps_nothing_of_whom_it_interrupted():
    calls = []

    def clean():
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt

    def interrupted():
        thing = torch.nn.Linear(2, 2)
        things.append(weakref.ref(thing))
        _undoing.through(clean)

    things = []
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            interrupted()
        assert len(calls) == 2
        assert things[0]() is None
    finally:
        gc.enable()
