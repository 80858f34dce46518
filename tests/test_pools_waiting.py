"""Threads that wait for bytes: order, timeouts, deadlocks, failures, forks; nothing stays."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from opguard import pools
from pools_kit import MIB, Holder, Thing, managed, settled_pools, until

WAIT = 10.0


@pytest.fixture
def cpu(tmp_path):
    with settled_pools(tmp_path, 2 * MIB) as management:
        yield management


def run(function):
    """In a thread of its own; returns what gives its result."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def waiting(management, count=1):
    until(lambda: len(management.ledger.waiting()) == count)


def test_who_waits_goes_on_when_bytes_come_free(cpu):
    a, b = managed(2 * MIB, 2 * MIB)
    holder = Holder(a)
    future = run(lambda: b.load(WAIT).loaded)
    waiting(cpu)
    assert not b.loaded
    holder.let_go()
    assert future.result(WAIT) is True
    assert a.obj.log == ["in", "out"]
    b.offload()


def test_the_time_is_kept_and_the_holder_named(cpu):
    a, b = managed(2 * MIB, MIB)
    holder = Holder(a)
    started = time.monotonic()
    with pytest.raises(pools.LeaseTimeout, match=r"'thing1' was not free within 0.05 s") as caught:
        b.load(0.05)
    assert 0.04 < time.monotonic() - started < 2
    assert caught.value.holders
    assert "thread holder holds 'thing0' since" in caught.value.holders[0]
    assert "pools_kit.py" in caught.value.holders[0]
    with pytest.raises(TimeoutError):
        b.load(0)
    assert cpu.ledger.waiting() == ()
    holder.let_go()
    b.load(0).offload()


def test_what_never_fits_is_refused_at_once_with_figures(cpu):
    (large,) = managed(3 * MIB)
    with pytest.raises(pools.PoolRefused, match=r"3.0 MiB needed, 2.0 MiB can be had.*cpu 2.0"):
        large.load(WAIT)
    (small,) = managed(MIB)
    small.pinned = True
    small.load()
    small.offload()
    (two,) = managed(2 * MIB)
    with pytest.raises(pools.PoolRefused, match=r"pinned"):
        two.load(WAIT)
    assert small.loaded


def test_first_come_first_served(cpu):
    a, large, small = managed(2 * MIB, 2 * MIB, MIB)
    holder, order = Holder(a), []

    def use(handle, name):
        with handle.lease(WAIT):
            order.append(name)

    first = run(lambda: use(large, "large"))
    waiting(cpu)
    second = run(lambda: use(small, "small"))
    waiting(cpu, 2)
    holder.let_go()
    first.result(WAIT)
    second.result(WAIT)
    assert order == ["large", "small"], "a large request is not starved by small ones"


def test_who_holds_something_overtakes(cpu):
    a, b, c = managed(MIB, MIB, 2 * MIB)
    with a.lease():
        big = run(lambda: c.load(WAIT))
        waiting(cpu)
        with b.lease(WAIT), a.lease(WAIT):
            assert not c.loaded
    assert big.result(WAIT).loaded
    c.offload()


def test_those_who_wait_for_each_other_are_told_at_once(cpu):
    a, b = managed(MIB, MIB)
    c, d = managed(MIB, MIB)
    go = threading.Barrier(2)
    outcomes = []

    def use(first, second):
        try:
            with first.lease(WAIT):
                go.wait(WAIT)
                with second.lease(WAIT):
                    outcomes.append("both")
        except pools.Deadlock as error:
            outcomes.append(error)

    futures = [run(lambda: use(a, c)), run(lambda: use(b, d))]
    for future in futures:
        future.result(WAIT)
    refused = [outcome for outcome in outcomes if outcome != "both"]
    assert len(outcomes) == 2
    assert len(refused) == 1, outcomes
    assert "holds 'thing" in str(refused[0])
    assert refused[0].holders


