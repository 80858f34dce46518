"""Leases without torch: seats over a real ledger, users that are a few lines of Python."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import inspect
import signal
import sys
import threading
import time
import weakref
from functools import wraps

import pytest

GRANTED = 0


class Pool:
    """One ledger, one pool, and users that load at once."""

    def __init__(self, C, budget=1000):
        self.C = C
        self.ledger = C.Ledger()
        self.pool = self.ledger.add_pool(budget)
        self.told = []

    def seat(self, *sizes, **how):
        units = tuple(self.ledger.add_unit(self.pool, size, 0, 0, 1.0) for size in sizes or (10,))
        return self.C.Seat(self.ledger, units, how.get("enter", self.enter), self.told.append)

    def enter(self, seat, owner, timeout):
        answer = self.ledger.request(owner.id, seat.units)
        if answer.verdict != GRANTED:
            if answer.ticket:
                self.ledger.cancel(answer.ticket)
            raise LookupError(answer.verdict)
        for unit in answer.evict:
            self.ledger.evicted(unit)
        for unit in answer.load:
            self.ledger.loaded(unit)

    def leases(self, seat):
        return [self.ledger.unit(unit).leases for unit in seat.units]


@pytest.fixture
def pool(C):
    return Pool(C)


class Model:
    """Stands for a module: its call finds what is in its dictionary."""

    def __init__(self, value=0):
        self.value = value

    def forward(self, x, *, y=0):
        """What forward says."""
        return self.value, x, y


class Keeper:
    def __init__(self, seat=None):
        self.seat = seat
        self.asked = []

    def adopt(self, forward):
        self.asked.append("adopt")
        forward.seat = self.seat

    def drive(self, forward, body):
        self.asked.append("drive")
        return body

    def deepcopy(self, forward, memo):
        return "deep"

    def reduce(self, forward):
        return str, ("reduced",)


class Boom(BaseException):
    """What no `except Exception` catches."""


def test_a_lease_is_counted_and_given_back(C, pool):
    seat = pool.seat(10, 20)
    lease = C.Lease(seat, "value")
    assert pool.leases(seat) == [0, 0]
    with lease as value:
        assert (value, seat.leases, lease.entered) == ("value", 1, 1)
        assert pool.leases(seat) == [1, 1]
        with lease, C.Lease(seat):
            assert (seat.leases, lease.entered) == (3, 2)
            assert pool.leases(seat) == [3, 3]
        assert pool.leases(seat) == [1, 1]
    assert (seat.leases, lease.entered) == (0, 0)
    assert pool.leases(seat) == [0, 0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Boom, GeneratorExit])
def test_a_lease_is_given_back_on_any_exception(C, pool, error):
    seat = pool.seat()
    with pytest.raises(error) as caught, C.Lease(seat):
        raise error("mine")
    assert pool.leases(seat) == [0]
    assert caught.value.args == ("mine",)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Boom])
def test_a_call_gives_back_on_any_exception(C, pool, error):
    seat = pool.seat()

    def body():
        assert pool.leases(seat) == [1]
        raise error("mine")

    with pytest.raises(error):
        C.LeasedForward(seat, body)()
    assert (pool.leases(seat), seat.leases) == ([0], 0)


def test_interrupts_leave_no_lease(C, pool):
    """Signals at random places around the block: none is between the count and the block."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    seat = pool.seat()
    lease, caught = C.Lease(seat), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for n in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + n % 30 * 1e-6)
                for _ in range(2000):
                    with lease:
                        pass
            except KeyboardInterrupt:
                caught += 1
            assert (pool.leases(seat), lease.entered) == ([0], 0)
    finally:  # memcheck delivers late: the last signal must not meet the default, which kills
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Under memcheck another thread may have taken it already, and be told of it later still.
        signal.signal(signal.SIGALRM, signal.SIG_IGN if before == signal.SIG_DFL else before)
    assert caught > 0


def test_what_a_slow_road_counted_before_it_was_interrupted_is_given_back(C, pool):
    def enter(seat, owner, timeout):
        pool.enter(seat, owner, timeout)
        raise KeyboardInterrupt  # after the ledger's answer, before it could return

    seat = pool.seat(enter=enter)
    with pytest.raises(KeyboardInterrupt), C.Lease(seat):
        pytest.fail("entered")
    assert (pool.leases(seat), seat.leases) == ([0], 0)


