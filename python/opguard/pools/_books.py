"""Who is managed, and what the ledger knows of it; the lowest layer of a management."""

from __future__ import annotations

import weakref
from _thread import allocate_lock
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from opguard import _C
from opguard.pools._counting import Recorder, Stats
from opguard.pools._waiting import Board, Latch
from opguard.pools.resource_pools import ResourcePool
from opguard.pools.users import ResourcePoolUser

__all__ = ["ABSENT", "EVICTING", "LOADING", "READY", "Books", "Entry"]

ABSENT, LOADING, READY, EVICTING = 0, 1, 2, 3


class Entry:
    """One managed object: its user, its units, its seat. The object itself is held weakly."""

    def __init__(self, obj: object, user: ResourcePoolUser, name: str) -> None:
        self.key = id(obj)
        self.ref: weakref.ref[Any] = weakref.ref(obj)
        self.user = user
        self.name = name
        self.units: dict[str, int] = {}
        self.seat: Any = None
        self.stats = Stats()
        # What it was managed with, for the case that it is adopted anew.
        self.options: dict[str, Any] = {}
        # What goes and comes with the user, in order: patches that are on it.
        self.riders: list[Any] = []
        # Held while bytes move; waited for only by who moves them.
        self.moving = allocate_lock()

    def leaves(self) -> Iterator[Entry]:
        """Itself, or the entries it is made of: those that have units."""
        members = self.user.members
        if not members:
            yield self
        for member in members:
            yield from member.leaves()

    @property
    def all_units(self) -> tuple[int, ...]:
        """Its units, or those of what it is made of."""
        return tuple(unit for leaf in self.leaves() for unit in leaf.units.values())

    def __repr__(self) -> str:
        return f"<{self.name!r}: {self.user.describe()}>"


class Books:
    """Tables, and questions to the ledger. Nothing here takes a lock or touches a file."""

    def __init__(self) -> None:
        self.ledger: Any = _C.Ledger()
        self.pools: dict[str, ResourcePool] = {}
        self.entries: dict[int, Entry] = {}
        self.board = Board()
        self.recorder = Recorder()
        self._latches: dict[int, Latch] = {}

    def pool(self, name: str | torch.device) -> ResourcePool:
        """The pool of that name or device; ``"cuda"`` is the first of them.

        Raises:
            KeyError: naming the pools there are.
        """
        name = str(name)
        found = self.pools.get(name, self.pools.get(f"{name}:0"))
        if found is None:
            raise KeyError(f"expected one of the pools {sorted(self.pools)}, got {name!r}")
        return found

    @property
    def execution_pool(self) -> ResourcePool:
        """Where modules run: the first accelerator there is a pool for, else host memory."""
        pools = self.pools.values()
        return next((pool for pool in pools if pool.executes), None) or self.pool("cpu")

    @property
    def execution_device(self) -> torch.device:
        """The device of `execution_pool`."""
        return self.execution_pool.device

    def pump(self) -> None:
        """Grant what can be granted now. Takes no lock: finalizers come here too."""
        tickets = list(self.ledger.pump(0))
        while tickets:
            ticket = tickets.pop()
            if not self.board.granted(ticket) and self.ledger.cancel(ticket):
                tickets += self.ledger.pump(0)

    def latch(self, unit: int) -> Latch:
        """What opens when the load of a unit ends; ask whether it still loads after this."""
        return self._latches.setdefault(unit, Latch())

    def open_latch(self, unit: int) -> None:
        latch = self._latches.pop(unit, None)
        if latch is not None:
            latch.open()

    def unit(self, unit: int) -> Any:
        """What the ledger knows of a unit, or None where it is gone."""
        try:
            return self.ledger.unit(unit)
        except ValueError:
            return None

    def state(self, unit: int) -> int:
        info = self.unit(unit)
        return 0 if info is None else int(info.state)

    def nbytes(self, unit: int) -> int:
        info = self.unit(unit)
        return 0 if info is None else int(info.nbytes)

    def name_of(self, unit: int) -> str:
        entry = self.entries.get(unit)
        return entry.name if entry else f"unit {unit}"

    def owner(self, owner: int) -> Any:
        """The thread or task of an owner's id, or None where it is gone."""
        return next((found for found in _C.pool_owners(self.ledger) if found.id == owner), None)

    def _busy(self, unit: int) -> bool:
        info = self.unit(unit)
        return info is not None and (info.leases > 0 or info.state not in (0, READY))

    def _condemned_in_use(self, unit: int) -> bool:
        info = self.unit(unit)
        return info is not None and info.condemned and info.leases > 0

    def holders(self, unit: int) -> list[tuple[int, int, int]]:
        """(owner, unit, count) of each lease; none of a unit that is gone."""
        with suppress(ValueError):
            return [(owner, unit, count) for owner, count in self.ledger.holders(unit)]
        return []

    def in_the_way(self, units: Sequence[int]) -> list[tuple[int, int, int]]:
        """Leases in the pools that these units are from."""
        pools = {pool for unit in units for pool, u in self._units_of(unit) if u == unit}
        return [
            holder
            for unit, entry in self.entries.copy().items()
            if any(entry.units.get(pool) == unit for pool in pools)
            for holder in self.holders(unit)
        ]

    def _units_of(self, unit: int) -> list[tuple[str, int]]:
        entry = self.entries.get(unit)
        return list(entry.units.items()) if entry else []

    def count_unmet(self, units: Iterable[int]) -> None:
        """Uses that the ledger counted, and that were no hits."""
        for unit in units:
            entry = self.entries.get(unit)
            if entry is not None:
                entry.stats.unmet += 1

    def note_wait(self, units: Sequence[int], seconds: float) -> None:
        """Account time that a request for these units waited."""
        for unit in units[:1]:
            entry = self.entries.get(unit)
            if entry is not None:
                entry.stats.waited += seconds

    def record_all(self, entry: Entry, *, gone: bool = False) -> None:
        """Note what is used now, for peaks and pictures, and what a user has that came or went."""
        for name, unit in entry.units.items():
            pool, info = self.pools[name], self.unit(unit)
            held = 0 if gone or info is None or info.state != READY else info.nbytes
            self.recorder.note(pool.name, pool.used, entry.name, held)