def test_a_set_is_had_whole_or_not_at_all(cpu):
    a, b = managed(MIB, MIB)
    seat = cpu.seat((*a.seat.units, *b.seat.units))
    holder = Holder(managed(MIB)[0])
    future = run(lambda: pools.management._C.Lease(seat, None, WAIT).__enter__())
    waiting(cpu)
    assert not a.loaded
    assert not b.loaded
    holder.let_go()
    future.result(WAIT)
    assert a.loaded
    assert b.loaded
    del future
    gc.collect()


def test_a_load_that_fails_fails_the_set_and_the_next_one_tries(cpu):
    fails = [OSError("no such weights")]

    def bring():
        if fails:
            raise fails.pop()

    good, bad = Thing(MIB), Thing(MIB, **{"in": bring})
    a, b = pools.manage(good), pools.manage(bad, name="bad")
    seat = cpu.seat((*a.seat.units, *b.seat.units))
    lease = pools.management._C.Lease(seat, None, None)
    with pytest.raises(OSError, match="no such weights") as caught:
        lease.__enter__()
    assert "while bringing in 'bad'" in "".join(traceback.format_exception(caught.value))
    assert not b.loaded
    assert cpu.free() in (0, MIB)
    with lease:
        assert a.loaded
        assert b.loaded


def test_others_who_wait_for_a_load_that_fails_load_themselves(cpu):
    started, go, fails = threading.Event(), threading.Event(), [RuntimeError("first")]

    def bring():
        if fails:
            started.set()
            assert go.wait(WAIT)
            raise fails.pop()

    handle = pools.manage(Thing(MIB, **{"in": bring}))
    first = run(lambda: handle.load(WAIT))
    assert started.wait(WAIT)
    others = [run(lambda: handle.load(WAIT).loaded) for _ in range(3)]
    until(lambda: cpu.unit(handle.seat.units[0]).leases == 4 or len(cpu.ledger.waiting()) == 3)
    go.set()
    with pytest.raises(RuntimeError, match="first"):
        first.result(WAIT)
    assert [other.result(WAIT) for other in others] == [True, True, True]
    assert handle.obj.log == ["in", "in"], "one of them loads, the others wait for it"
    for _ in others:
        handle.offload()


def test_who_waits_for_anothers_load_may_give_up(cpu):
    started, go = threading.Event(), threading.Event()

    def bring():
        started.set()
        assert go.wait(WAIT)

    handle = pools.manage(Thing(MIB, **{"in": bring}))
    first = run(lambda: handle.load(WAIT).loaded)
    assert started.wait(WAIT)
    with pytest.raises(pools.LeaseTimeout):
        handle.load(0.05)
    go.set()
    assert first.result(WAIT) is True
    handle.offload()


def test_an_eviction_that_fails_takes_another_victim_and_says_why_if_there_is_none(cpu):
    def full():
        raise OSError(28, "No space left on device")

    stuck, other, third = (pools.manage(t) for t in (Thing(MIB, out=full), Thing(MIB), Thing(MIB)))
    for handle in (stuck, other):
        handle.load()
        handle.offload()
        handle.load()  # forgiven
        handle._loads.pop().__exit__(None, None, None)
    third.load(WAIT)
    assert stuck.loaded
    assert not other.loaded
    (large,) = managed(2 * MIB)
    third.offload()
    with pytest.raises(pools.PoolRefused, match=r"would not go|could not be given back") as caught:
        large.load(WAIT)
    assert stuck.loaded
    assert "No space" in str(caught.value) or "would not go" in str(caught.value)
    assert cpu.pool("cpu").used <= cpu.pool("cpu").budget
    assert "No space" in next(u.trouble for u in cpu.snapshot().users if u.trouble)


def test_an_interrupt_while_loading_leaves_nothing(cpu):
    interrupts = [KeyboardInterrupt()]

    def bring():
        if interrupts:
            raise interrupts.pop()

    handle = pools.manage(Thing(MIB, **{"in": bring}))
    with pytest.raises(KeyboardInterrupt):
        handle.load()
    assert cpu.pool("cpu").used == 0
    assert handle.load().loaded
    handle.offload()