def test_a_slow_road_that_gave_back_itself_is_not_given_back_twice(C, pool):
    def enter(seat, owner, timeout):
        pool.enter(seat, owner, timeout)
        pool.ledger.leave(owner.id, seat.units)
        raise ValueError("no")

    seat = pool.seat(enter=pool.enter)
    with C.Lease(seat):
        slow = C.Seat(pool.ledger, seat.units, enter)
        slow.slow = True
        with pytest.raises(ValueError, match="no"), C.Lease(slow):
            pytest.fail("entered")
        assert pool.leases(seat) == [1]


def test_the_slow_road_is_for_what_is_not_ready(C, pool):
    asked = []

    def enter(seat, owner, timeout):
        asked.append((type(owner).__name__, timeout))
        pool.enter(seat, owner, timeout)

    seat = pool.seat(enter=enter)
    for _ in range(3):
        with C.Lease(seat, None, 2.5):
            pass
    assert asked == [("Owner", 2.5)]
    seat.slow = True
    with C.Lease(seat):
        pass
    assert asked[1:] == [("Owner", None)]


def test_a_refusal_leaves_nothing(C):
    pool = Pool(C, budget=15)
    seat, other = pool.seat(10), pool.seat(10)
    with C.Lease(seat):
        with pytest.raises(LookupError), C.Lease(other):
            pytest.fail("entered")
        assert pool.leases(other) == [0]
        assert other.leases == 0
    with C.Lease(other):
        assert pool.ledger.pool(pool.pool).used == 10


def test_bytes_beside_units_are_given_back(C):
    pool = Pool(C, budget=100)

    def enter(seat, owner, timeout):
        answer = pool.ledger.request(owner.id, seat.units, ((pool.pool, 30),))
        for unit in answer.load:
            pool.ledger.loaded(unit)
        return ((pool.pool, 30),)

    seat = pool.seat(10, enter=enter)
    seat.slow = True
    with C.Lease(seat):
        assert pool.ledger.pool(pool.pool).used == 40
    C.LeasedForward(seat, lambda: None)()
    assert pool.ledger.pool(pool.pool).used == 10


@pytest.mark.parametrize("given", [3, "text", (3,), ((1,),), ((1, "x"),), [(0, 1)]])
def test_a_slow_road_that_gives_nonsense_leaves_nothing(C, pool, given):
    def enter(seat, owner, timeout):
        pool.enter(seat, owner, timeout)
        return given

    seat = pool.seat(enter=enter)
    with pytest.raises(TypeError), C.Lease(seat):
        pytest.fail("entered")
    assert (pool.leases(seat), seat.leases) == ([0], 0)


def test_who_waits_is_told(C):
    pool = Pool(C, budget=10)
    seat, other = pool.seat(10), pool.seat(10)
    waiting = pool.ledger.add_owner()
    with C.Lease(seat):
        ticket = pool.ledger.request(waiting, other.units).ticket
        assert pool.told == []
    assert pool.told == [seat]
    assert pool.ledger.pump() == (ticket,)
    pool.ledger.cancel(ticket)


def test_units_of_a_lease_are_those_it_took(C, pool):
    seat, more = pool.seat(10), pool.seat(20)
    before = seat.units
    with C.Lease(more):
        pass
    with C.Lease(seat):
        seat.units = before + more.units
        with C.Lease(seat):
            assert pool.leases(seat) == [2, 1]
        assert pool.leases(seat) == [1, 0]
    assert pool.leases(seat) == [0, 0]


def test_a_lease_that_dies_is_given_back(C, pool):
    seat = pool.seat()
    lease = C.Lease(seat)
    lease.__enter__()
    lease.__enter__()
    del lease
    assert (pool.leases(seat), seat.leases) == ([0], 0)
    ring = [C.Lease(seat, [])]
    ring[0].value.append(ring)
    ring[0].__enter__()
    del ring
    gc.collect()
    assert (pool.leases(seat), seat.leases) == ([0], 0)


