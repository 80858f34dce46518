"""Between any two steps: interrupts, forks, finalizers, and others who change the books."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import gc
import os
import random
import signal
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest

from opguard import pools
from opguard.pools import _requests
from opguard.pools.resource_pools import ResourcePool
from pools_kit import MIB, Thing, ThingUser, elsewhere, managed, settled_pools, until

WAIT = 10.0
# After these an interpreter looks whether there was a signal.
BREAKS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}


@pytest.fixture
def cpu(tmp_path):
    with settled_pools(tmp_path, 2 * MIB) as management:
        yield management


def interrupted(function, first, second=None):
    """KeyboardInterrupt at that step of the pools, and again so many calls later: how often."""
    count, later, before, came = 0, 0, {}, 0

    def ours(frame):
        if "/opguard/pools/" not in frame.f_code.co_filename:
            return False
        while frame and frame.f_code.co_name not in ("forget", "__del__"):
            frame = frame.f_back
        return frame is None  # an interrupt in a finalizer is nobody's

    def trace(frame, event, _arg):
        nonlocal count, came
        if not ours(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            was = before.get(id(frame))
            before[id(frame)] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            count += was in BREAKS
            if was in BREAKS and count == first:
                came += 1
                raise KeyboardInterrupt  # which also ends the tracing
        return trace

    def profile(frame, event, _arg):
        nonlocal later, came
        if came and ours(frame) and event in ("call", "c_return"):
            later += 1
            if later == second:
                came += 1
                sys.setprofile(None)
                raise KeyboardInterrupt

    outer = sys.gettrace()
    sys.setprofile(profile)
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        sys.setprofile(None)  # what only the traceback held goes now, by finalizers
        assert came
    finally:
        sys.settrace(outer)
        sys.setprofile(None)
    return came


# --- interrupts -----------------------------------------------------------------------------------


def lease(handle):
    with handle.lease(WAIT):
        pass


@pytest.mark.parametrize("what", ["lease", "free", "reserve"])
def test_a_second_interrupt_inside_the_cleaning_up_after_the_first(cpu, what):
    a, b = managed(MIB, 2 * MIB)
    do = {
        "lease": lambda: lease(b),
        "free": cpu.free,
        "reserve": lambda: cpu.release(cpu.reserve("cpu", 2 * MIB)),
    }[what]
    twice, chance = 0, random.Random(0)
    for first in range(1, 200, 2):
        lease(a)
        came = interrupted(do, first, chance.randint(1, 15))
        twice += came == 2
        if not came:
            break
        for unit in cpu.entries:
            assert cpu.ledger.holders(unit) == (), first
            assert cpu.state(unit) in (0, 2), first
        info = cpu.ledger.pool(0)
        assert info.used <= 2 * MIB, first
        assert info.extra == 0, first
        elsewhere(lambda: lease(a))
        elsewhere(lambda: lease(b))
    assert twice > (10 if what == "lease" else 2)


def test_what_was_interrupted_on_its_way_out_is_gone(cpu):
    """It gives back what it has left, so nobody may find it there."""
    there = []

    def out():
        there.clear()
        if interrupts:
            raise interrupts.pop()

    interrupts = []
    a, b = managed(MIB, 2 * MIB)
    a.obj.does.update({"in": lambda: there.append("a"), "out": out})
    lease(a)
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        lease(b)
    with a.lease(WAIT):
        assert there == ["a"], "it was taken for one that is there"


def test_interrupted_at_any_step_manage_can_be_called_again(cpu):
    hits = 0
    for step in range(1, 400, 2):
        thing = Thing(MIB)
        came = interrupted(lambda thing=thing: pools.manage(thing), step)
        if not came:
            break
        hits += 1
        gc.collect()
        cpu.drain()

        def again(thing=thing):
            handle = pools.manage(thing)
            lease(handle)
            pools.unmanage(handle)

        elsewhere(again)
        del again, thing
        gc.collect()
        cpu.drain()
        assert (cpu.entries, cpu.ledger.units(0)) == ({}, ()), step
    assert hits > 20


def test_interrupted_at_any_step_a_task_leaves_nothing(cpu, monkeypatch):
    """Once the lease has it, the lease alone gives it back, when nobody enters its block."""
    (a,) = managed(MIB)
    told, hits = [], 0
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    async def main():
        async with a.lease(WAIT):
            pass

    for step in range(1, 200, 2):
        a.offload()
        cpu.free()
        if not interrupted(lambda: asyncio.run(main()), step):
            break
        hits += 1
        gc.collect()
        until(lambda: cpu.ledger.holders(a.entry.all_units[0]) == ())
        until(lambda: cpu.state(a.entry.all_units[0]) in (0, 2))
        elsewhere(lambda: lease(a))
    assert hits > 20
    assert [t for t in told if t.exc_type is not RuntimeWarning] == []  # never awaited: true


def test_a_task_cancelled_while_its_thread_moves_is_cleaned_up_once(cpu, monkeypatch):
    """By the thread, whatever the task does meanwhile: of both at once, one would fail."""
    (a,) = managed(MIB)
    begun, fails, halfway, go_on = (threading.Event() for _ in range(4))

    def bring():
        begun.set()
        assert fails.wait(WAIT)
        raise OSError("no")

    a.obj.does["in"] = bring
    open_latch, undo = cpu.open_latch, _requests.Ask.undo

    def slowly(unit):
        if threading.current_thread() is not threading.main_thread():
            halfway.set()
            assert go_on.wait(WAIT)
        open_latch(unit)

    def meanwhile(ask):
        if threading.current_thread() is threading.main_thread():
            fails.set()
            assert halfway.wait(WAIT)
        undo(ask)

    monkeypatch.setattr(cpu, "open_latch", slowly)
    monkeypatch.setattr(_requests.Ask, "undo", meanwhile)

    async def main():
        task = asyncio.ensure_future(a.lease().__aenter__())
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    go_on.set()
    until(lambda: cpu.state(a.entry.all_units[0]) == 0)


# --- forks ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_nothing_of_threads_that_it_does_not_have(cpu):
    """Neither what they reserved nor what they were about to wait for, nor what was being told."""
    (b,) = managed(2 * MIB)
    reserved, let_go = threading.Event(), threading.Event()

    def reserve():
        token = cpu.reserve("cpu", MIB)
        reserved.set()
        assert let_go.wait(WAIT)
        cpu.release(token)

    def about_to_wait():
        owner = pools.management._C.pool_owner(cpu.ledger)
        ticket = cpu.ledger.request(owner.id, b.entry.all_units).ticket
        reserved.set()
        assert let_go.wait(WAIT)
        cpu.ledger.cancel(ticket)

    threads = []
    for function in (reserve, about_to_wait):
        reserved.clear()
        threads.append(threading.Thread(target=function))
        threads[-1].start()
        assert reserved.wait(WAIT)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(5)
            assert (cpu.ledger.waiting(), cpu.pool("cpu").used) == ((), 0)
            lease(b)
            os._exit(0)
        os._exit(1)
    let_go.set()
    for thread in threads:
        thread.join(WAIT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_ends_what_threads_began_that_it_does_not_have(cpu, monkeypatch):
    """A load that another thread asked for is undone, and a generator that it entered closed."""
    (b,) = managed(2 * MIB)
    begun, let_go = threading.Event(), threading.Event()

    def hold():
        with b.lease():
            yield

    generator = hold()

    def begin():
        b.load()
        next(generator)
        begun.set()
        assert let_go.wait(WAIT)

    thread = threading.Thread(target=begin)
    thread.start()
    assert begun.wait(WAIT)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(5)
            monkeypatch.setattr(sys, "unraisablehook", lambda told: os._exit(2))
            generator.close()
            b.offload()
            os._exit(b.entry.seat.leases)
        os._exit(1)
    let_go.set()
    thread.join(WAIT)
    generator.close()
    b.offload()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- finalizers, and others at the same time ------------------------------------------------------


def test_a_finalizer_may_manage_while_its_thread_manages(cpu, monkeypatch):
    """It runs at any allocation, also in the middle of this."""
    made, late = [], []

    class Late:
        def __del__(self):
            made.append(pools.manage(Thing(1)))

    new_name = cpu._new_name
    late.append(Late())

    def collects(name):
        if late:
            del late[:]
        return new_name(name)

    monkeypatch.setattr(cpu, "_new_name", collects)
    elsewhere(lambda: made.append(pools.manage(Thing(1), name="other")))
    cpu.stop()
    elsewhere(lambda: made.append(pools.manage(Thing(1))))
    assert len({handle.name for handle in made}) == 3


def test_without_a_thread_to_be_had_objects_are_managed_all_the_same(cpu, monkeypatch):
    cpu.stop()

    def none(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        (a,) = managed(2 * MIB)
        lease(a)
        a.load().offload()
        lease(managed(MIB)[0])
    assert not a.loaded


def test_unmanaged_by_two_at_once(cpu, monkeypatch):
    (a,) = managed(MIB)
    lease(a)
    remove, once = cpu.ledger.remove_unit, []

    class Ledger:
        def __getattr__(self, name):
            return getattr(ledger, name)

        def remove_unit(self, unit):
            if not once:
                once.append(unit)
                elsewhere(lambda: pools.unmanage(a.obj))
            return remove(unit)

    ledger = cpu.ledger
    monkeypatch.setattr(cpu, "ledger", Ledger())
    pools.unmanage(a.obj)
    assert once
    assert cpu.entries == {}


def test_what_cannot_be_counted_is_not_managed_at_all(cpu):
    """Two pools, and the second refuses: nothing of the first stays, and the user is closed."""
    users = []

    class Other(Thing):
        pass

    class Two(ThingUser):
        def needs(self):
            users.append(self)
            return {"cpu": 1, "more": -1}

    class More(ResourcePool):
        def capacity(self):
            return MIB

    cpu.add_pool(More("more"), MIB)
    pools.register_user(Other, Two)
    thing = Other()
    with pytest.raises(ValueError, match="0 to 2"):
        pools.manage(thing)
    assert (cpu.entries, cpu.ledger.units(0), cpu.find(thing)) == ({}, (), None)
    assert users[0].closed


def test_marks_of_last_uses_go_with_who_was_used(cpu, monkeypatch):
    """A mark is an event of the driver: who dies idle has one that nobody waits for any more."""

    marks = weakref.WeakSet()

    class Mark:
        def __init__(self):
            marks.add(self)

    monkeypatch.setattr(ResourcePool, "accelerator", SimpleNamespace(mark=Mark))
    handles = managed(MIB, MIB)
    for handle in handles:
        lease(handle)
    assert len(marks) == 1
    del handle, handles
    until(lambda: not cpu.drain() and not cpu.entries)
    assert not marks


def test_close_lets_go_of_all_but_what_is_in_use(cpu):
    a, b, c = managed(MIB, MIB, MIB)
    with b.lease():
        cpu.close()
        assert [cpu.find(handle.obj) is None for handle in (a, b, c)] == [True, False, True]


def test_a_report_while_users_go(cpu, monkeypatch):
    a, b = managed(MIB, MIB)
    unit, gone = cpu.unit, []

    def goes(name):
        info = unit(name)
        if name == a.entry.all_units[0] and not gone:
            gone.append(name)
            pools.unmanage(a)
        return info

    monkeypatch.setattr(cpu, "unit", goes)
    assert "thing1" in str(pools.report())
    assert gone
    lease(b)


# --- bytes that are nobody's ----------------------------------------------------------------------


def test_bytes_are_reserved_by_the_short_name_too_and_noted_when_they_go(cpu):
    class Toy(ResourcePool):
        def capacity(self):
            return MIB

    cpu.add_pool(Toy("toy:0"), MIB)
    token = cpu.reserve("toy", 10)
    assert cpu.pool("toy").used == 10
    cpu.release(token)
    assert cpu.pool("toy").used == 0
    assert [used for _, pool, used in cpu.snapshot().events if pool == "toy:0"] == [10, 0]