def test_an_interrupt_while_waiting_leaves_nothing(cpu):
    import signal

    a, b = managed(2 * MIB, MIB)
    holder = Holder(a)
    main = threading.get_ident()
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        b.load(WAIT)
    assert cpu.ledger.waiting() == ()
    holder.let_go()
    b.load(WAIT).offload()


def test_a_budget_lowered_under_who_waits_answers_it(cpu):
    a, b = managed(MIB, 2 * MIB)
    holder = Holder(a)
    future = run(lambda: b.load(WAIT))
    waiting(cpu)
    cpu.pool("cpu").budget = MIB
    with pytest.raises(pools.PoolRefused, match="does not fit"):
        future.result(WAIT)
    holder.let_go()
    assert cpu.ledger.waiting() == ()


def test_a_budget_lowered_under_who_holds_is_kept_once_they_let_go(cpu):
    a, b = managed(MIB, MIB)
    b.load()
    b._loads.pop().__exit__(None, None, None)
    with a.lease():
        cpu.pool("cpu").budget = 0
        assert not b.loaded, "idle ones are given back at once"
        assert cpu.pool("cpu").used == MIB
    until(lambda: cpu.pool("cpu").used == 0)


def test_an_object_that_dies_while_somebody_waits_for_it(cpu):
    a, b = managed(2 * MIB, MIB)
    holder = Holder(a)
    lease = pools.management._C.Lease(b.seat, None, WAIT)
    future = run(lease.__enter__)
    waiting(cpu)
    del b
    gc.collect()
    holder.let_go()
    with pytest.raises(pools.PoolError):
        future.result(WAIT)


def test_an_object_that_dies_while_it_is_loaded(cpu):
    started, go = threading.Event(), threading.Event()

    def bring():
        started.set()
        assert go.wait(WAIT)

    handle = pools.manage(Thing(MIB, **{"in": bring}))
    seat, user = handle.seat, handle.user
    lease = pools.management._C.Lease(seat, None, WAIT)
    future = run(lease.__enter__)
    assert started.wait(WAIT)
    del handle
    gc.collect()
    go.set()
    future.result(WAIT)
    lease.__exit__(None, None, None)
    until(lambda: cpu.pool("cpu").used == 0)
    until(lambda: user.closed)


def test_no_lock_is_held_while_bytes_move(cpu):
    started, go = threading.Event(), threading.Event()

    def slow():
        started.set()
        assert go.wait(WAIT)

    slow_one = pools.manage(Thing(MIB, **{"in": slow}))
    future = run(lambda: slow_one.load(WAIT))
    assert started.wait(WAIT)
    other = pools.manage(Thing(MIB))
    other.load(WAIT).offload()
    pools.unmanage(other)
    cpu.snapshot()
    cpu.pool("cpu").budget = 3 * MIB
    go.set()
    future.result(WAIT).offload()


def test_finalizers_at_any_allocation_do_not_hang(cpu):
    """Objects and leases die inside the management's own steps, as cyclic garbage."""
    cpu.pool("cpu").budget = 1000 * MIB
    threshold = gc.get_threshold()
    gc.set_threshold(2, 2, 2)
    try:
        keep = managed(MIB)[0]
        for _ in range(60):
            thing = Thing(MIB)
            thing.cycle = thing
            handle = pools.manage(thing)
            handle.cycle = handle
            handle.load(WAIT)
            del thing, handle
            keep.load(WAIT).offload()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    until(lambda: len(cpu.entries) == 1)


def test_who_was_not_told_looks_around(cpu, monkeypatch):
    """The thread that should have told it was interrupted, or died, in between."""
    a, b = managed(2 * MIB, 2 * MIB)
    holder = Holder(a)
    future = run(lambda: b.load(WAIT).loaded)
    waiting(cpu)
    monkeypatch.setattr(type(cpu), "pump", lambda self: None)
    holder.let_go()
    assert cpu.ledger.pump(0) != ()
    monkeypatch.undo()
    assert future.result(WAIT) is True
    b.offload()