def test_a_lease_may_be_left_in_another_thread(C, pool):
    seat = pool.seat()
    lease = C.Lease(seat)
    lease.__enter__()
    thread = threading.Thread(target=lease.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert (pool.leases(seat), lease.entered) == ([0], 0)
    with pytest.raises(RuntimeError, match="entered before it is left"):
        lease.__exit__(None, None, None)


def test_after_is_told_once_it_was_given_back(C, pool):
    seat, seen = pool.seat(), []
    with pytest.raises(ValueError, match="mine"):  # noqa: SIM117
        with C.Lease(seat, None, None, lambda: seen.append(pool.leases(seat))):
            raise ValueError("mine")
    assert seen == [[0]]


def test_the_block_s_exception_outlives_what_fails_on_the_way_out(C, pool, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: told.append(type(u.exc_value)))

    def after():
        raise LookupError("after")

    with pytest.raises(ValueError, match="mine"):  # noqa: SIM117
        with C.Lease(pool.seat(), None, None, after):
            raise ValueError("mine")
    assert told == [LookupError]
    with pytest.raises(LookupError), C.Lease(pool.seat(), None, None, after):
        pass

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with C.Lease(pool.seat(), None, None, interrupt):
            raise ValueError("mine")


# --- owners ---


def test_holders_have_code_and_line_and_keep_no_frame(C, pool):
    class Big:
        pass

    seat = pool.seat()

    def serve():
        big = Big()
        refs.append(weakref.ref(big))
        lease.__enter__()
        return inspect.currentframe().f_lineno - 1

    refs, lease = [], C.Lease(seat)
    line = serve()
    (row,) = C.pool_owner(pool.ledger).held
    assert row == (seat.units, serve.__code__, line)
    assert refs[0]() is None
    lease.__exit__(None, None, None)
    assert C.pool_owner(pool.ledger).held == ()


def test_a_block_far_down_in_a_function_costs_what_any_block_does(C, pool):
    """The line is looked up when somebody asks for it, not at each entry."""
    lease = C.Lease(pool.seat())
    blocks = []
    for lines in (1, 3000):
        filling = "    if seen is None:\n        seen = []\n" * lines
        source = (
            f"def block(seen=0):\n{filling}    begin = clock()\n    for _ in range(200):\n"
            "        with lease:\n            pass\n    used = clock() - begin\n"
            "    with lease:\n        return used, owner().held\n"
        )
        space = {
            "lease": lease,
            "clock": time.perf_counter,
            "owner": lambda: C.pool_owner(pool.ledger),
        }
        exec(source, space)
        blocks.append(space["block"])
    near, far = (min(block()[0] for _ in range(15)) for block in blocks)
    assert far < 20 * near
    ((_, code, line),) = blocks[1]()[1]
    assert (code, line) == (blocks[1].__code__, 1 + 2 * 3000 + 6)


def test_holders_are_told_by_who_asked_the_pools(C, pool):
    """Frames of the package's own pools are passed over."""
    lease, space = C.Lease(pool.seat()), {}
    source = "def load(lease):\n    lease.__enter__()\n"
    exec(compile(source, "/somewhere/opguard/pools/wrappers.py", "exec"), space)
    space["load"](lease)
    ((_, code, line),) = C.pool_owner(pool.ledger).held
    here = inspect.currentframe()
    assert (code, line) == (here.f_code, here.f_lineno - 3)
    lease.__exit__()


def test_an_owner_a_thread(C, pool):
    mine = C.pool_owner(pool.ledger)
    assert C.pool_owner(pool.ledger) is mine
    assert (mine.thread, mine.task) == (threading.get_ident(), None)
    found = []
    thread = threading.Thread(target=lambda: found.append(C.pool_owner(pool.ledger).id))
    thread.start()
    thread.join()
    assert found[0] != mine.id
    assert [owner.id for owner in C.pool_owners(pool.ledger)] == [mine.id]


def test_a_thread_with_a_copied_context_is_another_owner_below(C):
    pool = Pool(C, budget=10)
    seat, big = pool.seat(10), pool.seat(10)
    seen = []

    def child():
        owner = C.pool_owner(pool.ledger)
        seen.append(owner.id)
        with C.Lease(seat):  # its parent holds it: no queue
            seen.append(pool.leases(seat))
        seen.append(pool.ledger.request(owner.id, big.units).verdict)

    with C.Lease(seat):
        mine = C.pool_owner(pool.ledger)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(child,))
        thread.start()
        thread.join()
    assert seen[0] != mine.id
    assert seen[1] == [2]
    assert seen[2] == 3  # a deadlock: the parent may wait for its child


