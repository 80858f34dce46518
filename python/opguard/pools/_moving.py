"""Bytes in and out: what the users do once the ledger has decided."""

from __future__ import annotations

import logging
import time
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from opguard.pools._books import EVICTING, READY, Books, Entry
from opguard.pools._budgets import parse_bytes
from opguard.pools._reclaiming import Reclaimer
from opguard.pools.errors import PoolError, PoolFileChanged
from opguard.pools.policies import Candidate, rank_of
from opguard.pools.resource_pools import ResourcePool

__all__ = ["Moving"]

EVERYTHING = 1 << 60
logger = logging.getLogger("opguard.pools")
# Seconds that `free` waits for others who give back.
PATIENCE = 1.0


class _Victims:
    """Units the ledger chose to go; whom nobody moved is spared."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self.chosen: list[tuple[int, ...]] = []
        self.settled: list[bool] = []

    def spare(self) -> None:
        units = [unit for units in self.chosen for unit in units]
        self.settled.extend(map(self._ledger.spared, units[len(self.settled) :]))
        self.__class__ = _Victims


class _Unspared(_Victims):
    """Where an interrupt ends the sparing, the finalizer goes on; as an ask's in ``_requests``."""

    def __del__(self) -> None:
        self.spare()


class Moving(Books):
    """Moves users in and out. Called under no lock but an entry's own."""

    def __init__(self) -> None:
        super().__init__()
        self._told_to_go: set[int] = set()
        self.would_not_go: set[int] = set()
        self._rank: Callable[[Candidate], float] | None = None
        self._ranking: set[int] = set()  # threads
        self._reclaimer = Reclaimer(self)
        self._sweep_next = 0
        # By unit: how often it had been used when nobody did, and the mark set after that.
        self._last_uses: dict[int, tuple[int, Any]] = {}

    def stop(self) -> None:
        """End the thread that gives back later. The next object that is managed starts it again."""
        self._reclaimer.stop()

    def drain(self) -> bool:
        """Take leave of objects that died. True: some are still in use."""
        return False

    def free(
        self, device: torch.device | str | None = None, nbytes: int | str | None = None
    ) -> int:
        """Give back idle users, least valuable first. Returns bytes that came free.

        Args:
            device: of which memory; None is where modules run.
            nbytes: at least so many, where there are, as bytes or text; None is all.
        """
        pool = self.execution_pool if device is None else self.pool(device)
        wanted = EVERYTHING if nbytes is None else parse_bytes(nbytes, what="bytes to free")
        for unit in tuple(self.would_not_go):  # they may by now: there is room on the disk again
            if self.state(unit) == READY:
                self.ledger.condemn(unit)
        self._rank_if_it_can()
        freed = self.move_all_out(self.ledger.reclaim, pool._index, wanted, 0)
        # Another thread is at it: what it gives back is free then, too. Not so one who was granted
        # bytes and cannot move them before this returns: a task of the loop that runs here.
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._leaving(pool):
            time.sleep(0.0005)
        return freed

    def _leaving(self, pool: ResourcePool) -> bool:
        return any(self.state(unit) == EVICTING for unit in self.ledger.units(pool._index))

    def condemn(self, entry: Entry) -> None:
        """Tell it to go: it does soon, or when the bytes are needed, or stays if entered again."""
        entry.user.pause()
        for unit in entry.all_units:
            if not self.ledger.condemn(unit):
                self._told_to_go.add(unit)
        self._reclaimer.wake()

    def move_all_out(self, choose: Callable[..., tuple[int, ...]], *args: int) -> int:
        """Give back what the ledger chooses; what would not go stays. Returns bytes.

        Args:
            choose: a function of the ledger; it is called here, so that an interrupt right after
                it finds what it chose.
        """
        freed = 0
        victims = _Victims(self.ledger)
        try:
            victims.chosen.extend(map(choose, *((arg,) for arg in args)))
            for unit in victims.chosen[0]:
                nbytes = self.nbytes(unit)
                if self.move_out(unit, victims.settled) is None:
                    freed += nbytes
        finally:
            victims.__class__ = _Unspared
            victims.spare()
            self.pump()
        return freed

    def move_out(self, unit: int, settled: list[bool]) -> Exception | None:
        """Have a unit's user give its bytes back; ``settled`` gets the ledger's answer.

        Returns:
            The exception of a user that would not go.
        """
        entry = self.entries[unit]
        # Whoever reads on in this tells the ledger, and only the first time.
        told = map(self.ledger.evicted, (unit,))
        with entry.moving, self._told_last_use(entry, unit):
            try:
                written = self._given_back(entry)
                settled.extend(told)
                entry.stats.trouble = None
            except PoolFileChanged as error:
                # There is nowhere to write it, and kept it would go on in use. It comes in no more.
                settled.extend(told)
                written, entry.stats.trouble = 0, f"{type(error).__name__}: {error}"
            except Exception as error:
                settled.extend(map(self.ledger.kept, (unit,)))
                self.would_not_go.add(unit)
                entry.stats.trouble = f"{type(error).__name__}: {error}"
                return error
            except BaseException:
                # An interrupt says nothing of how far it came; what is given back twice is nothing.
                try:
                    self._put_out(entry)
                except Exception:
                    told = map(self.ledger.evicted, ())  # it stays: whoever chose it spares it
                finally:
                    settled.extend(told)
                raise
        self.would_not_go.discard(unit)
        entry.stats.written_back += written
        entry.stats.evictions += 1
        self.record_all(entry)
        return None

    @contextmanager
    def _told_last_use(self, entry: Entry, unit: int) -> Iterator[None]:
        """For a block the user knows the mark after its last use, where there is one."""
        uses, mark = self._last_uses.pop(unit, (-1, None))
        info = self.unit(unit)
        entry.user.unused_since(mark if info is not None and info.uses == uses else None)
        try:
            yield
        finally:
            entry.user.unused_since(None)

    def _mark_last_uses(self, entry: Entry) -> None:
        """Before a user comes in: who is idle need not wait later for what is queued from now on.

        A lease sets no mark when it ends: that would cost every call, for the few that are followed
        by an eviction.
        """
        pool = self.execution_pool
        accelerator = pool.accelerator
        if accelerator is None or pool.name not in entry.units:
            return
        infos = ((unit, self.unit(unit)) for unit in self.ledger.units(pool._index))
        idle = {
            unit: info.uses
            for unit, info in infos
            if info is not None and info.state == READY and not info.leases
            if self._last_uses.get(unit, (-1, None))[0] != info.uses
        }
        with suppress(RuntimeError):
            mark = accelerator.mark() if idle else None
            if mark is not None:
                self._last_uses.update({unit: (uses, mark) for unit, uses in idle.items()})

    @classmethod
    def _given_back(cls, entry: Entry) -> int:
        riders = tuple(entry.riders)
        try:
            written = cls._put_out(entry)
            return written if isinstance(written, int) else 0  # a figure, whoever wrote the class
        except Exception:
            for rider in riders:
                rider.bring_in()
            raise

    @staticmethod
    def _put_out(entry: Entry) -> int | None:
        for rider in reversed(tuple(entry.riders)):
            rider.give_back()
        return entry.user.give_back()

    @classmethod
    def _ride_in(cls, entry: Entry) -> None:
        """What goes and comes with the user; where that fails, neither of them is in."""
        try:
            for rider in tuple(entry.riders):
                rider.bring_in()
        except Exception:
            cls._put_out(entry)
            raise

    def move_in(self, unit: int, settled: list[bool]) -> None:
        """Have a unit's user come in; ``settled`` gets the ledger's answer.

        Raises:
            Exception: the user's own, with a note that names it.
        """
        entry = self.entries[unit]
        if entry.ref() is None:
            raise PoolError(f"expected {entry.name!r} to be alive to be brought in; it is gone")
        with entry.moving, entry.stats.loading():
            self._mark_last_uses(entry)
            before = len(settled)
            try:
                room = entry.user.memory_of_calls()
                moved = entry.user.bring_in()
                self._ride_in(entry)
                settled.extend(map(self.ledger.loaded, (unit,)))
            except Exception as error:
                error.add_note(f"while bringing in {entry.name!r}")
                raise
            except BaseException:
                if len(settled) == before:
                    with suppress(Exception):
                        self._put_out(entry)
                raise
        self.open_latch(unit)
        entry.stats.bytes_in += moved if isinstance(moved, int) else self.nbytes(unit)
        self.record_all(entry)
        self._sweep_one()
        info = self.unit(unit) if room else None
        if info is not None:
            self._leave_room(info.pool, room)

    def _leave_room(self, pool: int, nbytes: int) -> None:
        """Have idle users go until that much of the pool is free, or none is left."""
        budget, used = self.ledger.pool(pool)[:2]
        if used + nbytes > budget:
            self._rank_if_it_can()
            self.move_all_out(self.ledger.reclaim, pool, used + nbytes - budget, 0)

    def reclaim_idle(self) -> bool:
        """Give back who was told to go, and what is above a budget. True: some are still in use."""
        above = self.drain()
        for pool in tuple(self.pools.values()):
            self.move_all_out(self.ledger.reclaim_condemned, pool._index)
            above |= self._reclaim_above_budget(pool)
        for unit in tuple(self._told_to_go):
            if not self._condemned_in_use(unit):
                self._told_to_go.discard(unit)
        return above or bool(self._told_to_go)

    def _reclaim_above_budget(self, pool: ResourcePool) -> bool:
        self._leave_room(pool._index, 0)
        budget, used = self.ledger.pool(pool._index)[:2]
        return bool(used > budget)

    def _sweep_one(self) -> None:
        """One absent user gives back what readers without a lease made resident."""
        entries = tuple(self.entries.values())
        if len(entries) < 2:
            return
        self._sweep_next = (self._sweep_next + 1) % len(entries)
        entry = entries[self._sweep_next]
        held: list[bool] = []  # an interrupt may come right after the lock was taken
        try:
            held.extend(map(entry.moving.acquire, (False,)))
            if held[0] and all(self.state(unit) == 0 for unit in entry.units.values()):
                with suppress(Exception):
                    entry.user.sweep()
        finally:
            if held and held[0]:
                entry.moving.release()

    def rank(self) -> None:
        """Ask a callable policy about all who could go. Under no lock; the ledger validates.

        Raises:
            Exception: the policy's own, or that it answers no number.
        """
        policy, me = self._rank, get_ident()
        if policy is None or me in self._ranking:  # it uses pools itself
            return
        self._ranking.add(me)
        try:
            for unit, entry in self.entries.copy().items():
                self._rank_one(policy, unit, entry)
        finally:
            self._ranking.discard(me)

    def _rank_one(self, policy: Callable[[Candidate], float], unit: int, entry: Entry) -> None:
        info = self.unit(unit)
        if info is None or info.state != READY or info.leases or info.pinned:
            return
        for name, pool in self.pools.items():
            if entry.units.get(name) == unit:
                candidate = Candidate(
                    entry.name, pool.name, pool.device, info.nbytes, info.priority,
                    info.uses, info.tick, info.cost,
                )  # fmt: skip
                rank = rank_of(policy, candidate)
                with suppress(ValueError):  # it went meanwhile
                    self.ledger.set_unit(unit, "rank", rank)

    def _rank_if_it_can(self) -> None:
        try:
            self.rank()
        except Exception:
            logger.exception("the policy failed; who goes is chosen by what it said before")