def test_many_threads_with_failures_and_timeouts(cpu):
    """Budgets are kept at each step, and at the end nothing is held and nobody waits."""
    things = [Thing(MIB if i % 3 else 2 * MIB) for i in range(6)]
    for i, thing in enumerate(things[:2]):
        fails = iter([OSError("x") if n % 3 == i else None for n in range(10_000)])

        def maybe(fails=fails):
            if (error := next(fails)) is not None:
                raise error

        thing.does["in"] = maybe
    handles = [pools.manage(thing) for thing in things]
    stop, counts, above = time.monotonic() + 1.2, [0, 0], []

    def work(seed):
        turn = seed
        while time.monotonic() < stop:
            turn = (turn * 1103515245 + 12345) % (1 << 31)
            first, second = handles[turn % 6], handles[(turn >> 8) % 6]
            try:
                with first.lease(0.02):
                    if cpu.pool("cpu").used > 2 * MIB:
                        above.append(cpu.pool("cpu").used)
                    if turn & 64:
                        with second.lease(0.01):
                            counts[0] += 1
            except (pools.PoolRefused, OSError):
                counts[1] += 1

    threads = [threading.Thread(target=work, args=(n + 1,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert counts[0] > 10
    assert counts[1] > 10
    assert above == []
    cpu.free()
    assert cpu.pool("cpu").used == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_uses_what_it_inherits(cpu):
    """Threads of the parent that hold or wait are not there: what they had is not waited for."""
    a, b, c = managed(MIB, MIB, 2 * MIB)
    holder = Holder(a)
    b.load().offload()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = b"failed"
        try:
            signal_alarm(5)
            with c.lease(2):
                outcome = b"ok" if c.loaded else b"not loaded"
        except BaseException as error:
            outcome = repr(error).encode()
        finally:
            os.write(write, outcome)
            os._exit(0)
    os.close(write)
    outcome = os.read(read, 4000)
    os.close(read)
    os.waitpid(child, 0)
    holder.let_go()
    assert outcome == b"ok"
    b.load(WAIT).offload()


def signal_alarm(seconds):
    import signal

    signal.alarm(seconds)


def test_the_interpreter_ends_with_leases_held(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent / "helpers")!r})
import threading, time
from pools_kit import *
from opguard import pools
setup = fresh_pools({str(tmp_path)!r}, 2 * MIB); setup.__enter__()
a, b = pools.manage(tiny(2)), pools.manage(tiny(2))
a.load()
threading.Thread(target=lambda: b.load(), daemon=True).start()
time.sleep(0.1)
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end\n"
    assert done.stderr == ""


def test_interrupts_at_any_step_leave_nothing(cpu):
    """A signal's exception may come between any two steps of Python, also while cleaning up."""
    import signal

    handles = managed(MIB, MIB, 2 * MIB, MIB)
    armed, came = [False], [0]

    def interrupt(_number, frame):
        # One that comes in a callback of the garbage collector, as hypothesis has, is lost.
        if armed[0] and "callback" not in frame.f_code.co_name:
            armed[0] = False
            came[0] += 1
            raise KeyboardInterrupt

    stop = threading.Event()

    def others():
        turn = 0
        while not stop.is_set():
            turn += 1
            with contextlib.suppress(pools.PoolRefused), handles[turn % 4].lease(0.05):
                time.sleep(0.0005)

    other = threading.Thread(target=others, daemon=True)
    before = signal.signal(signal.SIGVTALRM, interrupt)
    other.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.0007)
    try:
        end, turn = time.monotonic() + 1.5, 0
        while time.monotonic() < end:
            turn += 1
            # Disarmed inside the except's reach: one may come on the way there, too.
            with contextlib.suppress(KeyboardInterrupt, pools.PoolRefused):
                try:
                    armed[0] = True
                    with handles[turn % 4].lease(0.2), handles[turn % 3].lease(0.02):
                        pass
                finally:
                    armed[0] = False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        stop.set()
        other.join(WAIT)
    assert not other.is_alive()
    assert came[0] > 5
    gc.collect()
    for unit in cpu.entries:
        assert cpu.ledger.holders(unit) == ()
        assert cpu.state(unit) in (0, 2)
    cpu.free()
    assert cpu.pool("cpu").used == 0