def test_an_owner_that_is_inherited_without_leases_is_no_parent(C):
    pool = Pool(C, budget=10)
    seat, other, verdicts = pool.seat(10), pool.seat(10), []

    def child():
        owner = C.pool_owner(pool.ledger)
        go.wait(10)
        answer = pool.ledger.request(owner.id, other.units)
        verdicts.append(answer.verdict)
        if answer.ticket:
            pool.ledger.cancel(answer.ticket)

    go = threading.Event()
    C.pool_owner(pool.ledger)
    thread = threading.Thread(target=contextvars.copy_context().run, args=(child,))
    thread.start()
    while len(C.pool_owners(pool.ledger)) < 2:
        pass
    with C.Lease(seat):
        go.set()
        thread.join()
    assert verdicts == [1]  # it may wait


def test_an_owner_a_task(C, pool):
    seat = pool.seat()

    async def main():
        outer = C.pool_owner(pool.ledger)
        assert outer.task is asyncio.current_task()

        async def inner():
            return C.pool_owner(pool.ledger).id, C.pool_owner(pool.ledger).id

        with C.Lease(seat):
            first, again = await asyncio.create_task(inner())
            assert first == again != outer.id
            assert (await inner())[0] == outer.id
            return await asyncio.to_thread(lambda: C.pool_owner(pool.ledger).id) != outer.id

    before = C.pool_owner(pool.ledger)
    assert asyncio.run(main())
    assert C.pool_owner(pool.ledger) is before
    gc.collect()
    assert len(C.pool_owners(pool.ledger)) == 1


def test_two_ledgers_know_their_owners(C):
    one, two = Pool(C), Pool(C)
    first, second = one.seat(), two.seat()
    with C.Lease(first):
        mine = C.pool_owner(one.ledger)
        with C.Lease(second):
            assert C.pool_owner(one.ledger) is mine
            assert C.pool_owner(two.ledger) is not mine
            with C.Lease(first):
                assert one.ledger.holders(first.units[0]) == ((mine.id, 2),)
        assert one.leases(first) == [1]
    assert one.leases(first) == two.leases(second) == [0]


def test_owners_go_with_their_threads(C, pool):
    seat = pool.seat()

    def use():
        with C.Lease(seat):
            pass

    for _ in range(20):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert len(C.pool_owners(pool.ledger)) <= 1


# --- tasks ---


def test_async_with_of_what_is_there_never_suspends(C, pool):
    seat = pool.seat()
    with C.Lease(seat):
        pass

    async def use():
        async with C.Lease(seat, "value") as value:
            return value, pool.leases(seat)

    with pytest.raises(StopIteration) as done:
        use().send(None)
    assert done.value.value == ("value", [1])
    assert pool.leases(seat) == [0]


def test_async_with_waits_by_enter_async(C, pool):
    seat = pool.seat()

    async def enter_async(lease, owner, timeout):
        await asyncio.sleep(0)
        pool.enter(lease.seat, owner, timeout)
        lease.adopt(owner)
        return lease.value

    seat.enter_async = enter_async

    async def use():
        async with C.Lease(seat, "value", 3) as value:
            assert pool.leases(seat) == [1]
            (row,) = C.pool_owner(pool.ledger).held
            assert row[1] is use.__code__
            return value

    assert asyncio.run(use()) == "value"
    assert (pool.leases(seat), seat.leases) == ([0], 0)


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
def test_async_with_gives_back_on_any_exception(C, pool, error):
    seat = pool.seat()
    with C.Lease(seat):
        pass

    async def use():
        async with C.Lease(seat):
            raise error

    with pytest.raises(error):
        use().send(None)
    assert pool.leases(seat) == [0]


def test_async_with_refused_or_without_a_road(C, pool):
    seat = pool.seat()

    async def use():
        async with C.Lease(seat):
            pytest.fail("entered")

    with pytest.raises(RuntimeError, match="enter_async"):
        asyncio.run(use())

    async def refuse(lease, owner, timeout):
        raise LookupError

    seat.enter_async = refuse
    with pytest.raises(LookupError):
        asyncio.run(use())
    assert (pool.leases(seat), seat.leases) == ([0], 0)


