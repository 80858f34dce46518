"""Whose turn it is to change an object: one owner at a time, a thread or a task of asyncio."""

from __future__ import annotations

import sys
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

from opguard.pools.errors import Deadlock, LeaseTimeout

__all__ = ["Owner", "Turn", "current_owner", "locked"]

# A finalizer may run at any line of the thread that holds this lock. One that only counts leaves a
# note, and whoever lets go of the lock looks at the notes; one that leaves a block enters again.
_lock = threading.RLock()
_waits: dict[tuple[int, int], Turn] = {}


class Locked:
    """The lock; on leaving, ``after`` is called, which looks at what finalizers noted."""

    def __init__(self) -> None:
        self.after: Callable[[], None] = lambda: None
        self._depth = 0

    def __enter__(self) -> None:
        _lock.acquire()
        self._depth += 1

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        outermost = not self._depth
        _lock.release()
        if outermost:
            self.after()

    def try_enter(self) -> bool:
        """Takes the lock if nobody has it, not even this thread; then ``leave_quietly``."""
        if not _lock.acquire(blocking=False):
            return False
        if self._depth:
            _lock.release()
            return False
        self._depth = 1
        return True

    def leave_quietly(self) -> None:
        """Lets go without looking at notes."""
        self._depth -= 1
        _lock.release()

    def renew(self) -> None:
        """In a forked child, where another thread may have held it."""
        global _lock  # noqa: PLW0603
        _lock = threading.RLock()
        _waits.clear()
        self._depth = 0


locked = Locked()


class Owner:
    """Who opens blocks: a thread, or a task of asyncio."""

    __slots__ = ("key", "task", "thread")

    def __init__(self, thread: int, task: Any) -> None:
        self.thread = thread
        self.task = task
        self.key = (thread, id(task))

    def __str__(self) -> str:
        if self.task is not None:
            return f"task {self.task.get_name()}"
        names = {t.ident: t.name for t in threading.enumerate()}
        return f"thread {names.get(self.thread, self.thread)}"

    def is_same(self, other: Owner) -> bool:
        """Whether both are one thread, or one task."""
        return self.key == other.key


def current_owner() -> Owner:
    """The task that runs, if one does, else the thread."""
    asyncio = sys.modules.get("asyncio")
    task = None
    if asyncio is not None:
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs in this thread
            task = None
    return Owner(threading.get_ident(), task)


class _Waiter:
    __slots__ = ("granted", "owner", "wake")

    def __init__(self, owner: Owner, wake: Callable[[], object]) -> None:
        self.owner, self.wake = owner, wake
        self.granted = False


class Turn:
    """Something that one owner at a time may change."""

    def __init__(self) -> None:
        self.owner: Owner | None = None
        self._holds = 0
        self._waiters: deque[_Waiter] = deque()

    @abstractmethod
    def described(self) -> str:
        """What is held, for messages."""

    @abstractmethod
    def holders(self) -> tuple[str, ...]:
        """One line for each block in which it is held."""

    def on_free(self) -> None:
        """Called under the lock when nobody has it and nobody waits."""

    def _try(self, owner: Owner, waiter: _Waiter | None, blocks_thread: bool) -> bool:
        """Under the lock: takes the object, or queues ``waiter``; Deadlock if that cannot end."""
        if self.owner is None:
            self.owner, self._holds = owner, 1
            return True
        if self.owner.is_same(owner):
            self._holds += 1
            return True
        seen: Owner | None = self.owner
        while seen is not None:
            if seen.is_same(owner) or (blocks_thread and seen.thread == owner.thread):
                raise Deadlock(
                    f"{owner} would wait for {self.described()}, which is held by {self.owner}, "
                    "which cannot let go before it: leave that block first, or use async with",
                    self.holders(),
                )
            waits_for = _waits.get(seen.key)
            seen = waits_for.owner if waits_for is not None else None
        if waiter is not None:
            self._waiters.append(waiter)
            _waits[owner.key] = self
        return False

    def acquire(self, owner: Owner, timeout: float | None) -> None:
        """Waits until this owner may change the stack; re-entrant.

        Raises:
            LeaseTimeout: not within ``timeout`` seconds.
            Deadlock: whoever holds it waits for this thread or task.
        """
        gate = threading.Lock()
        gate.acquire()
        waiter = _Waiter(owner, gate.release)
        with locked:
            if self._try(owner, waiter, blocks_thread=True):
                return
        try:
            came = gate.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        except BaseException:
            self._withdraw(waiter)
            raise
        if not came and not self._withdraw(waiter, keep=True):
            raise self._late(timeout)

    async def acquire_async(self, owner: Owner, timeout: float | None) -> None:
        """``acquire`` that lets the other tasks of the loop run meanwhile."""
        import asyncio

        loop = asyncio.get_running_loop()
        came: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not came.done():
                came.set_result(None)

        waiter = _Waiter(owner, lambda: loop.call_soon_threadsafe(tell))
        with locked:
            if self._try(owner, waiter, blocks_thread=False):
                return
        try:
            await asyncio.wait_for(came, timeout)
        except TimeoutError:
            if not self._withdraw(waiter, keep=True):
                raise self._late(timeout) from None
        except BaseException:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter, keep: bool = False) -> bool:
        """Stops waiting; True if it was granted meanwhile, which is given back unless ``keep``."""
        with locked:
            _waits.pop(waiter.owner.key, None)
            if not waiter.granted:
                self._waiters.remove(waiter)
                return False
            if not keep:
                self._release_locked()
            return True

    def release(self) -> None:
        """Gives up one hold; the first who waits gets the object."""
        with locked:
            self._release_locked()

    def _release_locked(self) -> None:
        self._holds -= 1
        if self._holds:
            return
        self.owner = None
        while self._waiters and self.owner is None:
            waiter = self._waiters.popleft()
            waiter.granted = True
            _waits.pop(waiter.owner.key, None)
            self.owner, self._holds = waiter.owner, 1
            try:
                waiter.wake()
            except RuntimeError:  # its event loop is closed
                self.owner, self._holds = None, 0
        if self.owner is None:
            self.on_free()

    def _late(self, timeout: float | None) -> LeaseTimeout:
        holders = self.holders()
        by = holders[-1] if holders else f"{self.owner} is changing {self.described()}"
        return LeaseTimeout(
            f"expected {self.described()} to be free within {timeout} s, and {by}: leave that "
            "block, or wait longer by timeout=",
            holders,
        )

    def forked(self) -> None:
        """In a forked child: the other threads are gone."""
        self._waiters.clear()
        if self.owner is not None and self.owner.thread != threading.get_ident():
            self.owner, self._holds = None, 0
