"""Who is managed: objects come, are found again, change their options, and die."""

from __future__ import annotations

import logging
import threading
import weakref
from _thread import allocate_lock
from collections.abc import Collection, Iterable
from contextlib import suppress
from operator import index
from queue import Empty, SimpleQueue
from typing import Any

from opguard import _C
from opguard.pools._arguments import check_name, check_priority
from opguard.pools._books import ABSENT, EVICTING, LOADING, Entry
from opguard.pools._holders import holder_lines
from opguard.pools._marks import take_off
from opguard.pools._moving import Moving
from opguard.pools._requests import BLOCKS_THREAD, LOOK, Ask, enter, enter_async
from opguard.pools._waiting import Latch, ThreadWaiter
from opguard.pools.errors import PoolError, PoolFileChanged, PoolRefused
from opguard.pools.users import ResourcePoolUser, make_user

__all__ = ["Members"]

logger = logging.getLogger("opguard.pools")


class Members(Moving):
    """The tables of who is managed; the mutex guards them, and no finalizer of ours takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._by_id: dict[int, Entry] = {}
        self._claims: dict[int, _Claim] = {}
        self._dead: SimpleQueue[Entry] = SimpleQueue()
        self._names: dict[str, int] = {}
        # A finalizer may manage something while its own thread is inside.
        self._mutex = threading.RLock()

    def find(self, obj: object) -> Entry | None:
        """What was made of ``obj``, if it is managed."""
        entry = self._by_id.get(id(obj))
        return entry if entry is not None and entry.ref() is obj else None

    def managed(self) -> tuple[Entry, ...]:
        """Entries of all objects, those that are made of others too."""
        return tuple(self._by_id.values())

    def manage(
        self,
        obj: object,
        *,
        priority: int | None = None,
        pin: bool | None = None,
        name: str | None = None,
        **options: Any,
    ) -> Entry:
        """The entry of ``obj``, made now unless it is managed; what is named holds for both."""
        check_name(name)
        check_priority(priority)
        self.drain()
        entry = self.find(obj)
        while entry is None:
            entry = self._claimed(obj, name, options)
        self.update(entry, priority=priority, pin=pin, name=name, **options)
        return entry

    def _claimed(self, obj: object, name: str | None, options: dict[str, Any]) -> Entry | None:
        """Make the entry, or wait for the thread that is at it; None: look again."""
        mine, key = _Claim(), id(obj)
        first: list[_Claim] = []
        try:
            first.extend(map(self._claims.setdefault, (key,), (mine,)))
            if first[0] is mine:
                entry = self.find(obj) or self._made(obj, name, options)
                return entry
        finally:
            if first and first[0] is mine:
                self._claims.pop(key)
            mine.latch.open()
        if first[0].thread == mine.thread:
            raise PoolError(f"{type(obj).__name__} is being managed further up in this thread")
        waiter = ThreadWaiter()
        first[0].latch.join(waiter)
        while not waiter.wait(LOOK) and self._claims.get(key) is first[0]:
            pass
        return self.find(obj)

    def _made(self, obj: object, name: str | None, options: dict[str, Any]) -> Entry:
        user = self._user(obj, name, options)
        try:
            entry = self.add_user(user, obj, name=name)
            entry.options = options
            return entry
        except BaseException:
            with suppress(Exception):
                user.close()
            raise

    def _user(self, obj: object, name: str | None, options: dict[str, Any]) -> ResourcePoolUser:
        if name is not None:
            options = {**options, "name": name}
        return make_user(obj, management=self, **options)

    def add_user(
        self, user: ResourcePoolUser, obj: object | None = None, *, name: str | None = None
    ) -> Entry:
        """Manage ``obj`` (the user's own unless given) by a user made elsewhere."""
        obj = user.obj if obj is None else obj
        needs = self._needs_of(user)
        self._reclaimer.start()
        made: list[int] = []
        try:
            units = self._add_units(user, needs, made)
            with self._mutex:
                entry = Entry(obj, user, self._new_name(name or type(obj).__name__))
                entry.units, entry.seat = units, self.seat(made)
                entry.ref = weakref.ref(obj, _Death(self, entry))
                self.entries.update(dict.fromkeys(made, entry))
                self._by_id[entry.key] = entry
        except BaseException:
            self._by_id.pop(id(obj), None)
            self._remove_units(made)
            raise
        return entry

    def _needs_of(self, user: ResourcePoolUser) -> dict[str, int]:
        needs = user.needs()
        try:
            counted = {pool: index(nbytes) for pool, nbytes in needs.items()}
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"expected needs() of {type(user).__name__} to return bytes by name of pool, got "
                f"{needs!r:.200}; return a dict of ints"
            ) from error
        return {self.pool(pool).name: nbytes for pool, nbytes in counted.items()}

    def _add_units(
        self, user: ResourcePoolUser, needs: dict[str, int], made: list[int]
    ) -> dict[str, int]:
        for pool, nbytes in needs.items():
            asked = (self.pools[pool]._index, nbytes, 0, 0, user.cost())
            made.extend(map(self.ledger.add_unit, *((value,) for value in asked)))
        return dict(zip(needs, made, strict=True))

    def _remove_units(self, units: Iterable[int]) -> None:
        for unit in units:
            with suppress(ValueError):  # removed before
                self.ledger.remove_unit(unit)
            self.entries.pop(unit, None)

    def renew(self, entry: Entry) -> None:
        """Adopt an object anew whose weights are others now than those that are managed.

        Handles, hooks and options stay. What is in use stays as it is and is warned of.

        Raises:
            Unmanageable, OSError: the new ones cannot be managed; the object is not any more.
        """
        for part in entry.user.parts:
            self.renew(part)
        if not entry.user.strays():
            return
        infos: list[Any] = []
        try:
            with self._mutex:  # of two who are at it one finds it pinned, and pins it again
                infos += (info for unit in entry.all_units if (info := self.unit(unit)) is not None)
                self.update(entry, pin=False)
            self.condemn(entry)
            for pool in tuple(self.pools.values()):
                self.move_all_out(self.ledger.reclaim_condemned, pool._index)
            with entry.moving:
                renewed = self._renewed(entry)
        finally:
            if self._by_id.get(entry.key) is entry:
                priority = max((info.priority for info in infos), default=None)
                pinned = any(info.pinned for info in infos)
                self.update(entry, priority=priority, pin=pinned or None)
        if renewed:
            self.drain()
        else:
            entry.user.warn_of_strays()

    def _renewed(self, entry: Entry) -> bool:
        """Put another user in the place of one that is away. False: it is not."""
        obj, user = entry.ref(), entry.user
        if obj is None or not user.strays():  # another thread was at it
            return True
        if any(self.state(unit) != ABSENT for unit in entry.all_units):
            return False
        before = self._needs_of(user)
        user.close()
        try:
            entry.user = self._user(obj, entry.name, entry.options)
            self._resize(entry, before, self._needs_of(entry.user))
        except BaseException:
            self._dead.put(entry)
            self._retire(entry)
            raise
        return True

    def _resize(self, entry: Entry, before: dict[str, int], needs: dict[str, int]) -> None:
        """Who asks for a unit just now finds it again: it has another size from now on."""
        for pool, unit in entry.units.items():
            riders = self.nbytes(unit) - before.get(pool, 0)  # patches that go and come with it
            self.ledger.set_unit(unit, "nbytes", needs.pop(pool, 0) + riders)
        made: list[int] = []
        try:
            more = self._add_units(entry.user, needs, made)
            self.entries.update(dict.fromkeys(made, entry))
            entry.units = entry.units | more
        except BaseException:
            self._remove_units(made)
            raise
        if more:
            entry.seat.units = tuple(entry.units.values())

    def _new_name(self, name: str) -> str:
        self._names[name] = number = self._names.get(name, 0) + 1
        taken = {entry.name for entry in self.entries.values()}
        while number > 1 or name in taken:
            candidate = f"{name}-{number}" if number > 1 else name
            if candidate not in taken:
                return candidate
            number += 1
        return name

    def seat(self, units: Iterable[int]) -> Any:
        """What leases of these units share."""
        seat = _C.Seat(self.ledger, tuple(units), self.enter_slow, self.leave_slow)
        seat.enter_async = self.enter_async
        return seat

    def update(
        self,
        entry: Entry,
        *,
        priority: int | None = None,
        pin: bool | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """Change what ``manage`` was told about it; None leaves as it is."""
        check_name(name)
        priority = check_priority(priority)
        changed = {key: value for key, value in options.items() if value is not None}
        if changed:
            entry.user.change(**changed)
            entry.options = entry.options | changed
        pump = False
        for leaf in entry.leaves():
            for unit in leaf.units.values():
                if priority is not None:
                    pump |= bool(self.ledger.set_unit(unit, "priority", priority))
                if pin is not None:
                    stays = int(bool(pin) and leaf.user.may_stay)
                    pump |= bool(self.ledger.set_unit(unit, "pinned", stays))
        if name is not None and name != entry.name:
            self.record_all(entry, gone=True)
            with self._mutex:
                entry.name = self._new_name(name)
            self.record_all(entry)
        if pump:
            self.pump()

    def unmanage(self, obj: object) -> None:
        """Let go of ``obj``: it works on as an ordinary object, without hooks, outside any budget.

        Raises:
            PoolRefused: while it is leased, with who holds it.
            PoolFileChanged: after it was let go of: its weights are not all what they were.
        """
        entry = self.find(obj)
        if entry is None:
            return
        entry.user.pause()
        holders = [holder for unit in entry.all_units for holder in self.holders(unit)]
        if holders:
            lines = holder_lines(self, holders)
            raise PoolRefused(
                f"expected {entry.name!r} to be in nobody's use, but {'; '.join(lines)}", lines
            )
        lost = None
        try:
            _raise_if_lost(entry)
        except PoolFileChanged as error:
            lost = error
        self._dead.put(entry)
        self._retire(entry)
        take_off(obj)
        self.drain()
        if lost is not None:  # else nothing would ever say it
            raise lost

    def enter_slow(self, seat: Any, owner: Any, timeout: float | None) -> None:
        """What a seat calls where the short road does not do: returns with the lease counted."""
        self._refuse_gone(seat.units)
        flags = BLOCKS_THREAD
        try:
            enter(Ask(self, owner.id, seat.units, timeout=timeout, flags=flags, seated=True))
        except ValueError:  # the ledger's, where one is gone since
            self._refuse_gone(seat.units)
            raise

    async def enter_async(self, lease: Any, owner: Any, timeout: float | None) -> Any:
        """The same for a task, whose loop goes on meanwhile; returns what the lease yields."""
        self._refuse_gone(lease.seat.units)
        ask = Ask(self, owner.id, lease.seat.units, timeout=timeout)
        try:
            await enter_async(ask, lease.adopt, owner)
        except ValueError:
            self._refuse_gone(lease.seat.units)
            raise
        return lease.value

    def _refuse_gone(self, units: Iterable[int]) -> None:
        for unit in units:
            if self.unit(unit) is None:
                raise PoolError(
                    f"expected {self.name_of(unit)!r} to be managed, it died or was let go of by "
                    "unmanage since; manage again what uses it"
                )

    def leave_slow(self, seat: Any) -> None:
        """What a seat calls when a lease ended for which somebody waits. Takes no lock.

        Also when weights of any user were found to be gone while they were read.

        Raises:
            PoolFileChanged: they were this one's.
        """
        self.pump()
        for unit in seat.units:
            entry = self.entries.get(unit)
            if entry is not None:
                entry.user.raise_if_broken()

    def drain(self) -> bool:
        """Take leave of objects that died. True: some are still in use."""
        for _ in range(self._dead.qsize()):
            try:
                entry = self._dead.get_nowait()
            except Empty:
                break
            self._bury(entry)
        return not self._dead.empty()

    def _retire(self, entry: Entry) -> None:
        """Nobody finds it or may ask for it any more. Two at once do no harm."""
        with self._mutex:
            if self._by_id.get(entry.key) is entry:
                del self._by_id[entry.key]
        for unit in entry.units.values():
            with suppress(ValueError):  # removed before
                self.ledger.remove_unit(unit)
        self.record_all(entry, gone=True)
        self.pump()

    def _bury(self, entry: Entry) -> None:
        self._retire(entry)
        if any(self._busy(unit) for unit in entry.units.values()):
            self._dead.put(entry)
            self._reclaimer.wake()
            return
        for unit in entry.units.values():
            self.entries.pop(unit, None)
            self._told_to_go.discard(unit)
            self.would_not_go.discard(unit)
            self._last_uses.pop(unit, None)
        self._names.pop(entry.name, None)
        with entry.moving:
            try:
                entry.user.close()
            except Exception:
                logger.exception("could not clear up after %r", entry.name)

    def forked(self, gone: Collection[int]) -> None:
        """In a forked child: what threads that are not here held, moved or waited for ends.

        Args:
            gone: idents of the parent's other threads.
        """
        self._mutex = threading.RLock()
        self._reclaimer.forked()
        self._claims.clear()
        self._latches.clear()
        for ticket in self.board.threads():
            self.board.forget(ticket)
        for owner in _C.pool_owners(self.ledger):
            if owner.thread in gone:
                self.ledger.forfeit(owner.id)
        for unit, entry in self.entries.items():
            entry.moving = allocate_lock()
            if self.state(unit) == LOADING:
                self.ledger.failed(unit)
            elif self.state(unit) == EVICTING:
                self.ledger.spared(unit)

    def died(self, entry: Entry) -> None:
        """The object is gone. Runs in finalizers: queues, and does nothing else."""
        self._dead.put(entry)
        self._reclaimer.wake()


def _raise_if_lost(entry: Entry) -> None:
    entry.user.raise_if_lost()
    for member in entry.user.members:
        _raise_if_lost(member)


class _Claim:
    """Of the thread that makes what manages an object; others wait for its latch."""

    def __init__(self) -> None:
        self.thread, self.latch = threading.get_ident(), Latch()


class _Death:
    """Called when an object dies; holds its entry, which holds no object."""

    def __init__(self, management: Members, entry: Entry) -> None:
        self._management = management
        self._entry = entry

    def __call__(self, _ref: object) -> None:
        self._management.died(self._entry)