def test_tasks_and_threads_in_random_order_leave_nothing(C):
    pool = Pool(C, budget=10**9)
    seats = [pool.seat(10, 20) for _ in range(4)]

    async def task(n):
        for i in range(20):
            try:
                with C.Lease(seats[(n + i) % 4]), C.Lease(seats[(n * i) % 4]):
                    await asyncio.sleep(0)
                    if i % 3 == 0:
                        raise ValueError
            except ValueError:
                await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(task(n) for n in range(8)))

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert [pool.leases(seat) for seat in seats] == [[0, 0]] * 4
    assert [seat.leases for seat in seats] == [0] * 4
    assert C.pool_owners(pool.ledger) == []


# --- callables ---


def test_a_call_runs_inside_a_lease(C, pool):
    seat, model, seen = pool.seat(), Model(7), []

    def method(self, x, *, y=0):
        seen.append((self, pool.leases(seat)))
        return x, y

    forward = C.LeasedForward(seat, method, model)
    assert forward(1, y=2) == (1, 2)
    assert C.LeasedForward(seat, len)([1]) == 1
    assert seen == [(model, [1])]
    assert pool.leases(seat) == [0]
    forward.active = False
    forward(1)
    assert seen[1] == (model, [0])


def test_calls_within_calls(C, pool):
    seat, depth = pool.seat(), []

    def walk(n):
        depth.append(pool.leases(seat)[0])
        return forward(n - 1) if n else None

    forward = C.LeasedForward(seat, walk)
    forward(20)
    assert depth == list(range(1, 22))
    assert pool.leases(seat) == [0]
    with pytest.raises(RecursionError):
        forward(10**6)
    assert pool.leases(seat) == [0]


def test_a_callable_does_not_keep_its_module(C, pool):
    model = Model()
    model.forward = C.LeasedForward(pool.seat(), Model.forward, model)
    dead = weakref.ref(model)
    gc.disable()
    try:
        forward = model.forward
        del model
        assert dead() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="gone"):
        forward(1)


def test_a_module_that_takes_its_callable_away_while_it_runs(C, pool):
    seat, model = pool.seat(), Model()

    def method(self):
        del self.forward
        gc.collect()
        return pool.leases(seat)

    model.forward = C.LeasedForward(seat, method, model)
    assert model.forward() == [1]
    assert pool.leases(seat) == [0]


def test_a_callable_looks_like_what_it_stands_for(C, pool):
    model = Model(3)
    forward = C.LeasedForward(pool.seat(), Model.forward, model)
    assert forward.__wrapped__ == model.__class__.forward.__get__(model)
    assert inspect.signature(forward) == inspect.signature(model.forward)
    assert (forward.__name__, forward.__doc__) == ("forward", "What forward says.")
    assert forward.__module__ == Model.__module__
    assert forward.__self__ is model
    assert forward.__code__ is Model.forward.__code__

    @wraps(forward)
    def around(*args):
        return forward(*args)

    assert (around.__name__, around.__qualname__) == ("forward", "Model.forward")
    assert around(1) == (3, 1, 0)
    with pytest.raises(AttributeError):
        forward.no_such_thing


def test_inputs_are_prepared_inside_the_lease(C, pool):
    seat = pool.seat()
    forward = C.LeasedForward(seat, lambda *args, **kwargs: (args, kwargs))
    forward.prepare = lambda args, kwargs: ((*args, *pool.leases(seat)), {"k": kwargs})
    assert forward(5) == ((5, 1), {"k": None})
    assert forward(5, a=1) == ((5, 1), {"k": {"a": 1}})
    for wrong in (None, 3, (1, 2), ((), 3), ((),)):
        forward.prepare = lambda args, kwargs, wrong=wrong: wrong
        with pytest.raises(TypeError, match="prepare"):
            forward()
    forward.prepare = lambda args, kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        forward()
    assert pool.leases(seat) == [0]


