"""One request, from asking the ledger to everything being in; whatever breaks it leaves nothing.

The rules: each transition of the ledger is one call into C, so it happened or it did not; its
answer goes into a list within the same call (``list.extend(map(...))``), because an interrupt may
come between any two steps of Python. `Ask.undo` then reads from these lists how far it got, and
tells the ledger in one such call. A second interrupt inside that is made good when the ask dies.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from opguard.pools._holders import refusal, timed_out
from opguard.pools._undoing import through
from opguard.pools._waiting import TaskWaiter, ThreadWaiter, time_left

if TYPE_CHECKING:
    from opguard.pools._moving import Moving

__all__ = ["Ask", "enter", "enter_async"]

Adopt = Callable[[Any, tuple[tuple[int, int], ...]], object]

GRANTED, WAIT = 0, 1
LOADING, READY = 1, 2
TRY, BLOCKS_THREAD, ENDS = 1, 2, 4
# Seconds after which a sleeper looks whether it was forgotten. Nobody should be.
LOOK = 1.0


class Answer(NamedTuple):
    """What the ledger answers to a request, and to a ticket that is taken."""

    verdict: int
    ticket: int
    evict: tuple[int, ...]
    load: tuple[int, ...]
    pending: tuple[int, ...]
    holders: tuple[tuple[int, int, int], ...]
    need: int
    have: int


class Ask:
    """What is asked for, and how far it got."""

    # To a thread that moves for a task, to a lease, or never begun: then there is nothing to undo.
    handed_over = True

    def __init__(
        self,
        management: Moving,
        owner: int,
        units: Sequence[int],
        *,
        extra: tuple[tuple[int, int], ...] = (),
        timeout: float | None = None,
        flags: int = 0,
        seated: bool = False,
    ) -> None:
        """``seated``: for a seat, which gives back a lease that an interrupt has left counted."""
        self.management = management
        self.ledger = management.ledger
        self.owner = owner
        self.units = tuple(units)
        self.extra = extra
        self.timeout = timeout
        self.deadline = None if timeout is None else monotonic() + timeout
        if timeout is not None:
            flags |= ENDS if timeout > 0 else TRY
        self.flags = flags
        self.stuck: list[tuple[str, Exception]] = []
        self.seated = seated
        self.adopted: list[object] = []
        self._answers: list[Any] = []
        self._unwilling = tuple(management.would_not_go)
        self._evicted: list[bool] = []
        self._loaded: list[bool] = []
        self._left: list[bool] = []
        self.handed_over = False

    @property
    def answer(self) -> Answer:
        return Answer._make(self._answers[-1])

    @property
    def to_move(self) -> bool:
        return bool(self.answer.evict or self.answer.load)

    def ask(self) -> int:
        """Ask the ledger. Returns the ticket to wait for, or 0 where it is granted.

        Raises:
            PoolRefused, Deadlock, LeaseTimeout: what the ledger refuses.
        """
        management = self.management
        management.drain()
        management.rank()
        asked = ((self.owner,), (self.units,), (self.extra,), (0,), (self.flags,))
        self._answers.extend(map(self.ledger.request, *asked))
        management.pump()  # those on whom this owner depends come before others now
        answer = self.answer
        if answer.verdict == GRANTED:
            return 0
        if answer.verdict == WAIT:
            return answer.ticket
        if self._asked_again():
            return self.ask()
        raise refusal(self)

    def _asked_again(self) -> bool:
        """Whether there are some who would not go for an earlier request: now they may."""
        old, self._unwilling = self._unwilling, ()
        for unit in old:
            if self.management.state(unit) == READY:
                self.ledger.condemn(unit)
        return bool(old)

    def take(self, ticket: int) -> None:
        """Take what a wake-up promised.

        Raises:
            PoolRefused: where what was waited for cannot come any more.
        """
        self.management.board.forget(ticket)
        self._answers.extend(map(self.ledger.take, (ticket,)))
        if self.answer.verdict != GRANTED:
            raise refusal(self)

    def move(self) -> bool:
        """Bring out what has to go and in what is needed. False: something would not go, ask again.

        Raises:
            Exception: of the user that could not be brought in, with a note that names it.
        """
        management, answer = self.management, self.answer
        stuck = len(self.stuck)
        for unit in answer.evict:
            error = management.move_out(unit, self._evicted)
            if error is not None:
                self.stuck.append((management.name_of(unit), error))
        if len(self.stuck) > stuck:
            return False
        for unit in answer.load:
            management.move_in(unit, self._loaded)
        if any(self._evicted) or any(self._loaded):
            management.pump()
        return True

    def undo(self) -> None:
        """Give back whatever this ask has. Does nothing where there is nothing, or not any more."""
        if not (self.handed_over or self.adopted):
            self.give_back()

    def give_back(self, *, leave: bool = True) -> None:
        """The same, also after it was handed over; without the lease where another leaves it."""
        if not self._answers:
            return
        answer, management, ledger = self.answer, self.management, self.ledger
        if answer.verdict == WAIT:
            management.board.forget(answer.ticket)
            with suppress(ValueError):  # ended already: nobody could be woken for it
                ledger.cancel(answer.ticket)
        elif answer.verdict == GRANTED:
            if not self._left:
                spared = map(ledger.spared, answer.evict[len(self._evicted) :])
                failed = map(ledger.failed, answer.load[len(self._loaded) :])
                gone = ((self.owner,), (self.units,), (self.extra,)) if leave else ((),)
                left = map(ledger.leave, *gone)
                self._left.extend(chain(spared, failed, left))
            for unit in answer.load:
                management.open_latch(unit)
            management.count_unmet(self.units)
        self._answers, self._evicted, self._loaded, self._left = [], [], [], []
        management.pump()
        self.__class__ = Ask

    def arrived(self) -> None:
        """All of it is there now; some was not when it was asked for."""
        came = {*self.answer.load, *self.answer.pending}
        self.management.count_unmet(unit for unit in self.units if unit in came)

    def nap(self) -> float:
        """Seconds to sleep before looking around."""
        left = time_left(self.deadline)
        return LOOK if left is None else min(LOOK, left)

    def check_time(self) -> None:
        if time_left(self.deadline) == 0:
            raise timed_out(self)

    def decided(self, ticket: int) -> bool:
        """Whether the ledger has an answer. Its news may be lost with a thread interrupted in
        telling it, so who sleeps asks now and then."""
        self.management.pump()
        return all(ticket != waiting[0] for waiting in self.ledger.waiting())

    def loading(self, unit: int) -> bool:
        return self.management.state(unit) == LOADING

    def ready(self, unit: int) -> bool:
        return self.management.state(unit) == READY


class _Broken(Ask):
    """One whose undoing has begun. Where an interrupt ends that, too, its finalizer goes on.

    To become one is no call, so that no interrupt comes before; one that is well has no finalizer
    that could swallow an interrupt.
    """

    def __del__(self) -> None:
        if not (self.handed_over or self.adopted):
            self.give_back(leave=not self.seated)


# --- a thread's road ------------------------------------------------------------------------------


def enter(ask: Ask, adopt: Adopt | None = None, owner: Any = None) -> None:
    """Wait for what is asked for and bring it in: counted and there, or raised and nothing.

    Args:
        adopt: the method of a lease that takes over what is counted of ``owner``.
    """
    try:
        while not _attempt(ask):
            ask.undo()
        ask.arrived()
        if adopt is not None:
            ask.adopted.extend(map(adopt, (owner,), (ask.extra,)))
        ask.handed_over = True
    except BaseException:
        ask.__class__ = _Broken
        through(ask.undo)
        raise


def _attempt(ask: Ask) -> bool:
    ticket = ask.ask()
    if ticket:
        waiter = ThreadWaiter()
        if ask.management.board.wait_for(ticket, waiter):
            _sleep(ask, waiter, lambda: ask.decided(ticket))
        ask.take(ticket)
    return ask.move() and all(_joined(ask, unit) for unit in ask.answer.pending)


def _sleep(ask: Ask, waiter: ThreadWaiter, over: Callable[[], bool]) -> None:
    started = monotonic()
    try:
        while not waiter.wait(ask.nap()) and not over():
            ask.check_time()
    finally:
        ask.management.note_wait(ask.units, monotonic() - started)


def _joined(ask: Ask, unit: int) -> bool:
    """Wait for another's load. False where it failed: the next attempt loads it itself."""
    while ask.loading(unit):
        waiter = ThreadWaiter()
        ask.management.latch(unit).join(waiter)
        if ask.loading(unit):
            _sleep(ask, waiter, lambda: not ask.loading(unit))
    return ask.ready(unit)


