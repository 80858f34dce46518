"""What the ledger of the pools must do, slowly and in plain Python: the oracle of its tests.

Ids come from the caller, who takes them from the ledger that is tested.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ABSENT, LOADING, READY, EVICTING = range(4)
GRANTED, WAIT, TOO_LARGE, DEADLOCK, BUSY, GONE = range(6)
TRY, BLOCKS_THREAD, ENDS = 1, 2, 4


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
    asked: int = 0
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
        self.now = 0  # a number for each request and grant, in their order
        # When each lease, and each extra byte, was asked for and when it came.
        self.flows: dict[tuple[str, int, int], list[tuple[int, int]]] = {}

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

    def later(self) -> int:
        self.now += 1
        return self.now

    def note(self, what: str, owner: int, where: int, asked: int, count: int = 1) -> None:
        flow = (asked, self.later())
        self.flows.setdefault((what, owner, where), []).extend([flow] * count)

    def forget(self, what: str, owner: int, where: int, count: int = 1) -> None:
        """So many are left: of those that can be, the newest."""
        flows = self.flows[what, owner, where]
        for flow in sorted(flows, key=lambda flow: self.can_go(owner, flow))[len(flows) - count :]:
            flows.remove(flow)

    def can_go(self, owner: int, flow: tuple[int, int]) -> bool:
        """Whether no request that waits keeps the owner from leaving what came so. Who asks while
        an earlier request of his waits does it in a finalizer, or has no tasks that we know."""
        asked, came = flow
        return all(
            ticket.owner == owner
            and came > ticket.asked
            and (asked > ticket.asked or not self.stops(ticket, owner))
            for ticket in self.queue
            if owner in self.kept(ticket)
        )

    def can_leave(self, what: str, owner: int, where: int) -> int:
        """How many leases of a unit, how many extra bytes in a pool."""
        return sum(self.can_go(owner, flow) for flow in self.flows[what, owner, where])

    def add_leases(self, owner: int, units: tuple[int, ...], asked: int) -> None:
        for unit in units:
            if self.count(unit) == 0:
                self.units[unit].kept = False
            self.leases[owner, unit] += 1
            self.note("unit", owner, unit, asked)

    def touch(self, units: tuple[int, ...], tick: int) -> None:
        for name in units:
            unit = self.units[name]
            unit.tick, unit.age, unit.condemned = tick, self.clock, False
            unit.uses += 1

    def enter(self, owner: int, units: tuple[int, ...], tick: int) -> bool:
        if any(self.units[u].state != READY for u in units):
            return False
        pools = {self.units[u].pool for u in units}
        if any(pools & self.pools(t) for t in self.queue):
            line = self.line(owner)
            held = all(any(self.leases[o, u] for o in line) for u in units)
            kept = self.keeps_waiting(owner, self.queue)
            if not self.holds(owner) or (kept and not held):
                return False
        self.add_leases(owner, units, self.later())
        self.touch(units, self.next_tick(tick))
        return True

    def leave(self, owner: int, units: tuple[int, ...], extra: tuple[tuple[int, int], ...]) -> None:
        for unit in units:
            self.leases[owner, unit] -= 1
            self.forget("unit", owner, unit)
            assert self.leases[owner, unit] >= 0
            self.settle(unit)
        for pool, nbytes in extra:
            self.extra[owner, pool] -= nbytes
            assert self.extra[owner, pool] >= 0
            self.forget("extra", owner, pool, nbytes)

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
            unit.state, unit.condemned, unit.kept = ABSENT, False, False
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

    def missing(self, ticket: Ticket) -> dict[int, int]:
        need = +self.wanted(ticket, {ABSENT})
        return {p: max(0, self.used(p) + n - self.budgets[p]) for p, n in need.items()}

    def fits_now(self, ticket: Ticket) -> bool:
        if any(self.units[u].state == EVICTING or self.units[u].doomed for u in ticket.units):
            return False
        return all(
            sum(u.nbytes for u in self.idle(pool) if u.id not in ticket.units) >= nbytes
            for pool, nbytes in self.missing(ticket).items()
        )

    def is_safe(self, ticket: Ticket) -> bool:
        """Whether everybody who waits can be met after the grant."""
        others = [t for t in self.queue if t is not ticket]
        return not self.keeps_waiting(ticket.owner, others) or not self.hopeless(others, [ticket])

    def grant(self, ticket: Ticket) -> None:
        units = [self.units[name] for name in ticket.units]
        missing = self.missing(ticket)
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
        self.add_leases(ticket.owner, ticket.units, ticket.asked)
        for pool, nbytes in ticket.extra:
            self.extra[ticket.owner, pool] += nbytes
            self.note("extra", ticket.owner, pool, ticket.asked, nbytes)

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

    def kept(self, ticket: Ticket) -> set[int]:
        """Owners that cannot finish before the ticket is met."""
        thread = self.owners[ticket.owner].thread
        found = {ticket.owner} if ticket.flags & ENDS else set(self.line(ticket.owner))
        if ticket.flags & BLOCKS_THREAD and thread:
            found |= {o.id for o in self.owners.values() if o.thread == thread}
        return found

    def fits(self, ticket: Ticket, stuck_owners: set[int], charged: list[Ticket]) -> bool:
        """Whether it fits beside what these owners hold, and what these tickets were granted."""
        if any(self.units[u].doomed for u in ticket.units):
            return True
        given = {name for t in charged for name in t.units}
        for pool in self.pools(ticket):
            stuck = {
                u.id: u.nbytes
                for u in self.units.values()
                if u.pool == pool
                and (u.id in given or u.state != ABSENT)
                and (
                    u.id in given
                    or u.pinned
                    or u.kept
                    or any(self.leases[o, u.id] for o in stuck_owners)
                )
            }
            extra = [n for t in charged for p, n in t.extra if p == pool]
            extra += [self.extra[o, pool] for o in stuck_owners]
            more = sum(n for p, n in ticket.extra if p == pool) + sum(
                self.units[u].nbytes
                for u in set(ticket.units) - set(stuck)
                if self.units[u].pool == pool
            )
            if more and sum(stuck.values()) + sum(extra) + more > self.budgets[pool]:
                return False
        return True

    def hopeless(self, waiting: list[Ticket], granted: list[Ticket] | None = None) -> list[Ticket]:
        """Those that could wait for ever, the first of all granted or charged to who goes on."""
        left, charged = list(waiting), list(granted or [])
        while True:
            stuck = set().union(*map(self.kept, left))
            charged = [t for t in charged if self.keeps_waiting(t.owner, left)]
            good = [
                t for t in left if self.fits(t, stuck, charged) and not self.is_stopped(t, left)
            ]
            ends = [
                t for t in good if not self.keeps_waiting(t.owner, [o for o in left if o is not t])
            ]
            others = [t for t in good if self.stops_others(t, left, charged)]
            if ends:
                left.remove(ends[0])
            elif others:
                left.remove(others[0])
                charged.append(others[0])
            else:
                return left

    def keeps_waiting(self, owner: int, left: list[Ticket]) -> bool:
        """Whether it cannot do what it is granted something for; who asks twice is two."""
        return any(
            self.stops(t, owner) if t.owner == owner else owner in self.kept(t) for t in left
        )

    def stops_others(self, ticket: Ticket, left: list[Ticket], charged: list[Ticket]) -> bool:
        stuck = self.holding() & set().union(*map(self.kept, left))
        others = {t.owner for t in [*left, *charged]} | stuck
        return any(self.stops(ticket, owner) for owner in others - {ticket.owner})

    def comes_before(self, ticket: Ticket, owner: int) -> bool:
        return owner in self.line(ticket.owner) or self.stops(ticket, owner)

    def stops(self, ticket: Ticket, owner: int) -> bool:
        thread = self.owners[owner].thread
        same = bool(thread) and self.owners[ticket.owner].thread == thread
        return bool(ticket.flags & BLOCKS_THREAD) and same

    def needed(self, tickets: list[Ticket]) -> list[Ticket]:
        """Those on whom somebody depends who holds leases, also by way of others that wait."""
        found: list[Ticket] = []
        while True:
            owners = self.holding() | {t.owner for t in found}
            more = [t for t in tickets if any(self.comes_before(t, o) for o in owners)]
            if len(more) == len(found):
                return found
            found = more

    def is_stopped(self, ticket: Ticket, waiting: list[Ticket]) -> bool:
        thread = self.owners[ticket.owner].thread
        stopped = {self.owners[t.owner].thread for t in waiting if t.flags & BLOCKS_THREAD}
        return bool(thread and thread in stopped and not ticket.flags & BLOCKS_THREAD)

    def request(self, ticket: Ticket) -> int:
        ticket.asked = ticket.asked or self.later()
        before: set[int] = set().union(*(self.pools(t) for t in self.queue))
        in_turn = not self.pools(ticket) & before or ticket in self.needed([*self.queue, ticket])
        if in_turn and self.fits_now(ticket) and self.is_safe(ticket):
            self.grant(ticket)
            ticket.verdict = GRANTED
        elif self.never(ticket):
            ticket.verdict = TOO_LARGE
        elif ticket.flags & TRY:
            ticket.verdict = BUSY
        elif self.hopeless([ticket, *self.queue]):
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
        again = True
        while again:
            if self.upset:
                self.refuse_hopeless()
            again = self.grant_waiting(tick) or self.upset
            again = again and bool(self.queue)
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
            self.decide(max(bad, key=self.queue.index), DEADLOCK)

    def grant_waiting(self, tick: int) -> bool:
        held_up: set[int] = set()
        needed, before = self.needed(self.queue), len(self.queue)
        for ticket in list(self.queue):
            if self.is_stopped(ticket, self.queue):
                continue
            in_turn = not self.pools(ticket) & held_up or ticket in needed
            if not in_turn or not self.fits_now(ticket):
                held_up |= self.pools(ticket)
            elif self.is_safe(ticket):
                self.grant(ticket)
                ticket.tick = tick
                self.decide(ticket, GRANTED)
        return len(self.queue) < before

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
