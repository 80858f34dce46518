"""The ledger of the pools against a slow model of it, by long random histories."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ledger_model as model
from checkout import TESTS
from opguard import _C

INDEX = st.integers(0, 1000)
SIZE = st.integers(0, 50)


class LedgerMachine(RuleBasedStateMachine):
    """Every call is made on both; after each, all that can be read must be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = _C.Ledger()
        self.model = model.Model()

    @initialize(budgets=st.lists(st.integers(30, 120), min_size=1, max_size=2))
    def begin(self, budgets: list[int]) -> None:
        for budget in budgets:
            self.ledger.add_pool(budget)
            self.model.budgets.append(budget)
        for size in (10, 20, 30, 40):
            self.add_unit(size, size, 0, False)
        self.add_owner(0, 1)
        self.add_owner(0, 2)

    # --- drawing ----------------------------------------------------------------------------------

    def units(self, *states: int) -> list[int]:
        found = [u for u in self.model.units.values() if not u.doomed]
        return [u.id for u in found if u.state in states or not states]

    def moving(self) -> list[int]:
        """What loads or is evicted, and is told of to somebody: removed units too."""
        untold = {u for t in self.model.decided.values() for u in t.load}
        found = [u for u in self.model.units.values() if not u.claimed and u.id not in untold]
        return [u.id for u in found if u.state in (model.LOADING, model.EVICTING)]

    def owners(self) -> list[int]:
        return [o.id for o in self.model.owners.values() if not o.dropped]

    @staticmethod
    def pick(values: list[int], index: int) -> int:
        return values[index % len(values)]

    # --- rules ------------------------------------------------------------------------------------

    @rule(pool=INDEX, size=SIZE, priority=st.integers(0, 2), pinned=st.booleans())
    def add_unit(self, pool: int, size: int, priority: int, pinned: bool) -> None:
        pool %= len(self.model.budgets)
        pinned = pinned and size < 15
        name = self.ledger.add_unit(pool, size, priority, pinned, size / 7)
        assert name not in self.model.units
        self.model.units[name] = model.Unit(
            name, pool, size, priority, pinned, size / 7, age=self.model.clock
        )

    @rule(parent=INDEX, thread=st.integers(0, 2))
    def add_owner(self, parent: int, thread: int) -> None:
        above = self.pick([0, 0, *self.owners()], parent)
        name = self.ledger.add_owner(above, thread)
        self.model.owners[name] = model.Owner(name, above, thread)

    @precondition(lambda self: self.units() and self.owners())
    @rule(
        owner=INDEX,
        units=st.lists(INDEX, min_size=1, max_size=3),
        extra=st.none() | st.tuples(INDEX, st.integers(0, 40)),
        flags=st.sampled_from([0, 0, 0, 1, 2, 2, 3, 4, 6]),
        tick=st.sampled_from([0, 0, 5]),
    )
    def request(self, owner, units, extra, flags, tick) -> None:
        name = self.pick(self.owners(), owner)
        chosen = tuple(self.pick(self.units(), i) for i in units)
        more = () if extra is None else ((extra[0] % len(self.model.budgets), extra[1]),)
        got = self.ledger.request(name, chosen, more, tick, flags)
        ticket = model.Ticket(got.ticket, name, chosen, more, tick, flags)
        assert got.verdict == self.model.request(ticket)
        assert (got.ticket > 0) == (got.verdict == model.WAIT)
        if got.verdict == model.GRANTED:
            self.compare(got, ticket)

    def compare(self, got: _C.PoolAnswer, ticket: model.Ticket) -> None:
        assert list(got.evict) == ticket.evict
        assert list(got.load) == ticket.load
        others = [u for u in dict.fromkeys(ticket.units) if u not in ticket.load]
        pending = [u for u in others if self.model.units[u].state != model.READY]
        assert list(got.pending) == pending

    @precondition(lambda self: self.units() and self.owners())
    @rule(owner=INDEX, units=st.lists(INDEX, min_size=1, max_size=2), tick=st.sampled_from([0, 3]))
    def enter(self, owner: int, units: list[int], tick: int) -> None:
        name = self.pick(self.owners(), owner)
        chosen = tuple(self.pick(self.units(), i) for i in units)
        assert self.ledger.enter(name, chosen, tick) == self.model.enter(name, chosen, tick)

    @precondition(lambda self: +self.model.leases)
    @rule(index=INDEX, pump=st.booleans())
    def leave(self, index: int, pump: bool) -> None:
        held = sorted(+self.model.leases)
        untaken = {(t.owner, u) for t in self.model.decided.values() for u in t.units}
        owner, unit = held[index % len(held)]
        if (owner, unit) in untaken:
            return
        waiting = bool(self.model.queue)
        free = self.model.count(unit) == 1
        should = self.ledger.leave(owner, (unit,))
        self.model.leave(owner, (unit,), ())
        assert should or not (waiting and free)
        if pump:
            self.pump(0)

    @precondition(lambda self: +self.model.extra)
    @rule(index=INDEX)
    def leave_extra(self, index: int) -> None:
        owner, pool = sorted(+self.model.extra)[index % len(+self.model.extra)]
        if any(t.owner == owner for t in self.model.decided.values()):
            return
        nbytes = self.model.extra[owner, pool]
        self.give_extra(owner, pool, nbytes - index % 2 * (nbytes // 2))

    def give_extra(self, owner: int, pool: int, nbytes: int) -> None:
        self.ledger.leave(owner, (), ((pool, nbytes),))
        self.model.leave(owner, (), ((pool, nbytes),))

    @precondition(lambda self: self.moving())
    @rule(index=INDEX, well=st.sampled_from([True, True, True, False]))
    def io(self, index: int, well: bool) -> None:
        name = self.pick(self.moving(), index)
        unit = self.model.units[name]
        if unit.state == model.LOADING:
            (self.ledger.loaded if well else self.ledger.failed)(name)
            self.model.become(name, model.READY if well else model.ABSENT)
        elif well:
            self.ledger.evicted(name)
            self.model.become(name, model.ABSENT)
        else:
            (self.ledger.spared if name % 2 else self.ledger.kept)(name)
            self.model.become(name, model.READY)
            unit.kept = name % 2 == 0
            self.model.upset = self.model.upset or unit.kept

    @rule(tick=st.sampled_from([0, 9]))
    def pump(self, tick: int) -> None:
        assert list(self.ledger.pump(tick)) == self.model.pump(tick)
        assert self.ledger.pump(tick) == ()

    @precondition(lambda self: self.model.decided)
    @rule(index=INDEX)
    def take(self, index: int) -> None:
        name = self.pick(list(self.model.decided), index)
        got = self.ledger.take(name)
        expected = self.model.decided[name]
        assert got.verdict == expected.verdict
        if got.verdict == model.GRANTED:
            self.compare(got, expected)
        self.model.take(name)

    @precondition(lambda self: self.model.decided or self.model.queue)
    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        name = self.pick([*self.model.decided, *(t.id for t in self.model.queue)], index)
        self.ledger.cancel(name)
        self.model.cancel(name)

    @rule(pool=INDEX, budget=st.integers(20, 130))
    def set_budget(self, pool: int, budget: int) -> None:
        pool %= len(self.model.budgets)
        self.ledger.set_budget(pool, budget)
        self.model.budgets[pool] = budget
        self.model.upset = True

    @precondition(lambda self: self.units())
    @rule(index=INDEX, what=st.sampled_from(["nbytes", "priority", "pinned", "rank"]), value=SIZE)
    def set_unit(self, index: int, what: str, value: int) -> None:
        name = self.pick(self.units(), index)
        unit = self.model.units[name]
        if what == "nbytes":
            self.model.resize(name, value)
        else:
            value = value % 6 if what != "pinned" else int(value < 4)
            setattr(unit, what, bool(value) if what == "pinned" else value)
        self.ledger.set_unit(name, what, value)
        self.model.upset = self.model.upset or what in ("nbytes", "pinned")

    @precondition(lambda self: self.units())
    @rule(index=INDEX)
    def condemn(self, index: int) -> None:
        name = self.pick(self.units(), index)
        unit = self.model.units[name]
        if unit.state in (model.LOADING, model.READY):
            unit.condemned, unit.kept = True, False
        assert self.ledger.condemn(name) == self.model.is_idle(unit)

    @rule(pool=INDEX, nbytes=st.integers(0, 100))
    def reclaim(self, pool: int, nbytes: int) -> None:
        pool %= len(self.model.budgets)
        assert list(self.ledger.reclaim(pool, nbytes)) == self.model.reclaim(pool, nbytes)

    @rule(pool=INDEX)
    def reclaim_condemned(self, pool: int) -> None:
        pool %= len(self.model.budgets)
        expected = {u.id for u in self.model.idle(pool) if u.condemned}
        assert set(self.ledger.reclaim_condemned(pool)) == expected
        for name in expected:
            self.model.become(name, model.EVICTING)

    @precondition(lambda self: len(self.units()) > 3)
    @rule(index=INDEX)
    def remove_unit(self, index: int) -> None:
        name = self.pick(self.units(), index)
        wanted = any(name in t.units for t in [*self.model.queue, *self.model.decided.values()])
        self.ledger.remove_unit(name)
        self.model.units[name].doomed = True
        self.model.settle(name)
        self.model.upset = self.model.upset or wanted
        with pytest.raises(ValueError, match="id of a unit"):
            self.ledger.enter(self.owners()[0], (name,)) if self.owners() else self.ledger.unit(-1)

    @precondition(lambda self: len(self.owners()) > 1)
    @rule(index=INDEX)
    def drop_owner(self, index: int) -> None:
        name = self.pick(self.owners(), index)
        self.ledger.drop_owner(name)
        self.model.owners[name].dropped = True
        with pytest.raises(ValueError, match="id of an owner"):
            self.ledger.enter(name, ())

    @rule(policy=st.sampled_from(["lru", "cost", "rank"]))
    def set_policy(self, policy: str) -> None:
        self.ledger.set_policy(policy)
        self.model.policy = policy

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def all_is_equal(self) -> None:
        for pool, budget in enumerate(self.model.budgets):
            info = self.ledger.pool(pool)
            assert info == (budget, self.model.used(pool))
            assert info.idle == sum(u.nbytes for u in self.model.idle(pool))
            known = {u.id for u in self.model.units.values() if u.pool == pool and not u.doomed}
            assert set(self.ledger.units(pool)) == known
        for name, unit in self.model.units.items():
            held = {(o, n) for (o, u), n in self.model.leases.items() if u == name and n}
            assert set(self.ledger.holders(name)) == held
            got = self.ledger.unit(name)
            assert (got.state, got.leases) == (unit.state, self.model.count(name))
            assert (got.condemned, got.uses, got.tick) == (unit.condemned, unit.uses, unit.tick)
        waiting = [(t.id, t.owner, t.units) for t in self.model.queue]
        assert [row[:3] for row in self.ledger.waiting()] == waiting

    def teardown(self) -> None:
        """Everybody lets go and takes what comes: nobody may be left waiting."""
        for _ in range(200):
            for index in reversed(range(len(self.moving()))):
                self.io(index, True)
            self.pump(0)
            while self.model.decided:
                self.take(0)
            for index, held in reversed(list(enumerate(sorted(+self.model.leases)))):
                if self.model.can_leave("unit", *held):
                    self.leave(index, False)
            for held in +self.model.extra:
                if nbytes := self.model.can_leave("extra", *held):
                    self.give_extra(*held, nbytes)
            if not self.model.queue and not +self.model.leases:
                break
        assert not self.model.queue, vars(self.model)
        assert not +self.model.leases


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_the_ledger_keeps_nothing():
    """Blocks by slope: owners, units, leases, tickets and answers that are over are gone."""
    script = TESTS / "isolated" / "leak_ledger.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
