"""How one who waits is woken: a raw lock a thread, a future a task, and no lock around them.

What wakes may run in a finalizer, so at any allocation of any thread, also inside these functions.
So nothing here takes a lock: both sides of a meeting put themselves down with ``dict.setdefault``,
which is one step, and whoever comes second knows.
"""

from __future__ import annotations

import asyncio
import threading
from _thread import allocate_lock
from contextlib import suppress
from time import monotonic

from opguard.pools.errors import PoolError

__all__ = ["Board", "Latch", "TaskWaiter", "ThreadWaiter", "Waiter", "time_left"]


class ThreadWaiter:
    """One thread's sleep, once."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def wake(self) -> bool:
        """End the sleep, or the one to come. False where nobody can wake any more."""
        with suppress(RuntimeError):  # woken before
            self._lock.release()
        return True

    def wait(self, seconds: float | None) -> bool:
        """Sleep until woken. False when the time is over."""
        if seconds is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX))


class TaskWaiter:
    """One task's sleep, once; woken from any thread."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise PoolError(
                "expected a loop of asyncio to wait in, none runs here; under another kind of loop "
                "use `with` in place of `async with`, in a thread of its own"
            ) from None
        self._future: asyncio.Future[None] = self._loop.create_future()

    def wake(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:  # the loop is closed: its tasks are gone
            return False
        return True

    def _end(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, seconds: float | None) -> bool:
        done, _ = await asyncio.wait([self._future], timeout=seconds)
        return bool(done)


Waiter = ThreadWaiter | TaskWaiter


class Board:
    """Where a ticket's waiter and the news that it was granted meet, whichever comes first."""

    def __init__(self) -> None:
        self._posts: dict[int, Waiter | None] = {}

    def wait_for(self, ticket: int, waiter: Waiter) -> bool:
        """Post who is to be woken. False: the ticket was granted already."""
        return self._posts.setdefault(ticket, waiter) is waiter

    def granted(self, ticket: int) -> bool:
        """Wake whoever waits for it. False: there is nobody left to take it."""
        nobody: Waiter | None = None
        waiter = self._posts.setdefault(ticket, nobody)
        return True if waiter is None else waiter.wake()

    def threads(self) -> list[int]:
        """Tickets that threads wait for; a forked child has none of these threads."""
        return [ticket for ticket, who in self._posts.items() if isinstance(who, ThreadWaiter)]

    def forget(self, ticket: int) -> None:
        self._posts.pop(ticket, None)


class Latch:
    """The end of one load, which any number wait for."""

    __slots__ = ("_open", "_waiters")

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []
        self._open = False

    def join(self, waiter: Waiter) -> None:
        self._waiters.append(waiter)
        if self._open:
            waiter.wake()

    def open(self) -> None:
        self._open = True
        for waiter in tuple(self._waiters):
            waiter.wake()


def time_left(deadline: float | None) -> float | None:
    """Seconds until then, at least 0; None is forever."""
    return None if deadline is None else max(0.0, deadline - monotonic())