# --- a task's road: the same steps, and the moving in a thread of its own -------------------------


async def enter_async(ask: Ask, adopt: Adopt, owner: Any) -> None:
    """The same without blocking the loop. Cancelled, it leaves nothing behind either."""
    try:
        while not await _attempt_async(ask):
            ask.undo()
        ask.arrived()
        ask.adopted.extend(map(adopt, (owner,), (ask.extra,)))
    except BaseException:
        ask.__class__ = _Broken
        through(ask.undo)
        raise


async def _attempt_async(ask: Ask) -> bool:
    ticket = ask.ask()
    if ticket:
        waiter = TaskWaiter()
        if ask.management.board.wait_for(ticket, waiter):
            await _sleep_async(ask, waiter, lambda: ask.decided(ticket))
        ask.take(ticket)
    if ask.to_move and not await _Moving(ask).done():
        return False
    for unit in ask.answer.pending:
        if not await _joined_async(ask, unit):
            return False
    return True


async def _sleep_async(ask: Ask, waiter: TaskWaiter, over: Callable[[], bool]) -> None:
    started = monotonic()
    try:
        while not await waiter.wait(ask.nap()) and not over():
            ask.check_time()
    finally:
        ask.management.note_wait(ask.units, monotonic() - started)


async def _joined_async(ask: Ask, unit: int) -> bool:
    while ask.loading(unit):
        waiter = TaskWaiter()
        ask.management.latch(unit).join(waiter)
        if ask.loading(unit):
            await _sleep_async(ask, waiter, lambda: not ask.loading(unit))
    return ask.ready(unit)


class _Moving:
    """A task's moving, in a thread of its own: a pool of threads could be full of those who wait.

    Whoever comes second, the thread with its result or the task with its cancellation, cleans up.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._first: dict[str, str] = {}
        self._waiter = TaskWaiter()
        self._outcome: bool | BaseException = False

    async def done(self) -> bool:
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(self._work,), name="opguard-pool", daemon=True)
        try:
            thread.start()
            await self._waiter.wait(None)
        except BaseException:
            begun = self._first.setdefault("begun", "never") == "thread"
            if begun and self._first.setdefault("done", "task") == "task":
                self._ask.handed_over = True
            raise
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def _work(self) -> None:
        if self._first.setdefault("begun", "thread") != "thread":
            return  # the task was cancelled before, and has cleaned up
        try:
            self._outcome = self._ask.move()
        except BaseException as error:
            self._outcome = error
        if self._first.setdefault("done", "thread") == "task":
            self._ask.give_back()
        else:
            self._waiter.wake()