def test_a_keeper_finds_the_seat_and_drives_bodies(C, pool):
    seat = pool.seat()
    keeper = Keeper(seat)

    def steps():
        yield 1

    forward = C.LeasedForward(None, steps, None, keeper)
    assert forward.seat is None
    assert list(forward()) == [1]
    assert keeper.asked == ["adopt", "drive"]
    assert forward.seat is seat
    empty = C.LeasedForward(None, steps, None, Keeper())
    with pytest.raises(RuntimeError, match="has none"):
        empty()
    assert copy.deepcopy(forward) == "deep"
    assert copy.copy(forward) == "reduced"
    with pytest.raises(TypeError, match="keeper"):
        copy.deepcopy(C.LeasedForward(seat, steps))


def test_wrong_arguments(C, pool):
    seat = pool.seat()
    for make in (
        lambda: C.Seat(3, ()),
        lambda: C.Seat(pool.ledger, [1]),
        lambda: C.Seat(pool.ledger, ("x",)),
        lambda: C.Seat(pool.ledger),
        lambda: C.Lease(3),
        C.Lease,
        lambda: C.LeasedForward(seat, 3),
        lambda: C.LeasedForward(3, len),
        lambda: C.LeasedForward(seat, len, 3),
        lambda: C.pool_owner(3),
        lambda: C.pool_owners(None),
        C.Owner,
        lambda: C.Lease(seat).adopt(3),
        lambda: C.Lease(seat).adopt(),
    ):
        with pytest.raises(TypeError):
            make()
    with pytest.raises(TypeError, match="units"):
        seat.units = [1]
    with pytest.raises(TypeError, match="units"):
        del seat.units
    with pytest.raises(TypeError, match="seat"):
        C.LeasedForward(seat, len).seat = 3


def test_units_that_are_gone_are_told_of(C, pool):
    seat = pool.seat()
    pool.ledger.remove_unit(seat.units[0])
    with pytest.raises((LookupError, ValueError)), C.Lease(seat):
        pytest.fail("entered")
    assert seat.leases == 0
    with C.Lease(C.Seat(pool.ledger, ())):  # nothing to hold is held at once
        pass


def test_hostile_roads(C, pool):
    """Roads that drop, replace or re-enter what calls them."""
    seat = pool.seat()
    depth = []

    def enter(given, owner, timeout):
        given.enter_slow = None
        gc.collect()
        if len(depth) < 5:
            depth.append(1)
            given.enter_slow = enter
            with C.Lease(given):
                pass
        pool.enter(given, owner, timeout)

    seat.enter_slow = enter
    with C.Lease(seat):
        assert pool.leases(seat) == [1]
    assert pool.leases(seat) == [0]

    lease = C.Lease(seat, None, None, lambda: lease.entered and lease.__exit__(None, None, None))
    for _ in range(3):
        lease.__enter__()
    lease.__exit__(None, None, None)
    assert (pool.leases(seat), lease.entered) == ([0], 0)


def test_collected_while_it_is_told_of(C, pool):
    """Lists are made while leases die: a garbage collection may come at each allocation."""
    seat = pool.seat()
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(50):
            ring = [C.Lease(seat, []) for _ in range(3)]
            for lease in ring:
                lease.value.append(ring)
                lease.__enter__()
            del ring, lease
            C.pool_owner(pool.ledger).held
            C.pool_owners(pool.ledger)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert pool.leases(seat) == [0]


def test_a_module_that_is_dropped_while_leases_live(new_module):
    other = new_module()
    pool = Pool(other)
    lease = other.Lease(pool.seat())
    lease.__enter__()
    del other, pool
    gc.collect()
    lease.__exit__(None, None, None)


def test_a_thread_of_an_earlier_ones_ident_is_another(C):
    """A lease outlives its thread; the next thread, of the same ident, may wait for it."""
    pool = Pool(C, 10)
    first, second = pool.seat(10), pool.seat(10)
    lease = C.Lease(first)
    seen = []

    def hold():
        seen.append(threading.get_ident())
        lease.__enter__()

    def ask():
        if threading.get_ident() == seen[0] and len(seen) == 1:
            owner = C.pool_owner(pool.ledger)
            answer = pool.ledger.request(owner.id, second.units, (), 0, C.POOL_BLOCKS_THREAD)
            seen.append(answer.verdict)

    run(hold)
    for _ in range(100):
        run(ask)
    if len(seen) == 1:
        pytest.skip("no thread had the ident of an earlier one")
    assert seen[1] == C.POOL_WAIT
    lease.__exit__(None, None, None)


def run(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
