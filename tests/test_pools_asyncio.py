"""Tasks that wait for bytes: the loop goes on, a cancelled one leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from opguard import pools
from pools_kit import MIB, Holder, Thing, managed, settled_pools, until

WAIT = 10.0


@pytest.fixture
def cpu(tmp_path):
    with settled_pools(tmp_path, 2 * MIB) as management:
        yield management


async def ticks(count=3):
    for _ in range(count):
        await asyncio.sleep(0.005)


def test_free_in_a_loop_does_not_wait_for_its_tasks(cpu):
    """One that was granted bytes moves them when the loop goes on, so after this."""
    a, b = managed(2 * MIB, 2 * MIB)
    holder = Holder(a)

    async def use():
        async with pools.auto_manage(b, timeout=WAIT):
            return b.loaded

    async def main():
        waits = asyncio.ensure_future(use())
        await ticks()
        holder.let_go()  # granted, and asleep
        started = time.monotonic()
        pools.free()
        assert time.monotonic() - started < 5
        return await waits

    assert asyncio.run(main())


def test_cancelled_before_its_thread_began_nothing_moves(cpu, monkeypatch):
    (a,) = managed(MIB)
    begin, started = threading.Event(), threading.Thread.start

    def late(thread):
        run = thread.run
        thread.run = lambda: begin.wait(5) and run()
        started(thread)

    async def main():
        lease = a.lease()
        waits = asyncio.ensure_future(lease.__aenter__())
        await ticks()
        waits.cancel()
        await asyncio.wait([waits])
        assert waits.cancelled()

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", late)
        asyncio.run(main())
    begin.set()
    until(lambda: not any(t.name == "opguard-pool" for t in threading.enumerate()))
    assert a.obj.log == []
    with a.lease(0):
        assert a.loaded


def test_the_loop_goes_on_while_a_task_waits_and_loads(cpu):
    a, b = managed(2 * MIB, 2 * MIB, **{"in": lambda: time.sleep(0.05)})
    holder, turns = Holder(a), []

    async def turn():
        while True:
            turns.append(1)
            await asyncio.sleep(0.005)

    async def main():
        turning = asyncio.ensure_future(turn())
        waits = asyncio.ensure_future(use())
        await ticks()
        assert not b.loaded
        threading.Thread(target=holder.let_go).start()
        assert await waits
        turning.cancel()

    async def use():
        async with pools.auto_manage(b, timeout=WAIT) as handle:
            assert handle is b
            return b.loaded

    asyncio.run(main())
    assert len(turns) > 5


def test_a_task_that_is_cancelled_in_the_queue_is_not_in_it(cpu):
    a, b = managed(2 * MIB, MIB)
    holder = Holder(a)

    async def main():
        waits = asyncio.ensure_future(b.lease(WAIT).__aenter__())
        await ticks()
        assert len(cpu.ledger.waiting()) == 1
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert cpu.ledger.waiting() == ()

    asyncio.run(main())
    holder.let_go()


def test_a_task_cancelled_after_the_grant_gives_it_back(cpu):
    """Granted in the same turn of the loop in which it is cancelled."""
    a, b, c = managed(2 * MIB, 2 * MIB, 2 * MIB)
    holder = Holder(a)

    async def use(handle):
        async with handle.lease(WAIT):
            return handle.loaded

    async def main():
        first = asyncio.ensure_future(use(b))
        await ticks()
        second = asyncio.ensure_future(use(c))
        await ticks()
        holder.let_go()  # grants b's ticket; its task has not run yet
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second is True

    asyncio.run(main())
    assert b.obj.log == []


def test_a_task_cancelled_while_its_bytes_move_leaves_when_they_are_in(cpu):
    started, go = threading.Event(), threading.Event()

    def bring():
        started.set()
        assert go.wait(WAIT)

    handle = pools.manage(Thing(2 * MIB, **{"in": bring}))

    async def main():
        waits = asyncio.ensure_future(handle.lease().__aenter__())
        while not started.is_set():
            await asyncio.sleep(0.005)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        go.set()

    asyncio.run(main())
    until(lambda: not cpu.ledger.holders(handle.seat.units[0]))
    handle.load(WAIT).offload()


def test_a_timeout_of_a_task_names_the_holder(cpu):
    a, b = managed(2 * MIB, MIB)

    async def hold(held, let_go):
        async with a.lease():
            held.set()
            await let_go.wait()

    async def main():
        held, let_go = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(hold(held, let_go), name="serve-7")
        await held.wait()
        with pytest.raises(pools.LeaseTimeout, match=r"task serve-7 holds 'thing0' since test_"):
            async with b.lease(0.05):
                pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await b.lease().__aenter__()
        assert cpu.ledger.waiting() == ()
        let_go.set()
        await holding

    asyncio.run(main())


def test_a_thread_that_would_block_its_own_loop_is_refused(cpu):
    """A sync wait inside a task, for what another task of the same loop holds, would never end."""
    a, b = managed(2 * MIB, MIB)

    async def hold(held, let_go):
        async with a.lease():
            held.set()
            await let_go.wait()

    async def main():
        held, let_go = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(hold(held, let_go))
        await held.wait()
        with pytest.raises(pools.Deadlock, match="this owner or its thread"), b.lease(WAIT):
            pass
        let_go.set()
        await holding
        with b.lease(WAIT):
            assert b.loaded

    asyncio.run(main())


def test_a_task_uses_what_its_parent_holds(cpu):
    (a,) = managed(2 * MIB)

    async def child():
        async with a.lease(WAIT):
            return a.loaded

    async def main():
        async with a.lease():
            return await asyncio.gather(*(child() for _ in range(5)))

    assert asyncio.run(main()) == [True] * 5


@pytest.mark.parametrize("timeout", [None, 0.2, WAIT])
def test_a_child_and_what_its_parent_holds(cpu, timeout):
    """Nobody can tell whether the parent waits for it: so it waits where it gives up by itself."""
    a, b = managed(2 * MIB, MIB)

    async def child():
        async with b.lease(timeout):
            return b.loaded

    async def main():
        async with a.lease():
            task = asyncio.create_task(child())
            await asyncio.wait([task], timeout=0.01)
            if timeout is None:
                assert task.done(), "nobody would be waiting for ever"
            elif timeout < 1:  # in vain: it holds until the child has ended
                await asyncio.wait([task])
        return await task

    if timeout == WAIT:
        assert asyncio.run(main()) is True
    else:
        refused = pools.LeaseTimeout if timeout else pools.Deadlock
        with pytest.raises(
            refused, match=r"task Task-\d+ holds 'thing0'.*(with a timeout|wait longer)"
        ):
            asyncio.run(main())


def test_a_load_that_fails_reaches_its_task(cpu):
    fails = [OSError("no weights")]

    def bring():
        if fails:
            raise fails.pop()

    handle = pools.manage(Thing(MIB, **{"in": bring}))

    async def main():
        with pytest.raises(OSError, match="no weights"):
            await handle.lease().__aenter__()
        async with handle.lease():
            return handle.loaded

    assert asyncio.run(main()) is True


def test_a_loop_that_ends_takes_its_waiting_tasks_along(cpu):
    a, b = managed(2 * MIB, 2 * MIB)
    holder, tasks = Holder(a), []

    async def main():
        tasks.append(asyncio.ensure_future(b.lease(WAIT).__aenter__()))
        await ticks()

    asyncio.run(main())
    assert cpu.ledger.waiting() == ()
    holder.let_go()
    b.load(WAIT).offload()


def test_a_grant_for_a_loop_that_is_closed_goes_to_the_next(cpu):
    """A task nobody will ever resume holds up nobody."""
    a, b, c = managed(2 * MIB, 2 * MIB, 2 * MIB)
    holder = Holder(a)
    loop = asyncio.new_event_loop()
    coroutine = b.lease(WAIT).__aenter__()
    task = loop.create_task(_await(coroutine))
    loop.run_until_complete(asyncio.sleep(0.02))
    assert len(cpu.ledger.waiting()) == 1
    loop.close()
    threading.Timer(0.05, holder.let_go).start()
    c.load(WAIT).offload()
    task._log_destroy_pending = False
    del task, coroutine


async def _await(awaitable):
    return await awaitable


def test_many_tasks_and_threads(cpu):
    """Nested leases, failures, cancellations: budgets are kept, and nothing is left."""
    handles = managed(MIB, MIB, 2 * MIB, MIB, 2 * MIB)
    above, counts = [], {"had": 0, "not": 0}
    stop = time.monotonic() + 1.0

    async def work(seed):
        turn = seed
        while time.monotonic() < stop:
            turn = (turn * 1103515245 + 12345) % (1 << 31)
            first, second = handles[turn % 5], handles[(turn >> 8) % 5]
            try:
                async with asyncio.timeout(0.01 if turn & 32 else 5), first.lease(0.1):
                    await asyncio.sleep(0.001 if turn & 16 else 0)
                    if cpu.pool("cpu").used > 2 * MIB:
                        above.append(cpu.pool("cpu").used)
                    async with second.lease(0.02):
                        counts["had"] += 1
            except (pools.PoolRefused, TimeoutError):
                counts["not"] += 1

    async def main():
        await asyncio.gather(*(work(n + 1) for n in range(8)))

    threads = [threading.Thread(target=lambda: asyncio.run(main()), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert counts["had"] > 10
    assert counts["not"] > 10
    assert above == []
