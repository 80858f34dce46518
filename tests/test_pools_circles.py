"""Circles of waits that lead through turns of patches and through leases end at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
from torch import nn

from opguard.pools import CommitObjectProxy, _turns, auto_manage, manage
from opguard.pools.commits import CallableCommit
from opguard.pools.errors import Deadlock
from pools_kit import fresh_pools, until

TIMEOUT = 20


@pytest.fixture
def pools(tmp_path):
    with fresh_pools(tmp_path, "700KiB") as management:
        yield management


def models(count=2):
    """Of 512 KiB: one of them fits."""
    return [nn.Linear(256, 512, bias=False).requires_grad_(False) for _ in range(count)]


def leased(model):
    return auto_manage(model, timeout=TIMEOUT)


def patched(thing):
    return CommitObjectProxy(thing, [CallableCommit(lambda _: lambda: None)], timeout=TIMEOUT)


@contextlib.contextmanager
def held_elsewhere(thing):
    """Another thread has its turn of the thing."""
    leave, has = threading.Event(), threading.Event()

    def holds():
        with patched(thing):
            has.set()
            leave.wait(TIMEOUT)

    thread = threading.Thread(target=holds, daemon=True)
    thread.start()
    try:
        assert has.wait(5)
        yield
    finally:
        leave.set()
        thread.join(5)


def in_threads(*works):
    """What these raised, each in a thread of its own."""
    errors = []

    def run(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT / 2)
        assert not thread.is_alive(), "only the timeout ends it"
    return errors


@pytest.mark.parametrize("last", ["turn", "lease"])
def test_a_turn_and_a_lease_that_wait_for_each_other(pools, last):
    thing, (one, other), both = [1], models(), threading.Barrier(2, timeout=5)
    manage(one), manage(other)

    def has_bytes():
        with leased(one):
            both.wait()
            if last == "turn":
                until(pools.ledger.waiting)
            with patched(thing):
                pass

    def has_turn():
        with patched(thing):
            both.wait()
            if last == "lease":
                until(lambda: _turns._waits)
            with leased(other):
                pass

    errors = in_threads(has_bytes, has_turn)
    assert [type(error) for error in errors] == [Deadlock]
    with patched(thing), leased(other):
        assert not _turns._waits


def test_a_circle_through_two_turns_and_a_lease(pools):
    things, (one, other), three = ([1], [2]), models(), threading.Barrier(3, timeout=5)
    manage(one), manage(other)

    def has_bytes():
        with leased(one):
            three.wait()
            with patched(things[0]):
                pass

    def has_a_turn():
        with patched(things[0]):
            three.wait()
            with patched(things[1]):
                pass

    def has_the_other_turn():
        with patched(things[1]):
            three.wait()
            with leased(other):
                pass

    errors = in_threads(has_bytes, has_a_turn, has_the_other_turn)
    assert [type(error) for error in errors] == [Deadlock]


def test_who_is_waited_for_goes_before_the_queue(pools):
    """A request at the head of the queue waits for bytes of one who waits for the turn."""
    thing, (one, other, small), both = [1], models(3), threading.Barrier(2, timeout=5)
    small.weight.data = small.weight.data[:64].clone()
    manage(one), manage(other), manage(small)

    def has_bytes():
        with leased(one):
            both.wait()
            with patched(thing):
                pass

    def wants_many():
        with leased(other):
            pass

    def has_turn():
        with patched(thing):
            both.wait()
            until(lambda: _turns._waits)
            wanting.start()
            until(pools.ledger.waiting)
            with leased(small):
                pass

    wanting = threading.Thread(target=wants_many, daemon=True)
    assert in_threads(has_bytes, has_turn) == []
    wanting.join(5)
    assert not wanting.is_alive()


def test_tasks_that_await_each_other(pools):
    thing, (one, other), errors = [1], models(), []
    manage(one), manage(other)

    async def has_bytes(both):
        async with leased(one):
            await both.wait()
            async with patched(thing):
                pass

    async def has_turn(both):
        async with patched(thing):
            await both.wait()
            async with leased(other):
                pass

    async def main():
        both = asyncio.Barrier(2)
        found = await asyncio.gather(has_bytes(both), has_turn(both), return_exceptions=True)
        errors.extend(error for error in found if error is not None)

    asyncio.run(asyncio.wait_for(main(), TIMEOUT / 2))
    assert [type(error) for error in errors] == [Deadlock]


def test_a_thread_does_not_sleep_behind_a_task_of_its_own():
    """The turn would be the task's, which the sleeping thread never runs."""
    thing, leave, has = [1], threading.Event(), threading.Event()

    def holds():
        with patched(thing):
            has.set()
            leave.wait(TIMEOUT)

    async def first():
        async with patched(thing):
            pass

    async def main():
        task = asyncio.create_task(first())
        await asyncio.to_thread(has.wait, 5)
        while not _turns._waits:
            await asyncio.sleep(0.005)
        threading.Timer(0.1, leave.set).start()
        with pytest.raises(Deadlock, match="cannot let go before it"), patched(thing):
            pass
        await task

    thread = threading.Thread(target=holds, daemon=True)
    thread.start()
    assert has.wait(5)
    asyncio.run(asyncio.wait_for(main(), TIMEOUT / 2))
    thread.join(5)


def test_waits_are_told_only_while_there_are_any(pools):
    thing, one = [1], models(1)[0]
    manage(one)
    with held_elsewhere(thing):
        with pytest.raises(TimeoutError), CommitObjectProxy(thing, timeout=0.05):
            pass
        assert not _turns._waits
        assert not _turns._told
    with patched(thing):
        assert not _turns._told


def test_an_interrupt_while_a_wait_is_told_leaves_none_told(pools, monkeypatch):
    """Else who was interrupted would be refused for the time of a turn, as if it waited still."""
    thing, one = [1], models(1)[0]
    manage(one)

    def interrupted():
        monkeypatch.undo()
        raise KeyboardInterrupt

    with held_elsewhere(thing):
        monkeypatch.setattr(pools, "pump", interrupted)
        with pytest.raises(KeyboardInterrupt), CommitObjectProxy(thing):
            pass
        assert not _turns._waits
        assert not _turns._told
