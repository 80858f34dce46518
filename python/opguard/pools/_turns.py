"""Whose turn it is to change an object: one owner at a time, a thread or a task of asyncio.

A circle of owners that wait for each other's turns is refused here. The pools' ledger is told of
all such waits, and refuses those that lead through its leases too.
"""

from __future__ import annotations

import sys
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from opguard import _C
from opguard.pools import _managed
from opguard.pools._places import name_of_thread
from opguard.pools.errors import Deadlock, LeaseTimeout

if TYPE_CHECKING:
    from opguard.pools.management import Management

__all__ = ["Owner", "Turn", "current_owner", "locked"]

_waits: dict[tuple[int, int], _Waiter] = {}
# Whose ledgers know of waits.
_told: set[Management] = set()


class Locked:
    """The lock of all turns: ``with locked.lock``, and ``locked.after()`` when it is left.

    The lock's own ``with`` is one step, so that an interrupt finds it taken and let go again, or
    not taken. A finalizer may run at any line of the thread that holds it. One that only counts
    leaves a note, and whoever lets go of the lock looks at the notes; one that leaves a block
    enters again.
    """

    def __init__(self) -> None:
        self.after: Callable[[], None] = lambda: None
        self.lock: Any = threading.RLock()

    def renew(self) -> None:
        """In a forked child, where another thread may have held it."""
        self.lock = threading.RLock()
        _waits.clear()
        _tell()


locked = Locked()


class Owner:
    """Who opens blocks: a thread, or a task of asyncio."""

    __slots__ = ("key", "known", "task", "thread")

    def __init__(self, thread: int, task: Any) -> None:
        self.thread = thread
        self.task = task
        self.key = (thread, id(task))
        # As the pools know it, once it has or waits for a turn.
        self.known: tuple[Management, _C.Owner] | None = None

    def __str__(self) -> str:
        if self.task is not None:
            return f"task {self.task.get_name()}"
        return f"thread {name_of_thread(self.thread) or self.thread}"

    def is_same(self, other: Owner) -> bool:
        """Whether both are one thread, or one task."""
        return self.key == other.key

    def id_in(self, management: Management) -> int:
        """The ledger's number for it, 0 where it has none there."""
        known = self.known
        return known[1].id if known is not None and known[0] is management else 0


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
    __slots__ = ("blocks_thread", "granted", "hold", "owner", "turn", "wake")

    def __init__(
        self, turn: Turn, owner: Owner, hold: object, wake: Callable[[], object], blocks: bool
    ) -> None:
        self.turn, self.owner, self.hold, self.wake = turn, owner, hold, wake
        self.blocks_thread = blocks
        self.granted = False

    def stops(self, owner: Owner) -> bool:
        """Whether that owner can do nothing before this wait has ended."""
        return self.owner.is_same(owner) or (
            self.blocks_thread and self.owner.thread == owner.thread
        )

    def ahead(self) -> list[Owner]:
        """Who must let go before its turn comes."""
        turn = self.turn
        before = takewhile(lambda waiter: waiter is not self, turn._waiters)
        return [owner for owner in (turn.owner, *(w.owner for w in before)) if owner is not None]

    def is_circle(self) -> bool:
        """Whether any of those waits for this one."""
        seen: set[tuple[int, int]] = set()
        look = self.ahead()
        while look:
            owner = look.pop()
            if self.stops(owner):
                return True
            if owner.key not in seen:
                seen.add(owner.key)
                for waiter in _waits.values():
                    look += waiter.ahead() if waiter.stops(owner) else ()
        return False


def _tell(asker: Owner | None = None) -> bool:
    """Tells the ledgers who waits, under the lock; False: one sees that ``asker`` must not."""
    waiters = tuple(_waits.values())
    for management in _told.union(w.owner.known[0] for w in waiters if w.owner.known):
        numbers: list[int] = []
        for waiter in waiters:
            for holder in waiter.ahead():
                pair = waiter.owner.id_in(management), holder.id_in(management)
                if all(pair):
                    numbers += [*pair, _C.POOL_BLOCKS_THREAD if waiter.blocks_thread else 0]
        _told.add(management)
        if not management.ledger.set_waits(
            tuple(numbers), 0 if asker is None else asker.id_in(management)
        ):
            return False
        if not numbers:
            _told.discard(management)
        management.pump()
    return True


