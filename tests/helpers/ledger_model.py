"""What the ledger of the pools must do, slowly and in plain Python: the oracle of its tests.

Ids come from the caller, who takes them from the ledger that is tested.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ABSENT, LOADING, READY, EVICTING = range(4)
GRANTED, WAIT, TOO_LARGE, DEADLOCK, BUSY, GONE = range(6)
TRY, BLOCKS_THREAD = 1, 2


@dataclass
class Unit:
    """What one user takes in one pool."""

    id: int
    pool: int
    nbytes: int
    priority: int = 0
    pinned: bool = False
    cost: float = 1.0
    rank: float = 0.0
    state: int = ABSENT
    condemned: bool = False
    kept: bool = False
    doomed: bool = False
    claimed: bool = False
    credit: int = 0
    tick: int = 0
    uses: int = 0
    age: float = 0.0


@dataclass
class Owner:
    """A thread or a task."""

    id: int
    parent: int
    thread: int
    dropped: bool = False


@dataclass
class Ticket:
    """A request, from asking to taking."""

    id: int
    owner: int
    units: tuple[int, ...]
    extra: tuple[tuple[int, int], ...]
    tick: int
    flags: int
    verdict: int = WAIT
    evict: list[int] = field(default_factory=list)
    load: list[int] = field(default_factory=list)


class Model:
    """Names and meanings are the ledger's; ``leases[owner, unit]`` and ``extra[owner, pool]``."""

    def __init__(self) -> None:
        self.budgets: list[int] = []
        self.units: dict[int, Unit] = {}
        self.owners: dict[int, Owner] = {}
        self.leases: Counter[tuple[int, int]] = Counter()
        self.extra: Counter[tuple[int, int]] = Counter()
        self.queue: list[Ticket] = []
        self.decided: dict[int, Ticket] = {}
        self.policy = "lru"
        self.clock = 0.0
        self.tick = 0
        self.upset = False  # what waits may have become impossible
        self.news: list[int] = []  # decided, and nobody was told

    # --- what is so now ---------------------------------------------------------------------------

    def count(self, unit: int) -> int:
        return sum(n for (_, held), n in self.leases.items() if held == unit)

    def used(self, pool: int) -> int:
        there = [u for u in self.units.values() if u.pool == pool and u.state != ABSENT]
        extra = sum(n for (_, where), n in self.extra.items() if where == pool)
        return sum(u.nbytes - u.credit for u in there) + extra

    def is_idle(self, unit: Unit) -> bool:
        free = not unit.pinned and not unit.kept and self.count(unit.id) == 0
        return unit.state == READY and free

    def idle(self, pool: int) -> list[Unit]:
        return [u for u in self.units.values() if u.pool == pool and self.is_idle(u)]

    def line(self, owner: int) -> list[int]:
        """The owner and those it descends from."""
        found = []
        while owner:
            found.append(owner)
            owner = self.owners[owner].parent
        return found

    def holding(self) -> set[int]:
        return {o for o, _ in +self.leases} | {o for o, _ in +self.extra}

    def holds(self, owner: int) -> bool:
        return bool(self.holding() & set(self.line(owner)))

    # --- leases -----------------------------------------------------------------------------------

    def next_tick(self, tick: int) -> int:
        tick = tick or self.tick + 1
        self.tick = max(self.tick, tick)
        return tick

    def add_leases(self, owner: int, units: tuple[int, ...]) -> None:
        for unit in units:
            if self.count(unit) == 0:
                self.units[unit].kept = False
            self.leases[owner, unit] += 1
            self.upset = self.upset or bool(self.queue)

    def touch(self, units: tuple[int, ...], tick: int) -> None:
        for name in units:
            unit = self.units[name]
            unit.tick, unit.age, unit.condemned = tick, self.clock, False
            unit.uses += 1

    def enter(self, owner: int, units: tuple[int, ...], tick: int) -> bool:
        if any(self.units[u].state != READY for u in units):
            return False
        pools = {self.units[u].pool for u in units}
        if not self.holds(owner) and any(pools & self.pools(t) for t in self.queue):
            return False
        self.add_leases(owner, units)
        self.touch(units, self.next_tick(tick))
        return True

    def leave(self, owner: int, units: tuple[int, ...], extra: tuple[tuple[int, int], ...]) -> None:
        for unit in units:
            self.leases[owner, unit] -= 1
            assert self.leases[owner, unit] >= 0
            self.settle(unit)
        for pool, nbytes in extra:
            self.extra[owner, pool] -= nbytes
            assert self.extra[owner, pool] >= 0

    # --- units ------------------------------------------------------------------------------------

    def become(self, name: int, state: int) -> None:
        unit = self.units[name]
        unit.state, unit.credit, unit.claimed = state, 0, False
        if state == ABSENT:
            unit.condemned = unit.kept = False
        self.settle(name)

    def settle(self, name: int) -> None:
        """A removed unit goes once nobody uses it."""
        unit = self.units.get(name)
        if unit is None or not unit.doomed or self.count(name):
            return
        if unit.state == READY:
            unit.state = ABSENT
        tickets = [*self.queue, *self.decided.values()]
        if unit.state == ABSENT and not any(name in t.units for t in tickets):
            del self.units[name]

    def resize(self, name: int, nbytes: int) -> None:
        unit = self.units[name]
        unit.nbytes, unit.credit = nbytes, min(unit.credit, nbytes)

    # --- planning ---------------------------------------------------------------------------------

    def order(self, unit: Unit) -> tuple[object, ...]:
        score = {
            "lru": 0.0,
            "cost": unit.age + unit.uses * unit.cost / max(unit.nbytes, 1),
            "rank": unit.rank,
        }[self.policy]
        return (not unit.condemned, unit.priority, score, unit.tick, unit.id)

    def choose(self, pool: int, nbytes: int, without: tuple[int, ...] = ()) -> list[int]:
        picked: list[Unit] = []
        for unit in sorted(self.idle(pool), key=self.order):
            if sum(u.nbytes for u in picked) >= nbytes:
                break
            if unit.id not in without:
                picked.append(unit)
        for unit in reversed(list(picked)):
            if sum(u.nbytes for u in picked) - unit.nbytes >= nbytes:
                picked.remove(unit)
        return [unit.id for unit in picked]

    def reclaim(self, pool: int, nbytes: int) -> list[int]:
        chosen = self.choose(pool, nbytes)
        for name in chosen:
            self.become(name, EVICTING)
        return chosen

    def pools(self, ticket: Ticket) -> set[int]:
        return {self.units[u].pool for u in ticket.units} | {p for p, _ in ticket.extra}

    def wanted(self, ticket: Ticket, states: set[int]) -> Counter[int]:
        """Bytes a pool: of the ticket's units in these states, and its extra."""
        found: Counter[int] = Counter()
        for name in set(ticket.units):
            if self.units[name].state in states:
                found[self.units[name].pool] += self.units[name].nbytes
        for pool, nbytes in ticket.extra:
            found[pool] += nbytes
        return found

    def grant(self, ticket: Ticket) -> bool:
        units = [self.units[name] for name in ticket.units]
        if any(u.state == EVICTING or u.doomed for u in units):
            return False
        need = +self.wanted(ticket, {ABSENT})
        missing = {p: max(0, self.used(p) + n - self.budgets[p]) for p, n in need.items()}
        for pool, nbytes in missing.items():
            idle = [u for u in self.idle(pool) if u.id not in ticket.units]
            if sum(u.nbytes for u in idle) < nbytes:
                return False
        for pool in sorted(missing):
            chosen = self.choose(pool, missing[pool], ticket.units)
            left = missing[pool]
            for name in chosen:
                self.become(name, EVICTING)
                self.units[name].claimed = True
                self.units[name].credit = min(left, self.units[name].nbytes)
                left -= self.units[name].credit
            ticket.evict[:0] = chosen
        for unit in units:
            if unit.state == ABSENT:
                unit.state = LOADING
                self.upset = self.upset or unit.pinned
                ticket.load.append(unit.id)
        self.add_leases(ticket.owner, ticket.units)
        for pool, nbytes in ticket.extra:
            self.extra[ticket.owner, pool] += nbytes
            self.upset = self.upset or bool(self.queue and nbytes)
        return True

    def never(self, ticket: Ticket) -> bool:
        need = +self.wanted(ticket, {ABSENT, EVICTING})
        for pool in need:
            pinned = [u for u in self.units.values() if u.pool == pool and u.pinned]
            others = [u for u in pinned if u.state != ABSENT and u.id not in ticket.units]
            room = self.budgets[pool] - sum(u.nbytes for u in others)
            if self.wanted(ticket, {ABSENT, LOADING, READY, EVICTING})[pool] > room:
                return True
        return False

    # --- waiting ----------------------------------------------------------------------------------

    def cannot_finish(self, waiting: list[Ticket]) -> set[int]:
        """Owners that some of the tickets come before."""
        found: set[int] = set()
        for ticket in waiting:
            found |= set(self.line(ticket.owner))
            thread = self.owners[ticket.owner].thread
            if ticket.flags & BLOCKS_THREAD and thread:
                found |= {o.id for o in self.owners.values() if o.thread == thread}
        return found

    def fits(self, ticket: Ticket, stuck_owners: set[int]) -> bool:
        if any(self.units[u].doomed for u in ticket.units):
            return True
        for pool in self.pools(ticket):
            stuck = {
                u.id: u.nbytes
                for u in self.units.values()
                if u.pool == pool
                and u.state != ABSENT
                and (u.pinned or u.kept or any(self.leases[o, u.id] for o in stuck_owners))
            }
            taken = sum(stuck.values()) + sum(self.extra[o, pool] for o in stuck_owners)
            more = sum(n for p, n in ticket.extra if p == pool) + sum(
                self.units[u].nbytes
                for u in set(ticket.units) - set(stuck)
                if self.units[u].pool == pool
            )
            if more and taken + more > self.budgets[pool]:
                return False
        return True

    def hopeless(self, waiting: list[Ticket]) -> list[Ticket]:
        """Those that could wait for ever."""
        left = list(waiting)
        while True:
            stuck = self.cannot_finish(left)
            good = [t for t in left if self.fits(t, stuck) and not self.is_stopped(t, left)]
            if not good:
                return left
            left = [t for t in left if t not in good]

    def may_overtake(self, ticket: Ticket) -> bool:
        if self.holds(ticket.owner):
            return True
        thread = self.owners[ticket.owner].thread
        needed = self.holding() | {t.owner for t in self.queue if self.holds(t.owner)}
        same = {o for o in needed if self.owners[o].thread == thread}
        return bool(ticket.flags & BLOCKS_THREAD and thread and same)

    def is_stopped(self, ticket: Ticket, waiting: list[Ticket]) -> bool:
        thread = self.owners[ticket.owner].thread
        stopped = {self.owners[t.owner].thread for t in waiting if t.flags & BLOCKS_THREAD}
        return bool(thread and thread in stopped and not ticket.flags & BLOCKS_THREAD)

    def request(self, ticket: Ticket) -> int:
        before: set[int] = set().union(*(self.pools(t) for t in self.queue))
        in_turn = not self.pools(ticket) & before or self.may_overtake(ticket)
        if in_turn and self.grant(ticket):
            ticket.verdict = GRANTED
        elif self.never(ticket):
            ticket.verdict = TOO_LARGE
        elif ticket.flags & TRY:
            ticket.verdict = BUSY
        elif ticket in self.hopeless([*self.queue, ticket]):
            if self.upset:
                self.refuse_hopeless()
                return self.request(ticket)
            ticket.verdict = DEADLOCK
        else:
            self.queue.append(ticket)
        if ticket.verdict == GRANTED:
            self.count_grant(ticket)
        return ticket.verdict

    def count_grant(self, ticket: Ticket) -> None:
        tick = self.next_tick(ticket.tick)
        for name in ticket.evict:
            unit = self.units[name]
            unit.claimed = False
            if self.policy == "cost" and not unit.condemned:
                score = unit.age + unit.uses * unit.cost / max(unit.nbytes, 1)
                self.clock = max(self.clock, score)
        self.touch(ticket.units, tick)

    def decide(self, ticket: Ticket, verdict: int) -> None:
        self.queue.remove(ticket)
        ticket.verdict = verdict
        self.decided[ticket.id] = ticket
        self.news.append(ticket.id)

    def pump(self, tick: int) -> list[int]:
        while True:
            if self.upset:
                self.refuse_hopeless()
            self.grant_waiting(tick)
            if not self.upset or not self.queue:
                told, self.news = self.news, []
                return [name for name in told if name in self.decided]

    def refuse_hopeless(self) -> None:
        self.upset = False
        for ticket in list(self.queue):
            if any(self.units[u].doomed for u in ticket.units):
                self.decide(ticket, GONE)
            elif self.never(ticket):
                self.decide(ticket, TOO_LARGE)
        while bad := self.hopeless(self.queue):
            self.decide(bad[-1], DEADLOCK)

    def grant_waiting(self, tick: int) -> None:
        held_up: set[int] = set()
        for ticket in list(self.queue):
            if self.is_stopped(ticket, self.queue):
                continue
            in_turn = not self.pools(ticket) & held_up
            if (in_turn or self.may_overtake(ticket)) and self.grant(ticket):
                ticket.tick = tick
                self.decide(ticket, GRANTED)
            else:
                held_up |= self.pools(ticket)

    def take(self, name: int) -> Ticket:
        ticket = self.decided.pop(name)
        if ticket.verdict == GRANTED:
            self.count_grant(ticket)
        for unit in ticket.units:
            self.settle(unit)
        return ticket

    def cancel(self, name: int) -> None:
        queued = [t for t in self.queue if t.id == name]
        ticket = queued[0] if queued else self.decided.pop(name)
        if queued:
            self.queue.remove(ticket)
        elif ticket.verdict == GRANTED:
            for unit in ticket.load:
                if self.units[unit].state == LOADING:
                    self.become(unit, ABSENT)
            self.leave(ticket.owner, ticket.units, ticket.extra)
            for unit in ticket.evict:
                self.become(unit, READY)
        for unit in ticket.units:
            self.settle(unit)