class Turn:
    """Something that one owner at a time may change."""

    def __init__(self) -> None:
        self.owner: Owner | None = None
        # What it is held for, an object each; where there is none nobody has it.
        self._holds: list[object] = []
        self._waiters: deque[_Waiter] = deque()

    @abstractmethod
    def described(self) -> str:
        """What is held, for messages."""

    @abstractmethod
    def holders(self) -> tuple[str, ...]:
        """One line for each block in which it is held."""

    def on_free(self) -> None:
        """Called under the lock when nobody has it and nobody waits."""

    def _try(self, waiter: _Waiter) -> bool:
        """Under the lock: takes the object, or queues ``waiter``; Deadlock if that cannot end."""
        owner = waiter.owner
        if not self._holds or self.owner is None:
            self.owner = owner
        if self.owner.is_same(owner):
            self._holds.append(waiter.hold)
            return True
        self._waiters.append(waiter)
        try:
            if not waiter.is_circle():
                _waits[owner.key] = waiter
                if _tell(owner):
                    return False
            raise Deadlock(
                f"{owner} would wait for {self.described()}, which is held by {self.owner}, and "
                "somebody there cannot let go before it: leave that block first, or use async with",
                self.holders(),
            )
        except BaseException:
            self._waiters.remove(waiter)
            _waits.pop(owner.key, None)
            _tell()  # a ledger may have heard of it before an interrupt
            raise

    def acquire(self, owner: Owner, timeout: float | None, hold: object) -> None:
        """Waits until this owner may change the stack; re-entrant.

        Args:
            owner: who asks.
            timeout: seconds to wait; None as long as it takes.
            hold: what ``release`` is told, which may be told it also where this raised.

        Raises:
            LeaseTimeout: not within ``timeout`` seconds.
            Deadlock: whoever holds it waits for this thread or task.
        """
        gate = threading.Lock()
        gate.acquire()
        waiter = _Waiter(self, owner, hold, gate.release, blocks=True)
        try:
            owner.known = _managed.ledger_owner()
            with locked.lock:
                if self._try(waiter):
                    return
            came = gate.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        except BaseException:
            self._withdraw(waiter)
            raise
        if not came and not self._withdraw(waiter, keep=True):
            raise self._late(timeout)

    async def acquire_async(self, owner: Owner, timeout: float | None, hold: object) -> None:
        """``acquire`` that lets the other tasks of the loop run meanwhile."""
        import asyncio

        loop = asyncio.get_running_loop()
        came: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not came.done():
                came.set_result(None)

        waiter = _Waiter(self, owner, hold, lambda: loop.call_soon_threadsafe(tell), blocks=False)
        try:
            owner.known = _managed.ledger_owner()
            with locked.lock:
                if self._try(waiter):
                    return
            await asyncio.wait_for(came, timeout)
        except TimeoutError:
            if not self._withdraw(waiter, keep=True):
                raise self._late(timeout) from None
        except BaseException:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter, keep: bool = False) -> bool:
        """Stops waiting; True if it was granted meanwhile, which is given back unless ``keep``."""
        try:
            with locked.lock:
                if _waits.get(waiter.owner.key) is waiter:
                    del _waits[waiter.owner.key]
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                    _tell()
                if not keep:
                    self._release_locked(waiter.hold)
                return waiter.granted
        finally:
            locked.after()

    def release(self, hold: object) -> None:
        """Gives up a hold, if it is one; the first who waits gets the object after the last."""
        try:
            with locked.lock:
                self._release_locked(hold)
        except BaseException:  # interrupted: whoever waits is woken all the same
            with locked.lock:
                self._release_locked(hold)
            raise
        finally:
            locked.after()

    def _release_locked(self, hold: object) -> None:
        if hold in self._holds:
            self._holds.remove(hold)
        if not self._holds:
            self._pass_on()

    def _pass_on(self) -> None:
        """Under the lock, held for nothing: the first who can still be woken has it."""
        self.owner = None
        while self._waiters and self.owner is None:
            waiter = self._waiters[0]
            self.owner = waiter.owner
            self._holds.append(waiter.hold)
            waiter.granted = True
            self._waiters.popleft()
            _waits.pop(waiter.owner.key, None)
            try:
                waiter.wake()
            except RuntimeError:  # its event loop is closed
                self.owner = None
                self._holds.clear()
        _tell()
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
            self.owner = None
            self._holds.clear()
